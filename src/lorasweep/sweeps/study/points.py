"""Whole points of a search space, none of them twice: a run follows from its settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from lorasweep.sweeps.study.methods import distribution
from lorasweep.sweeps.study.search_space import Choice, Number, Parameter, Params, Space, Value

_DRAWS = 10  # of the sampler itself: one that has made up its mind says the same each time
_RANDOM_DRAWS = 1000


def point_key(params: Params) -> str:
    """A point, to be looked up."""
    return json.dumps(dict(sorted(params.items())))


class PointSampler(BaseSampler):
    """Another sampler, asked for whole points until one is new; if it has none, chance decides.

    Optuna's samplers name points of small spaces again and again, and a run that was trained comes
    to the same a second time. A number that the sampler names for a choice between numbers becomes
    the nearest of them.
    """

    def __init__(
        self, sampler: BaseSampler, space: Space, is_tried: Callable[[str], bool], seed: int
    ) -> None:
        """`is_tried` says of a point's `point_key` whether an earlier trial has it."""
        self._sampler, self._space, self._is_tried = sampler, space, is_tried
        self._chance = RandomSampler(seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All of it."""
        return {name: distribution(one) for name, one in self._space.parameters.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A whole point, with what was given to the trial when it was enqueued."""
        point: dict[str, Value] = {}
        for sampler in [self._sampler] * _DRAWS + [self._chance] * _RANDOM_DRAWS:
            point = self._draw(sampler, study, trial)
            if not self._is_tried(point_key(point)):
                break
        return point

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """What the other sampler says."""
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Let both draw anew."""
        self._sampler.reseed_rng()
        self._chance.reseed_rng()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """What the other sampler does."""
        self._sampler.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        """What the other sampler does."""
        self._sampler.after_trial(study, trial, state, values)

    def _draw(
        self, sampler: BaseSampler, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, Value]:
        known = sampler.infer_relative_search_space(study, trial)
        together = sampler.sample_relative(study, trial, known)
        given = trial.system_attrs.get("fixed_params", {})

        def value(name: str, parameter: Parameter) -> Value:
            kind = distribution(parameter)
            if name in given or kind.single():
                found: Value = given.get(name, parameter.probes()[0])
            elif name in together:
                found = together[name]
            else:
                found = sampler.sample_independent(study, trial, name, kind)
            if isinstance(parameter, Choice) and parameter.interval is not None:
                assert isinstance(found, int | float)
                return parameter.nearest(found)
            if isinstance(parameter, Number):  # a step's sums end in 0.30000000000000004
                assert isinstance(found, int | float)
                return parameter.nearest(found)
            return found

        return self._space.ask(value)
