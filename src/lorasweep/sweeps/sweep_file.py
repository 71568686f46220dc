"""From a sweep's YAML and command line to its settings and search space, in Hydra's grammar."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lorasweep.config.foreign_settings import check_searched
from lorasweep.core.settings import SettingsError, build
from lorasweep.sweeps.study.search_space import Choice, Condition, Number, Parameter, Space, Value
from lorasweep.sweeps.study.study_settings import StudySettings

# null in conf/, for Hydra lets a command line replace null by a mapping, and nothing else
_MAPS = ("conditions", "vars", "sampler_options", "pruner_options", "constraints")


@dataclass(frozen=True)
class Search:
    """What a sweep varies, what it holds fixed, and what it tries first."""

    space: Space
    fixed: Sequence[str]
    """The command line's overrides that every job gets."""
    guesses: Sequence[Mapping[str, Any]]
    """First what would train without a sweep, as far as the space has it; then study.enqueue."""


def read_search(config: DictConfig, config_loader: Any, arguments: Sequence[str]) -> Search:
    """Read `study.params` and the command line, which wins: a plain value there is not searched.

    Raises SettingsError for what can't be searched, or if nothing is.
    """
    swept, fixed, plain = _split(config_loader, arguments)
    lines = _file_params(config)
    check_searched(lines, config.hydra)
    parsed = _parsed(config_loader, lines)
    in_file = {_name(one): _parameter(one) for one in parsed}
    asked = {_name(one): _parameter(one) for one in swept}
    conditions = {
        name: _condition(name, str(text))
        for name, text in (_plain(config.study.conditions) or {}).items()
    }
    space = _space(in_file, asked, plain, conditions)
    if not space.parameters:
        raise SettingsError(
            "there is nothing to search: give study.params in a sweep's file, or a range on the"
            " command line, e.g. 'adapter.rank=choice(4,8,16)'"
        )
    chosen = _chosen(config, config_loader, fixed)
    guesses = [_composed(config, space, chosen), *_enqueued(config, space, {**asked, **in_file})]
    return Search(space, fixed, guesses)


def read_study_settings(config: DictConfig, overrides: Sequence[str] = ()) -> StudySettings:
    """The typed settings of `study`. Raises SettingsError.

    A sampler or pruner that the command's overrides name has the options that they give: those of
    the sweep's file are another's.
    """
    values = OmegaConf.to_container(config.study, resolve=True)
    assert isinstance(values, dict)
    given = {str(key): value for key, value in values.items()}
    keys = [one.lstrip("+").partition("=")[0] for one in overrides]
    for what in ("sampler", "pruner"):
        options = given.get(f"{what}_options") or {}
        if f"study.{what}" in keys and f"study.{what}_options" not in keys:
            own = {k: v for k, v in options.items() if f"study.{what}_options.{k}" in keys}
            given[f"{what}_options"] = own
    empty: dict[str, object] = {key: {} for key in _MAPS if given.get(key) is None}
    settings: StudySettings = build({**given, **empty}, "study")
    return settings


def _space(
    in_file: Mapping[str, Parameter],
    asked: Mapping[str, Parameter],
    plain: Mapping[str, str],
    conditions: Mapping[str, Condition],
) -> Space:
    """What is searched when the command line asks for parameters, and gives others plain values.

    Of a condition stays what the parent can still be. Without any of it, its parameter is searched
    no more, unless the command line itself asks for it.
    """
    own = {
        name: one
        for name, one in conditions.items()
        if name in in_file and one.parent in in_file.keys() - asked.keys()
    }
    Space(in_file, own)  # raises for what is wrong in the file, whatever the command line leaves
    found = {name: one for name, one in in_file.items() if name not in plain} | {**asked}
    left = {name: one for name, one in conditions.items() if name not in plain}
    for name in list(found):  # parents come first
        parent = left[name].parent if name in left else ""
        was, now = in_file.get(parent), found.get(parent)
        if not isinstance(was, Choice) or isinstance(now, Number):
            continue
        has = now.texts if now is not None else (plain.get(parent),)
        texts = tuple(one for one in left[name].texts if one in has or one not in was.texts)
        if now is not None and texts:
            left[name] = Condition(parent, texts)
            continue
        del left[name]
        if not texts and name not in asked:
            del found[name]
    return Space(found, left)


def _split(loader: Any, arguments: Sequence[str]) -> tuple[list[Any], list[str], dict[str, str]]:
    """Overrides that sweep, those that don't, and the latter's values by their names."""
    swept, fixed, plain = [], [], {}
    for override in _parsed(loader, arguments):
        if override.is_sweep_override():
            swept.append(override)
        else:
            fixed.append(str(override.input_line))
            plain[_name(override)] = override.get_value_element_as_str()
    return swept, fixed, plain


def _parsed(loader: Any, lines: Sequence[str]) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return list(OverridesParser.create(config_loader=loader).parse_overrides(list(lines)))


def _file_params(config: DictConfig) -> list[str]:
    return [f"{name}={_line(value)}" for name, value in _plain(config.study.params).items()]


def _line(value: Any) -> str:
    """A YAML value in Hydra's grammar: a list is a choice, as [4, 8] can't mean else here."""
    from hydra.core.override_parser.types import Transformer

    if isinstance(value, list):
        return f"choice({','.join(Transformer.str(one) for one in value)})"
    return value if isinstance(value, str) else Transformer.str(value)


def _name(override: Any) -> str:
    return str(override.get_key_element()).lstrip("+~")


def _parameter(override: Any) -> Parameter:
    name, key = _name(override), override.get_key_element()
    _check_tags(name, override)
    if override.is_choice_sweep():
        texts = tuple(str(text) for text in override.sweep_string_iterator())
        return Choice(key, tuple(_values(override, texts)), texts)
    if override.is_range_sweep():
        return _range(name, key, sorted(override.sweep_iterator()))
    if override.is_interval_sweep():
        interval = override.value()
        return Number(key, interval.start, interval.end, log="log" in interval.tags)
    raise SettingsError(
        f"study.params.{name}={override.input_line.partition('=')[2]}: give choice(…), range(…)"
        " or interval(…); a fixed value belongs outside of study.params"
    )


def _values(override: Any, texts: Sequence[str]) -> Iterator[Value]:
    """What Optuna keeps: plain values; of lists and the like, their text."""
    for value, text in zip(override.sweep_iterator(), texts, strict=True):
        value = getattr(value, "text", value)  # what was quoted
        plain = value is None or isinstance(value, str | int | float | bool)
        yield value if plain else text


def _range(name: str, key: str, points: Sequence[int | float]) -> Parameter:
    if not points:
        raise SettingsError(f"study.params.{name}: the range is empty")
    step = points[1] - points[0] if len(points) > 1 else 1
    return Number(key, points[0], points[-1], step=step)


def _check_tags(name: str, override: Any) -> None:
    tags: set[str] = getattr(override.value(), "tags", set())
    if unknown := sorted(tags - {"log"}):
        raise SettingsError(f"study.params.{name}: tag {unknown[0]} is unknown; there is only log")
    if tags and not override.is_interval_sweep():
        raise SettingsError(
            f"study.params.{name}: tag log belongs to interval(…); leave it out, or give"
            " tag(log,interval(LOW,HIGH))"
        )


def _condition(name: str, text: str) -> Condition:
    parent, equals, values = text.partition("=")
    if not equals or not values:
        raise SettingsError(
            f"study.conditions.{name}={text}: give the parameter and its values, e.g. adapter=locon"
        )
    texts = re.split(r",(?![^\[]*\])", values.replace(" ", ""))  # not within a list
    return Condition(parent.strip(), tuple(texts))


def _composed(config: DictConfig, space: Space, chosen: Mapping[str, Any]) -> dict[str, Value]:
    """The values that a run without the sweep has, where the space holds them."""
    found: dict[str, object] = {}
    for name, parameter in space.parameters.items():
        value = chosen[name] if name in chosen else OmegaConf.select(config, name)
        found[name] = _comparable(value, parameter)
    return space.inside(found)


def _chosen(config: DictConfig, loader: Any, fixed: Sequence[str]) -> dict[str, Any]:
    """Group to option, or to several options: groups that Hydra's own `choices` leave out."""
    from hydra.types import RunMode

    overrides = [*config.hydra.overrides.hydra, *fixed]
    name = config.hydra.job.config_name
    options: dict[str, list[str]] = {}
    for one in loader.compute_defaults_list(name, overrides, RunMode.MULTIRUN).defaults:
        group, _, option = one.config_path.rpartition("/")
        options.setdefault(group, []).append(option)
    return {**options, **config.hydra.runtime.choices}


def _enqueued(
    config: DictConfig, space: Space, known: Mapping[str, Parameter]
) -> Iterator[dict[str, Value]]:
    """The points to try first, without what the command line leaves out of the file's `known`."""
    given = config.study.enqueue
    guesses = _plain(given) if OmegaConf.is_list(given) else []
    if (given and not guesses) or not all(isinstance(one, dict) for one in guesses):
        raise SettingsError(f"study.enqueue={given}: give a list of points, [{{adapter.rank: 8}}]")
    for number, guess in enumerate(guesses):
        found: dict[str, object] = {}
        for name, value in guess.items():
            if name not in known:
                raise SettingsError(
                    f"study.enqueue[{number}].{name}: no such parameter is searched;"
                    f" study.params has {', '.join(space.parameters)}"
                )
            now = space.parameters.get(name)
            if now is None:
                continue
            value = _comparable(value, now)
            if now.fits(value) or not known[name].fits(value):
                found[name] = value
        inside = space.inside(found)
        for name in found.keys() - inside.keys():
            raise SettingsError(
                f"study.enqueue[{number}].{name}={found[name]}: study.params.{name} has no such"
                " value, or study.conditions exclude it here"
            )
        yield inside


def _comparable(value: Any, parameter: Parameter) -> object:
    """A composed value as the parameter's values are kept."""
    from hydra.core.override_parser.types import Transformer

    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(parameter, Choice) and isinstance(value, list | dict):
        return Transformer.str(value)  # type: ignore[arg-type]
    return value


def _plain(node: Any) -> Any:
    """As plain values; null stays null."""
    return OmegaConf.to_container(node, resolve=True) if node is not None else None
