"""Typed settings: what every configurable component is built from.

A component is a frozen dataclass that derives from `Settings`: its fields' types and its
`__post_init__` are the rules, the YAML in conf/ holds the values.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.machinery import PathFinder
from typing import Annotated, Any, ClassVar, cast, get_args, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from lorasweep.core.components import MODULES, dotted_path, short_name
from lorasweep.core.text import shown
from lorasweep.core.trainer_words import WHY_NOT, meant

Probability = Annotated[float, Field(ge=0, lt=1)]
"""A share of the time, from 0 up to but not including 1."""
Texts = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]
"""Several texts; one alone needs no list."""
Count = Annotated[int, Field(gt=0, le=10_000)]
"""How many of something; a larger number is a typing error that would show after hours."""
MAX_NAME = 100  # bytes of a name; file systems allow 255, and numbers and endings are added


class SettingsError(ValueError):
    """A setting that the user must mend; the message is one line naming the key and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of every component's settings. Values are checked against the fields' types."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", use_enum_values=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )


def build(node: Mapping[str, Any], key: str) -> Any:
    """Build the component that `node["_target_"]` names from the rest of the node.

    Raises SettingsError in one line that names the key below `key` and what to do.
    """
    if not isinstance(node, Mapping):
        raise SettingsError(f"{key}={node}: give the name of an option, or change {key}.KEY=VALUE")
    values = dict(node)
    target = values.pop("_target_", None)
    if target is None:
        raise SettingsError(f"{key}._target_ is missing: it names the class that {key} configures")
    cls = locate(str(target), f"{key}._target_")
    if not (isinstance(cls, type) and issubclass(cls, Settings)):
        raise SettingsError(f"{key}._target_={target}: is no class of settings of lorasweep")
    return build_class(cls, values, key)


def build_class(cls: type, values: Mapping[str, Any], key: str) -> Any:
    """Build `cls` from plain values, as `build` does once the class is known."""
    _refuse_bools(cls, values, key)
    try:
        return _checker(cls).validate_python(dict(values))
    except ValidationError as error:
        raise SettingsError(_explain(error, cls, key)) from None


@cache
def _checker(cls: type) -> TypeAdapter[Any]:
    """A sweep builds each class for each trial."""
    return TypeAdapter(cls)


def name_for_files(name: object, key: str) -> str:
    """The value of `key` as text, if files and folders can be named by it; else SettingsError."""
    text = str(name)
    if name is None or not re.fullmatch(r"[\w-]+", text):
        raise SettingsError(
            f"{key}={shown(text)}: use letters, digits, - and _ only (it names files)"
        )
    if text.startswith("-"):  # a flag to every program that is given the file
        raise SettingsError(f"{key}={shown(text)}: begin with a letter or a digit")
    if len(text.encode()) > MAX_NAME:
        raise SettingsError(f"{key}={text[:20]}…: use at most {MAX_NAME} bytes (it names files)")
    return text


def locate(path: str, key: str) -> Any:
    """The class of a component's name or dotted path; SettingsError names `key` for none.

    A path that is not ours is imported, and importing is to run: only if its module lies in a
    folder that the environment's PYTHONPATH names, so that the person has put it there.
    """
    dotted = dotted_path(path)
    module_name, _, name = dotted.rpartition(".")
    if short_name(path) not in MODULES and not _is_own_code(module_name):
        raise SettingsError(
            f"{key}={shown(path)}: is no class of settings of lorasweep; a class of your own is"
            " MODULE.CLASS, and PYTHONPATH names the folder of its module"
        )
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(
            f"{key}={shown(path)}: {error}; give a component's name or the dotted path of a class"
        ) from None


def _is_own_code(module_name: str) -> bool:
    package = module_name.partition(".")[0]
    folders = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    return package not in ("", "lorasweep") and bool(PathFinder.find_spec(package, folders))


def _refuse_bools(cls: type, values: Mapping[str, Any], key: str) -> None:
    """pydantic takes true for the number 1."""
    kinds = get_type_hints(cls)
    for name, value in values.items():
        kind = kinds.get(name)
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise SettingsError(f"{key}.{name}={str(value).lower()}: must be a number")


def _explain(error: ValidationError, cls: type, key: str) -> str:
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    # a misspelt name says more than that the right one is missing
    first = min(error.errors(), key=lambda one: one["type"] not in unknown)
    where = ".".join([key, *(str(part) for part in first["loc"] if part != cls.__name__)])
    if first["type"] == "value_error":  # raised by a __post_init__, which names its own key
        return str(first["ctx"]["error"])
    if first["type"] in unknown:
        parent = where.rpartition(".")[0]
        return unknown_key(where, [f"{parent}.{name}" for name in _names(cls, first["loc"])])
    if first["type"] in ("missing", "missing_argument"):
        return f"{where} is missing: give it as {where}=VALUE"
    if first["type"] == "sequence_str":
        return f"{where}={first['input']}: give a list, [{first['input']}]"
    if first["type"] in ("too_short", "too_long"):
        return f"{where}={first['input']}: give one number or {_length(first['ctx'])}"
    message = first["msg"].removeprefix("Input ").replace("should be", "must be")
    return f"{where}={first['input']}: {message[0].lower()}{message[1:]}"


def _names(cls: type, loc: Sequence[int | str]) -> list[str]:
    """The settings of the class that `loc` leads to; its last part is the unknown one."""
    for part in loc[:-1]:
        found = get_type_hints(cls).get(str(part))
        nested = [one for one in (found, *get_args(found)) if is_dataclass(one)]
        cls = cast("type", nested[0]) if nested else cls
    return [field.name for field in fields(cls)]


def _length(context: Mapping[str, Any]) -> int:
    """How many values pydantic wants."""
    return int(next(context[name] for name in ("min_length", "max_length") if name in context))


def unknown_key(key: str, known: list[str]) -> str:
    """The one line that refuses a key nobody reads."""
    if (why := WHY_NOT.get(key.rpartition(".")[2])) is not None:
        return f"{key}: there is no such setting: {why}"
    close = meant(key, known)
    parent = key.rpartition(".")[0]
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    there = f"{parent} has" if parent else "there are"
    hint = f"did you mean {close}?" if close else f"{there} {', '.join(sorted(siblings))}"
    return f"{key}: there is no such setting; {hint}"
