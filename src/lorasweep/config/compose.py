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
        saved = read_yaml(file)
        hydra = saved["hydra"]
        given = [*hydra["overrides"]["hydra"], *hydra["overrides"]["task"]]
        sources = hydra["runtime"]["config_sources"]
        folders = [str(one["path"]) for one in sources if one["provider"] == "command-line"]
        cwd = Path(str(hydra["runtime"]["cwd"]))
        then = Path(str(hydra["runtime"]["output_dir"]))
        root = str(saved["output_root"] if multirun.is_file() else _saved_root(folder))
        moved_root = _moved_root(folder.absolute(), then, cwd / Path(root).expanduser())
    except ForeignFileError as error:
        raise SettingsError(f"{error}: can't tell how it was begun") from None
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{file}: can't tell how it was begun ({error})") from None
    if not cwd.is_dir():
        cwd = _now(cwd, folder.absolute(), then)
    folders = [
        one if Path(one).is_dir() else str(_now(Path(one), folder.absolute(), then))
        for one in folders
    ]
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
    if moved_root is not None and cwd / Path(root).expanduser() != moved_root:
        words = [word for word in words if not word.startswith("output_root=")]
        words.append(f"output_root={quoted(str(moved_root))}")
    flags = ["-m"] if multirun.is_file() else []
    options = [word for path in folders for word in ("--config-dir", path)]
    return [*flags, *options, *words, f"{key}={quoted(str(folder))}"], cwd


def _saved_root(folder: Path) -> str:
    return str(read_yaml(folder / ".hydra" / "config.yaml").get("output_root", "${}"))


def _moved_root(folder: Path, then: Path, root: Path) -> Path | None:
    """The output_root of a folder that lay at `then`, if its place is another by now."""
    now = _now(root, folder, then)
    return now if now != root and folder.is_relative_to(now) else None


def _now(path: Path, folder: Path, then: Path) -> Path:
    """Where a path lies since the folder that lay at `then` was moved, itself or with others.

    What the two places of the folder end in has moved as a whole.
    """
    pairs = list(zip(reversed(then.parts), reversed(folder.parts), strict=False))
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), 0)
    if same == 0:  # it has not moved, or has a name of its own by now
        return path
    before, after = then.parents[same - 1], folder.parents[same - 1]
    return after / path.relative_to(before) if path.is_relative_to(before) else path


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
