"""What a foreign file says of a training, key by key, and the settings that come of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lorasweep.core.text import shown
from lorasweep.training.sd_scripts_options import NOT_UNDERSTOOD, OURS, Reader, boolean

NEUTRAL = ("0", "0.0", "false", "none", "null", "", "[]")
"""Texts, in small letters, by which an option says nothing."""
Verdict = Literal["taken as", "no effect", "left out", "unknown"]


class Said(NamedTuple):
    """What a file says of one of sd-scripts' options."""

    value: Any
    where: str
    """In the file's own words: ss_seed=1234."""
    is_default: bool = False
    """The file says nothing, and this is what sd-scripts does then."""


class Row(NamedTuple):
    """What became of something that a file says."""

    said: str
    verdict: Verdict
    what: str
    """The setting with its value, or why there is none."""


@dataclass
class FoundSettings:
    """The settings by which a file may have been made, or a training begun."""

    name: str
    choices: dict[str, str] = field(default_factory=dict)
    """Group -> option of conf/."""
    settings: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    """Group or setting -> what the file says, in its own words."""
    defaults: set[str] = field(default_factory=set)
    """Settings that are sd-scripts' own default, which the file doesn't say."""
    rows: list[Row] = field(default_factory=list)
    """What became of everything."""
    notes: list[str] = field(default_factory=list)
    """What whoever wrote the file may not know."""
    arms: dict[str, int] = field(default_factory=dict)
    """Caption folders with their repeats."""
    empty_arms: set[str] = field(default_factory=set)
    """Those of them whose captions are all empty."""

    _seen: set[Row] = field(default_factory=set)

    @property
    def unknown(self) -> list[tuple[str, str]]:
        """What is not known or can't be said here, and what stands instead."""
        return [(row.said, row.what) for row in self.rows if row.verdict in ("left out", "unknown")]

    @property
    def taken(self) -> list[Row]:
        """What became a setting."""
        return [row for row in self.rows if row.verdict == "taken as"]

    def choose(self, group: str, option: str, where: str) -> None:
        """Take an option of conf/."""
        self.choices[group], self.sources[group] = option, where
        self._add(where, "taken as", f"{group}={option}")

    def take(self, setting: str, value: Any, where: str) -> None:
        """Take a setting."""
        self.settings[setting], self.sources[setting] = value, where
        self._add(where, "taken as", f"{setting}={text_of(value)}")

    def take_arm(self, arm: str, repeats: int, where: str) -> None:
        """Take a folder of captions."""
        self.arms[arm] = repeats
        self._add(where, "taken as", f"captions.{arm}.repeats={repeats}")

    def read(self, setting: str, said: Said, read: Reader) -> None:
        """Take a setting from what is said, or list it as not understood."""
        try:
            value = read(said.value)
        except NOT_UNDERSTOOD:
            self.leave(said.where, f"not understood; {setting}'s default stands")
            return
        if value is OURS:
            self.idle(said.where, f"it says nothing; {setting}'s default stands")
            return
        self.take(setting, value, said.where)
        if said.is_default:
            self.defaults.add(setting)

    def idle(self, where: str, why: str) -> None:
        """List what has no effect."""
        self._add(where, "no effect", why)

    def leave(self, where: str, why: str) -> None:
        """List what would have an effect, and can't be said here."""
        self._add(where, "left out", why)

    def ignore(self, where: str, why: str) -> None:
        """List what nobody knows."""
        self._add(where, "unknown", why)

    def drop_defaults(self, ours: Mapping[str, Any]) -> None:
        """Forget sd-scripts' defaults that are ours too; `ours` are conf/'s values, flat."""
        for setting in [one for one in self.defaults if ours.get(one) == self.settings.get(one)]:
            self.forget(setting)

    def change(self, setting: str, value: Any) -> None:
        """Take another value than the one that was read, for the same reason."""
        self.take(setting, value, self.forget(setting))

    def forget(self, setting: str) -> str:
        """Take a setting back, with its row; what the file says of it."""
        where, value = self.sources.pop(setting), self.settings.pop(setting)
        row = Row(where, "taken as", f"{setting}={text_of(value)}")
        self.rows.remove(row)
        self._seen.discard(row)
        self.defaults.discard(setting)
        return where

    def _add(self, where: str, verdict: Verdict, what: str) -> None:
        row = Row(where, verdict, what)
        if row not in self._seen:
            self._seen.add(row)
            self.rows.append(row)


class Options:
    """The options of a file; whoever reads one takes it out, and the rest has no setting."""

    def __init__(
        self, said: Mapping[str, Said], found: FoundSettings, *, with_defaults: bool
    ) -> None:
        self._said, self._found = dict(said), found
        self._with_defaults = with_defaults

    def pop(self, name: str, default: Any = OURS) -> Said | None:
        """What is said of an option, or what sd-scripts does by itself; None: nothing is known."""
        if (said := self._said.pop(name, None)) is not None:
            return said
        if self._with_defaults and default is not OURS:
            return Said(default, f"{name}, which is not said", is_default=True)
        return None

    def is_on(self, name: str) -> Said | None:
        """What is said of a switch, if it is on; its row is of no effect if it is off."""
        said = self.pop(name)
        if said is None:
            return None
        try:
            if boolean(said.value):
                return said
            self._found.idle(said.where, "it is off")
        except KeyError:
            self._found.leave(said.where, "not understood; taken as off")
        return None

    def rest(self) -> list[tuple[str, Said]]:
        """What nobody has read."""
        return list(self._said.items())


def said_as(name: str, value: Any) -> Said:
    """What a file says, NAME=VALUE; keys to others' services are not shown."""
    is_secret = name.endswith(("_token", "_api_key")) and value
    return Said(value, shown(f"{name}={'…' if is_secret else text_of(value)}", 200))


def text_of(value: Any) -> str:
    """A value as the command line takes it."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}" if float(f"{value:g}") == value else repr(value)
        case list() | tuple():
            inner = ("…" if isinstance(one, list | tuple | dict) else text_of(one) for one in value)
            return f"[{','.join(inner)}]"
        case dict():
            return "{…}"
    return str(value)
