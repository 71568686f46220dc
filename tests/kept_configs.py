"""Hydra composes thousands of configs while tests run, of a conf/ that stays as it is.

What it makes of these files is kept, pickled, in each process: what a file says, the list of files
that a choice of options names, the config of these files, and what equal overrides compose. A
test's own folder of options (--config-dir) is read each time, and known by all that it says.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import omegaconf
import yaml
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides, ResultDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, _utils, grammar_parser

from lorasweep.config import conf_folder
from lorasweep.config.conf_folder import OPTIONS_SCHEME, conf_dir

_KEPT: dict[Hashable, bytes] = {}


def _once(key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` gave when this key was asked for first: a copy for each who asks."""
    if key not in _KEPT:
        _KEPT[key] = pickle.dumps(make())
    return pickle.loads(_KEPT[key])


def _stay() -> set[str]:
    """Where files stay as they are: conf/, the checkout with sweeps/, and what Hydra ships."""
    return {str(conf_dir()), str(conf_dir().parent), "hydra.conf", ""}


def _said(repo: IConfigRepository) -> Hashable | None:
    """What all files of options say; None if that isn't known."""
    others = [one for one in repo.get_sources() if one.path not in _stay()]
    if any(one.scheme() != OPTIONS_SCHEME for one in others):
        return None
    said = []
    for folder in (Path(one.path) for one in others):
        groups = [one for one in folder.iterdir() if one.name not in ("outputs", "cache")]
        paths = [path for group in groups for path in (group, *group.rglob("*"))]
        if any(path.is_symlink() for path in paths):
            return None
        files = [path for path in paths if path.suffix == ".yaml" and path.is_file()]
        said.append(tuple((str(p.relative_to(folder)), p.read_bytes()) for p in sorted(files)))
    return tuple(said)


def keep_configs() -> None:
    """From now on, in this process and in its forks."""
    yaml.SafeLoader = yaml.CSafeLoader
    grammar_parser.parse = cache(grammar_parser.parse)
    _utils.parse = omegaconf.base.parse = grammar_parser.parse

    read = ConfigRepository.load_config

    def load_config(self: ConfigRepository, config_path: str) -> Any:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or source.path not in _stay():
            return read(self, config_path)
        return _once(("file", source.path, config_path), lambda: read(self, config_path))

    list_defaults = config_loader_impl.create_defaults_list

    def create_defaults_list(
        repo: IConfigRepository,
        config_name: str | None,
        overrides_list: list[Override],
        prepend_hydra: bool,
        skip_missing: bool,
    ) -> DefaultsList:
        def made() -> DefaultsList:
            return list_defaults(repo, config_name, chosen, prepend_hydra, skip_missing)

        if (said := _said(repo)) is None:
            chosen = overrides_list
            return made()
        chosen = [one for one in overrides_list if repo.group_exists(one.key_or_group)]
        asked = config_name, prepend_hydra, skip_missing, *(one.input_line for one in chosen)
        found = _once(("defaults", said, *asked), made)
        values = Overrides(repo, overrides_list).config_overrides
        found.config_overrides = found.overrides.config_overrides = values
        return found

    join = ConfigLoaderImpl._compose_config_from_defaults_list

    def joined(
        self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository
    ) -> DictConfig:
        if (said := _said(repo)) is None:
            return join(self, defaults, repo)
        return _once(("joined", said, str(defaults)), lambda: join(self, defaults, repo))

    compose = hydra.compose

    def composed(config_name: str, overrides: list[str]) -> DictConfig:
        if conf_folder._OPTIONS.get() is not None:  # --config-dir
            return compose(config_name, overrides)
        words = ("composed", config_name, *overrides)
        return _once(words, lambda: compose(config_name, overrides))

    ConfigRepository.load_config = load_config
    ConfigRepository.__deepcopy__ = lambda self, memo: copy(self)  # of which Hydra sets anew
    config_loader_impl.create_defaults_list = create_defaults_list
    ConfigLoaderImpl._compose_config_from_defaults_list = joined
    hydra.compose = composed
