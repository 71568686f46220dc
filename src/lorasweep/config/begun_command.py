"""The command by which a run or a sweep was begun in a folder, with the settings that now change.

The folder may be a stranger's: it names settings, groups' options, a launcher and a sweeper. Any
other of its words holds only if it is said again. Where and how a run works may change on the way
(`settings_digest.changes_nothing`), and the number of epochs may grow; whatever else would change
is refused by its name.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from lorasweep.config.compose import added, compose, flat, plain_values, quoted
from lorasweep.config.foreign_settings import unsaid
from lorasweep.config.settings_digest import NUM_EPOCHS, changes_nothing
from lorasweep.core.foreign_files import ForeignFileError, read_yaml
from lorasweep.core.settings import SettingsError
from lorasweep.core.text import shown
from lorasweep.tracking.store import public_uri

_MAY_CHANGE = re.compile(r"hydra/launcher|hydra\.launcher\..+|study\.(?!vars\b).+")
"""Keys of overrides that say how a sweep works; what must stay of it, `check_unchanged` says."""
_NONE = object()


@dataclass(frozen=True)
class BegunCommand:
    """How to go on in a folder."""

    argv: Sequence[str]
    """The words after `lorasweep train`."""
    cwd: Path
    """Where they are given: the folder in which it was begun."""
    longer: DictConfig | None = None
    """The config, if there are more epochs than it was begun with."""


def begun_by(folder: Path, said: Sequence[str] = ()) -> BegunCommand:
    """How to go on in a run's or a multirun's folder, with the overrides that are `said`.

    Raises SettingsError for a word of the folder's that must be said again, for a setting that
    can't change, and where Hydra's files of the folder are missing.
    """
    multirun = folder / "multirun.yaml"
    file = multirun if multirun.is_file() else folder / ".hydra" / "hydra.yaml"
    place = "hydra.sweep.dir" if multirun.is_file() else "hydra.run.dir"
    try:
        saved = read_yaml(file)
        hydra = saved["hydra"]
        given = [*hydra["overrides"]["hydra"], *hydra["overrides"]["task"]]
        sources = hydra["runtime"]["config_sources"]
        folders = [str(one["path"]) for one in sources if one["provider"] == "command-line"]
        cwd = Path(str(hydra["runtime"]["cwd"]))
        then = Path(str(hydra["runtime"]["output_dir"]))
        root = str(saved["output_root"] if multirun.is_file() else _saved_root(folder))
    except ForeignFileError as error:
        raise SettingsError(f"{error}: can't tell how it was begun") from None
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{file}: can't tell how it was begun ({error})") from None
    moved_root = _moved_root(folder.absolute(), then, cwd / Path(root).expanduser())
    if not cwd.is_dir():
        cwd = _now(cwd, folder.absolute(), then)
    folders = [
        one if Path(one).is_dir() else str(_now(Path(one), folder.absolute(), then))
        for one in folders
    ]
    if not all(isinstance(word, str) for word in given) or not cwd.is_dir():
        raise SettingsError(f"{file}: can't tell how it was begun, in {shown(str(cwd))}")
    words = [word for word in given if _key(word) not in ("hydra.mode", place)]
    last = {_key(word): _bare(word) for word in words}
    new = [word for word in added(said) if _bare(word) != last.get(_key(word))]
    # what is said again holds; what is said otherwise takes the place of all words of its key
    stay = [word for word in words if _key(word) not in map(_key, new)]
    if missing := [word for word in unsaid(stay) if _bare(word) not in map(_bare, said)]:
        again = shown(public_uri(shlex.join([str(folder), *said, *missing])), 500)
        raise SettingsError(
            f"{folder} was begun with what it can't decide for you: if you began it so, say it"
            f" again: lorasweep resume {again}"
        )
    for word in new:
        _check_word(word, words, folder)
    longer = _changed(words, [*stay, *new], folders, folder) if new else None
    if moved_root is not None and cwd / Path(root).expanduser() != moved_root:
        stay = [word for word in stay if _key(word) != "output_root"]
        stay.append(f"output_root={quoted(str(moved_root))}")
    flags = ["-m"] if multirun.is_file() else []
    options = [word for path in folders for word in ("--config-dir", path)]
    argv = [*flags, *options, *stay, *new, f"{place}={quoted(str(folder))}"]
    return BegunCommand(argv, cwd, longer)


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


def _check_word(word: str, words: Sequence[str], folder: Path) -> None:
    """Raise SettingsError for an override that can't change, as far as the words tell.

    That is what is no setting of a run, what a sweep varies, and what the folder can't decide.
    """
    key = _key(word)
    if _MAY_CHANGE.fullmatch(key) or changes_nothing(key):
        return
    before = [one for one in words if _key(one) == key]
    is_setting = re.split("[./]", key)[0] not in ("hydra", "study")
    if not is_setting or any(map(_varies, [word, *before])) or unsaid(before):
        raise _cannot_change(word, " ".join(before), folder)


def _changed(
    words: Sequence[str], now: Sequence[str], config_dirs: Sequence[str], folder: Path
) -> DictConfig | None:
    """The config of the words `now`, if it has more epochs than that of the words before.

    Raises SettingsError for any other difference that would change a result.
    """
    config_dir = Path(config_dirs[0]) if config_dirs else None
    before, cfg = (compose(_one_run(some), config_dir) for some in (words, now))
    old, new = flat(plain_values(before)), flat(plain_values(cfg))
    changed = [key for key in {**old, **new} if old.get(key, _NONE) != new.get(key, _NONE)]
    for key in changed:
        grows = key == NUM_EPOCHS and _grows(old.get(key), new.get(key))
        if not changes_nothing(key) and not grows:
            said, was = (f"{key}={one[key]}" if key in one else "" for one in (new, old))
            raise _cannot_change(said or f"without {key}", was, folder)
    return cfg if NUM_EPOCHS in changed else None


def _grows(old: object, new: object) -> bool:
    return isinstance(old, int) and isinstance(new, int) and new > old


def _cannot_change(what: str, before: str, folder: Path) -> SettingsError:
    how = f"with {before}" if before else "without it"
    may = "can only grow" if what.startswith(f"{NUM_EPOCHS}=") else "can't change on the way"
    said = shown(public_uri(f"{what}: {folder} was begun {how}, which {may}"), 500)
    return SettingsError(f"{said}; leave it out, or train anew with another name")


def _one_run(words: Sequence[str]) -> list[str]:
    """The words, of which those that a sweep varies have their first values, without Hydra's own.

    A range of numbers has none: there the config's own stands.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override

    found: list[str] = []
    for word in words:
        if _key(word).startswith("hydra."):
            continue
        if not _varies(word):
            found.append(word)
            continue
        override: Override = OverridesParser.create().parse_override(word)
        if override.is_discrete_sweep():
            found += [f"{override.get_key_element()}={next(override.sweep_string_iterator())}"]
    return found


def _varies(word: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return bool(OverridesParser.create().parse_override(word).is_sweep_override())
    except HydraException:  # Hydra says what is wrong with it
        return False


def _bare(word: str) -> str:
    return word.lstrip("+")


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0].partition("@")[0]
