"""What Hydra and OmegaConf say in many lines, in one that names the key and the remedy.

Most of their errors carry no fields that tell one mistake from another, only English: `_REMEDIES`
reads it. The tests of bad inputs give these mistakes to the installed Hydra, so that a new wording
is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep.config.conf_folder import conf_dir, groups
from lorasweep.config.run import COMPONENTS, KEYS
from lorasweep.core.settings import unknown_key
from lorasweep.core.text import shown

if TYPE_CHECKING:
    from hydra.errors import MissingConfigException, OverrideParseException


def explain(error: Exception) -> str | None:
    """One line for an error of Hydra's or OmegaConf's; None for any other error."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException

    message = str(error)
    if isinstance(error, OverrideParseException):
        return _unreadable_override(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_such_option(error)
    if not isinstance(error, HydraException | OmegaConfBaseException):
        if isinstance(error, ValueError) and "Config group override must be" in message:
            return "a group takes the name of an option, not null or a number: GROUP=OPTION"
        return None
    for pattern, remedy in _REMEDIES:
        if found := re.search(pattern, message):
            return remedy(found[1])
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:2])


def missing_value(key: str) -> str:
    """The one line for a setting that has no default and was not given."""
    return f"{key} is missing: {_HINTS.get(key, f'give it as {key}=VALUE')}"


def cannot_be_removed(key: str) -> str:
    """The one line for a setting that was taken away by ~KEY."""
    return f"{key} can't be removed: leave out ~{key}"


_HINTS = {
    "dataset.image_dir": "give the folder of your images, e.g. dataset.image_dir=photos,"
    " or try experiment=demo"
}
_LAUNCHERS = {  # of Hydra's own, by the extra that brings them
    **dict.fromkeys(
        ("joblib", "submitit_local", "submitit_slurm"), "pip install 'lorasweep[cluster]'"
    ),
    "ray": "pip install 'lorasweep[ray]', or take launcher.pack_via=ray (lorasweep[cluster])",
}


def _unreadable_override(error: OverrideParseException) -> str:
    cause = str(error).splitlines()[0]
    override = shown(str(error.override))
    return f"{override}: can't be read ({cause}); quote values that hold , [ ] {{ }} or ="


def _no_such_option(error: MissingConfigException) -> str:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    if group == "hydra/launcher" and name in _LAUNCHERS:
        return f"hydra/launcher={name} is not installed: {_LAUNCHERS[name]}"
    options = error.options or groups().get(group, ["none"])
    return f"{group}={name}: there is no such option; choose one of {', '.join(options)}"


def _no_such_key(key: str) -> str:
    """Why `key` can't be overridden: the group has no such setting, or there is no such group."""
    group, _, rest = key.partition(".")
    if group == "study":
        return _no_such_study_key(key)
    if not rest:  # perhaps a setting without its group
        every = (f"{one}.{name}" for one in COMPONENTS for name in _of_group(one))
        return unknown_key(key, sorted({*KEYS, *every}))
    files = list((conf_dir() / group).glob("*.yaml"))
    having = {file.stem for file in files if rest in _keys_of(file)}
    if having:
        have = "have" if len(having) > 1 else "has"
        return (
            f"{key}: only {group}={', '.join(sorted(having))} {have} it; choose that too, and where"
            f" -m sweeps {group}, sweep that alone and write ++{key}=…"
        )
    known = {f"{group}.{name}" for file in files for name in _keys_of(file)}
    return unknown_key(key, sorted(known or KEYS))


def _of_group(group: str) -> set[str]:
    """The settings of a group's options."""
    files = (conf_dir() / group).glob("*.yaml")
    return {name for file in files for name in _keys_of(file)}


def _no_such_study_key(key: str) -> str:
    """Hydra lets nobody add to a mapping such as study.constraints, unless told by ++."""
    file = conf_dir() / "hydra" / "sweeper" / "optuna.yaml"
    known = [f"study.{name}" for name in _keys_of(file, "study")]
    if ".".join(key.split(".")[:2]) in known:
        return f"{key}: to add to what is there, write ++{key}=…"
    return unknown_key(key, known)


def _keys_of(file: Path, node: str | None = None) -> list[str]:
    """The keys that a YAML file of conf/ sets, or one of its nodes."""
    loaded = OmegaConf.load(file)
    found = OmegaConf.select(loaded, node) if node else loaded
    return [str(key) for key in found if key != "_target_"]


_REMEDIES: tuple[tuple[str, Callable[[str], str]], ...] = (
    (
        r"(?s)raised while resolving interpolation: (\S*name=.*it names files\))",
        shown,
    ),
    (r"[Mm]issing mandatory value: ([\w.]+)", missing_value),
    (
        r"Ambiguous value for argument '(.*?)'",
        "{}: several values make a sweep; train it by lorasweep train -m …".format,
    ),
    (
        r"An item is already at '(.+?)'",
        "{0} is there already: change it without the +, by {0}=VALUE".format,
    ),
    (r"Could not (?:override|append to config|delete from config)[^']*'(.+?)'", _no_such_key),
    (r"^Key '.+?' is not in struct\s+full_key: (\S+)", cannot_be_removed),
)
"""A part of a message, and what makes a line of its group."""
