"""From the command line's overrides to a composed config, and back from a folder to its command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep.config.conf_folder import conf_dir, options_from
from lorasweep.config.foreign_settings import check_said, unsaid
from lorasweep.config.resolvers import register_resolvers
from lorasweep.core.foreign_files import ForeignFileError, read_yaml
from lorasweep.core.settings import SettingsError
from lorasweep.core.text import shown
from lorasweep.tracking.store import public_uri


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """The config that `train` would run with these overrides. Raises Hydra's errors."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_resolvers()
    with (
        options_from(config_dir),
        initialize_config_dir(str(conf_dir()), version_base="1.3"),
    ):
        cfg = hydra_compose("config", list(overrides))
    if config_dir is not None:
        check_said(cfg, overrides)
    return cfg


def compose_without_images(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """The same for a command that reads no images: their folder need not be given."""
    return compose(["dataset.image_dir=lorasweep", *overrides], config_dir)


def plain_values(cfg: DictConfig) -> dict[str, Any]:
    """What a run is made of, resolved: all but Hydra's node and a sweep's. Raises SettingsError."""
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    try:
        values = OmegaConf.to_container(own, resolve=True)
    except (OmegaConfBaseException, TypeError) as error:
        raise SettingsError(str(error).splitlines()[0]) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key != "study"}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def begun_by(folder: Path, said: Sequence[str] = ()) -> tuple[list[str], Path]:
    """How to go on in a run's or a multirun's folder: the words after `lorasweep train`, and where.

    They are given in the folder in which it was begun. The folder may be a stranger's: it names
    settings, groups' options, a launcher and a sweeper. Any other of its words holds only if it is
    among those that are `said` again. Raises SettingsError for one that isn't, and where Hydra's
    files of it are missing.
    """
    multirun = folder / "multirun.yaml"
    file = multirun if multirun.is_file() else folder / ".hydra" / "hydra.yaml"
    key = "hydra.sweep.dir" if multirun.is_file() else "hydra.run.dir"
    try:
        hydra = read_yaml(file)["hydra"]
        given = [*hydra["overrides"]["hydra"], *hydra["overrides"]["task"]]
        sources = hydra["runtime"]["config_sources"]
        folders = [str(one["path"]) for one in sources if one["provider"] == "command-line"]
        cwd = Path(str(hydra["runtime"]["cwd"]))
    except ForeignFileError as error:
        raise SettingsError(f"{error}: can't tell how it was begun") from None
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{file}: can't tell how it was begun ({error})") from None
    if not all(isinstance(word, str) for word in given) or not cwd.is_dir():
        raise SettingsError(f"{file}: can't tell how it was begun, in {shown(str(cwd))}")
    words = [one for one in given if one.lstrip("+").partition("=")[0] not in ("hydra.mode", key)]
    if unknown := [word for word in said if word not in words]:
        raise SettingsError(f"{unknown[0]}: {folder} was not begun with it; leave it out")
    if missing := [word for word in unsaid(words) if word not in said]:
        again = shown(public_uri(shlex.join([str(folder), *said, *missing])), 500)
        raise SettingsError(
            f"{folder} was begun with what it can't decide for you: if you began it so, say it"
            f" again: lorasweep resume {again}"
        )
    flags = ["-m"] if multirun.is_file() else []
    options = [word for path in folders for word in ("--config-dir", path)]
    return [*flags, *options, *words, f"{key}={quoted(str(folder))}"], cwd


def quoted(text: str) -> str:
    """A value for Hydra's grammar, whatever characters it has."""
    escaped = re.sub(r"\\+(?='|$)", lambda found: found[0] * 2, literal(text)).replace("'", "\\'")
    return f"'{escaped}'"


def literal(value: Any) -> Any:
    """A value, or values within values, that OmegaConf resolves to just this: `${` in it is text.

    So are written values that are resolved already, as those of a log are.
    """
    match value:
        case str():
            return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", value)
        case Mapping():
            return {key: literal(one) for key, one in value.items()}
        case list() | tuple():
            return [literal(one) for one in value]
        case _:
            return value
