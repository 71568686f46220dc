"""From the command line's overrides to a composed config, and back from a folder to its command."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep.config.conf_folder import conf_dir
from lorasweep.config.resolvers import register_resolvers
from lorasweep.core.settings import SettingsError


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """The config that `train` would run with these overrides. Raises Hydra's errors."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_resolvers()
    if config_dir is not None and not config_dir.is_dir():  # Hydra goes on without it
        raise SettingsError(f"--config-dir {config_dir}: there is no such folder")
    place = quoted(f"file://{config_dir.absolute()}") if config_dir else ""
    extra = [f"hydra.searchpath=[{place}]"] if config_dir else []
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra_compose("config", [*extra, *overrides])


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


def begun_by(folder: Path) -> tuple[list[str], Path]:
    """How to go on in a run's or a multirun's folder: the words after `lorasweep train`, and where.

    They are given in the folder in which it was begun. Raises SettingsError where Hydra's files of
    it are missing.
    """
    multirun = folder / "multirun.yaml"
    file = multirun if multirun.is_file() else folder / ".hydra" / "hydra.yaml"
    try:
        hydra = OmegaConf.load(file).hydra
        sources = [
            one.path for one in hydra.runtime.config_sources if one.provider == "command-line"
        ]
        given = [*hydra.overrides.hydra, *hydra.overrides.task]
        cwd = Path(hydra.runtime.cwd)
    except (OSError, OmegaConfBaseException, AttributeError) as error:
        raise SettingsError(f"{file}: can't tell how it was begun ({error})") from None
    key = "hydra.sweep.dir" if multirun.is_file() else "hydra.run.dir"
    overrides = [one for one in given if not one.startswith(("hydra.mode=", f"{key}="))]
    folders = [word for path in sources for word in ("--config-dir", str(path))]
    flags = ["-m"] if multirun.is_file() else []
    return [*flags, *folders, *overrides, f"{key}={quoted(str(folder))}"], cwd


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
