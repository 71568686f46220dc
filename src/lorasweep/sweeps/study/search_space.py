"""What a sweep searches: parameters, and those that exist only where another has a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import TypeGuard

from lorasweep.core.settings import SettingsError

Value = str | int | float | bool | None
"""What Optuna keeps of a parameter."""

_MOST_POINTS = 10_000  # to be counted
_UNEVEN = 3.0  # times the smallest gap: values further apart from another are just names

Params = Mapping[str, Value]
"""Parameter to value, for the parameters that a trial has."""


@dataclass(frozen=True)
class Choice:
    """One of some values. `texts` are the values in Hydra's grammar, for overrides."""

    key: str
    values: tuple[Value, ...]
    texts: tuple[str, ...]

    def text(self, value: Value) -> str:
        """The value as an override says it."""
        return self.texts[_index(self.values, value)]

    def fits(self, value: object) -> bool:
        """Is it one of the values? 8 and 8.0 are the same, 1 and true are not."""
        return any(_same(value, one) for one in self.values)

    def points(self) -> tuple[Value, ...] | None:
        """All values that a grid has."""
        return self.values

    def probes(self) -> tuple[Value, ...]:
        """Values to compose before any work, for what is wrong with them."""
        return self.values

    @cached_property
    def interval(self) -> Number | None:
        """Where the values are numbers, evenly spread: the interval that they stand for.

        It goes half a gap beyond both ends, so that each value is the nearest to an equal part.
        """
        numbers = sorted(one for one in self.values if _is_number(one))
        if len(set(numbers)) < max(2, len(self.values)):
            return None
        by_log = _unevenness([math.log(one) for one in numbers]) if numbers[0] > 0 else math.inf
        is_log = by_log <= _unevenness(numbers)
        if min(by_log, _unevenness(numbers)) > _UNEVEN:
            return None
        (low, second), (last, high) = numbers[:2], numbers[-2:]
        ends = (
            (low * math.sqrt(low / second), high * math.sqrt(high / last))
            if is_log
            else (low - (second - low) / 2, high + (high - last) / 2)
        )
        if all(isinstance(one, int) for one in numbers):
            return Number(self.key, min(low, math.ceil(ends[0])), math.floor(ends[1]), is_log)
        return Number(self.key, float(ends[0]), float(ends[1]), is_log)

    def nearest(self, number: float) -> Value:
        """The value that a number of the interval stands for."""
        assert self.interval is not None
        place = math.log if self.interval.log else float
        return min(self.values, key=lambda one: abs(place(one) - place(number)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`, both included; whole ones if both are `int`."""

    key: str
    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    def __post_init__(self) -> None:
        name = self.key.lstrip("+")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise SettingsError(f"{name}: from {self.low} to {self.high} there is nothing between")
        if self.log and self.low <= 0:
            raise SettingsError(f"{name}: tag(log, …) needs bounds above 0, not {self.low}")

    @property
    def integer(self) -> bool:
        """Are only whole numbers meant?"""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def text(self, value: Value) -> str:
        """The value as an override says it."""
        return repr(value)

    def fits(self, value: object) -> bool:
        """Does the value lie between the bounds, on a step?"""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if self.integer and value != int(value):
            return False
        steps = (value - self.low) / self.step if self.step else 0.0
        return self.low <= value <= self.high and abs(steps - round(steps)) < 1e-6

    def points(self) -> tuple[Value, ...] | None:
        """All values that a grid has; None for an interval of other than few whole numbers."""
        if self.low == self.high:
            return (self.low,)
        step = self.step or (1 if self.integer else None)
        if step is None or (self.step is None and self.high - self.low >= _MOST_POINTS):
            return None
        count = round((self.high - self.low) / step) + 1
        return tuple(self._rounded(self.low + number * step) for number in range(count))

    def nearest(self, number: int | float) -> int | float:
        """The value that a number means: whole, or on its step, as `points` has it."""
        if self.integer:
            return int(number)
        if self.step is None:
            return float(number)
        return self._rounded(self.low + round((number - self.low) / self.step) * self.step)

    def probes(self) -> tuple[Value, ...]:
        """Values to compose before any work, for what is wrong with them."""
        return (self.low, self.high)

    def _rounded(self, value: int | float) -> int | float:
        return value if self.integer else rounded(value)


Parameter = Choice | Number


@dataclass(frozen=True)
class Condition:
    """A parameter exists where another one, `parent`, has one of these values."""

    parent: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Space:
    """All parameters by name, parents before those that depend on them."""

    parameters: Mapping[str, Parameter]
    conditions: Mapping[str, Condition]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for name in self.parameters:
            if name in self.conditions:
                self._check(name, self.conditions[name], seen)
            seen.add(name)
        for name in self.conditions:
            if name not in self.parameters:
                raise SettingsError(
                    f"study.conditions.{name}: no such parameter is searched;"
                    f" study.params has {', '.join(self.parameters)}"
                )

    def ask(self, suggest: Callable[[str, Parameter], Value]) -> dict[str, Value]:
        """A value for each parameter that exists, given those before it."""
        params: dict[str, Value] = {}
        for name, parameter in self.parameters.items():
            if self._exists(name, params):
                params[name] = suggest(name, parameter)
        return params

    def overrides(self, params: Params) -> list[str]:
        """The parameters as Hydra's overrides, in the space's order."""
        return [
            f"{parameter.key}={parameter.text(params[name])}"
            for name, parameter in self.parameters.items()
            if name in params
        ]

    def inside(self, params: Mapping[str, object]) -> dict[str, Value]:
        """Of some values, those that the space has."""
        return self._kept({k: v for k, v in params.items() if k in self.parameters})

    def holds(self, params: Mapping[str, object]) -> bool:
        """Are they a whole point of the space?"""
        kept = self.inside(params)
        asked = self.ask(lambda name, _: kept.get(name))
        return len(kept) == len(params) and kept.keys() == asked.keys()

    def grid(self) -> list[dict[str, Value]]:
        """Every point, each once. Raises SettingsError where a parameter is an interval."""
        axes = [self._points(name) for name in self.parameters]
        points = (dict(zip(self.parameters, values, strict=True)) for values in product(*axes))
        kept = [self.ask(lambda name, _, point=point: point[name]) for point in points]  # type: ignore[misc]
        return list({repr(one): one for one in kept}.values())  # without the unused ones: repeats

    def count(self) -> int | None:
        """How many points there are, if that can be told and matters: up to `_MOST_POINTS`."""
        axes = [one.points() for one in self.parameters.values()]
        sizes = [len(axis) for axis in axes if axis is not None]
        if len(sizes) < len(axes) or math.prod(sizes) > _MOST_POINTS:
            return None
        return len(self.grid())

    def probes(self) -> Iterator[dict[str, Value]]:
        """Points that together have each parameter's probes, few of them."""
        rounds = max((len(p.probes()) for p in self.parameters.values()), default=0)
        for number in range(rounds):
            yield self.ask(lambda _, parameter: _turn(parameter, number))  # noqa: B023
        for name, condition in self.conditions.items():
            for value in self.parameters[name].probes():
                yield self._forced(name, value, condition)

    def _forced(self, name: str, value: Value, condition: Condition) -> dict[str, Value]:
        """A point where the conditional parameter exists and has this value."""
        forced = {name: value}
        while True:
            forced[condition.parent] = self._value_of(condition)
            if condition.parent not in self.conditions:
                break
            condition = self.conditions[condition.parent]
        return self.ask(lambda key, parameter: forced.get(key, parameter.probes()[0]))

    def _value_of(self, condition: Condition) -> Value:
        parent = self.parameters[condition.parent]
        return next(one for one in parent.probes() if parent.text(one) in condition.texts)

    def _check(self, name: str, condition: Condition, seen: set[str]) -> None:
        if condition.parent not in seen:
            raise SettingsError(
                f"study.conditions.{name}: {condition.parent} must be a parameter of study.params"
                f" that comes before {name}"
            )
        parent = self.parameters[condition.parent]
        known = parent.texts if isinstance(parent, Choice) else ()
        unknown = [text for text in condition.texts if text not in known]
        if unknown:
            raise SettingsError(
                f"study.conditions.{name}: {condition.parent} is never {unknown[0]}; its choices"
                f" are {', '.join(known) or 'none: only a choice(…) can be a condition'}"
            )

    def _exists(self, name: str, params: Params) -> bool:
        condition = self.conditions.get(name)
        if condition is None:
            return True
        parent = self.parameters[condition.parent]
        if condition.parent not in params:
            return False
        value = params[condition.parent]
        return parent.fits(value) and parent.text(value) in condition.texts

    def _kept(self, params: Mapping[str, object]) -> dict[str, Value]:
        kept: dict[str, Value] = {}
        for name, parameter in self.parameters.items():
            if name in params and parameter.fits(params[name]) and self._may_exist(name, kept):
                kept[name] = _own(parameter, params[name])
        return kept

    def _may_exist(self, name: str, kept: Params) -> bool:
        condition = self.conditions.get(name)
        return condition is None or condition.parent not in kept or self._exists(name, kept)

    def _points(self, name: str) -> Sequence[Value]:
        points = self.parameters[name].points()
        if points is None:
            raise SettingsError(
                f"study.params.{name}: study.sampler=grid needs choice(…), range(…) or an interval"
                f" of at most {_MOST_POINTS:,} whole numbers; or choose another sampler"
            )
        return points


def _turn(parameter: Parameter, number: int) -> Value:
    probes = parameter.probes()
    return probes[number % len(probes)]


def _own(parameter: Parameter, value: object) -> Value:
    """The value as the parameter has it: 8 for 8.0 where whole numbers are meant."""
    if isinstance(parameter, Choice):
        return parameter.values[_index(parameter.values, value)]
    assert isinstance(value, int | float)
    return parameter.nearest(value)


def rounded(value: float) -> float:
    """Without what adding steps leaves at its end: 0.1 + 2 * 0.1 is 0.3."""
    return float(f"{value:.12g}")


def _is_number(value: Value) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unevenness(numbers: Sequence[float]) -> float:
    """The largest gap over the smallest."""
    gaps = [after - before for before, after in pairwise(numbers)]
    return max(gaps) / min(gaps)


def _index(values: Sequence[Value], value: object) -> int:
    return next(number for number, one in enumerate(values) if _same(one, value))


def _same(a: object, b: object) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)
