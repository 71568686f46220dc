"""From the command line's overrides to a composed config."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep.config.conf_folder import conf_dir, options_from
from lorasweep.config.foreign_settings import check_said
from lorasweep.config.resolvers import register_resolvers
from lorasweep.core.settings import SettingsError


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """The config that `train` would run with these overrides. Raises Hydra's errors."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_resolvers()
    with (
        options_from(config_dir),
        initialize_config_dir(str(conf_dir()), version_base="1.3"),
    ):
        cfg = hydra_compose("config", added(overrides))
    if config_dir is not None:
        check_said(cfg, overrides)
    return cfg


def compose_without_images(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """The same for a command that reads no images: their folder need not be given."""
    return compose(["dataset.image_dir=lorasweep", *overrides], config_dir)


def added(words: Sequence[str]) -> list[str]:
    """The overrides, of which those of `optimizer.args` may add to it.

    What it takes is for the optimiser's class to say, and not for conf/'s file of one.
    """
    return [f"++{word}" if re.match(r"optimizer\.args[.=]", word) else word for word in words]


def plain_values(cfg: DictConfig) -> dict[str, Any]:
    """What a run is made of, resolved: all but Hydra's node and a sweep's. Raises SettingsError."""
    if "hydra" in cfg:
        cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except (OmegaConfBaseException, TypeError) as error:
        raise SettingsError(str(error).splitlines()[0]) from None
    assert isinstance(values, dict)
    if (values.get("dataset") or {}).get("_target_") == "KohyaDataset":
        values["captions"] = {}  # they lie in its folders
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
