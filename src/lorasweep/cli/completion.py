"""What the shell offers on Tab: commands, flags, files, groups, options and settings."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable

from lorasweep.config.conf_folder import conf_dir, groups, sweeps_dir


def answer_shell(parser: argparse.ArgumentParser) -> None:
    """Say what the unfinished word could become, and end the process (argcomplete's protocol)."""
    import argcomplete

    argcomplete.autocomplete(parser)


def complete_word(prefix: str, parser: argparse.ArgumentParser, **_: object) -> list[str]:
    """Options after `GROUP=`, keys after `GROUP.`, else groups and, of `sweep`, its names.

    The files are argcomplete's.
    """
    key, assigned, _value = prefix.partition("=")
    found: Iterable[str]
    if assigned:
        found = (f"{key}={option}" for option in groups().get(key, ()))
    elif "." in key:
        found = _keys(key.partition(".")[0])
    else:
        sweeps = sweeps_dir().glob("*.yaml") if parser.prog.endswith(" sweep") else ()
        found = [path.stem for path in sweeps]
        found += [word for group in groups() for word in (f"{group}=", f"{group}.")]
    return [word for word in found if word.startswith(prefix)]


def _keys(group: str) -> Iterable[str]:
    """The settings in the files of a group, without reading YAML: Tab must answer at once."""
    texts = [path.read_text() for path in (conf_dir() / group).glob("*.yaml")]
    names = {name for text in texts for name in re.findall(r"^([a-z]\w*):", text, re.MULTILINE)}
    return (f"{group}.{name}=" for name in sorted(names - {"defaults"}))
