"""Samplers by name, all of them Optuna's, and what makes them name whole points, none twice."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from lorasweep.core.rng import key_seed
from lorasweep.core.settings import SettingsError
from lorasweep.sweeps.study.cmaes_state import load_states_only
from lorasweep.sweeps.study.optuna_options import build_from_options
from lorasweep.sweeps.study.search_space import Choice, Parameter, Params, Space, Value, rounded
from lorasweep.sweeps.study.study_settings import StudySettings
from lorasweep.sweeps.study.trial_attributes import GIVEN

SAMPLERS: dict[str, type[BaseSampler]] = {
    "tpe": optuna.samplers.TPESampler,
    "gp": optuna.samplers.GPSampler,
    "cmaes": optuna.samplers.CmaEsSampler,
    "random": RandomSampler,
    "grid": RandomSampler,  # its points are enqueued, see Study
    "qmc": optuna.samplers.QMCSampler,
    "nsgaii": optuna.samplers.NSGAIISampler,
    "nsgaiii": optuna.samplers.NSGAIIISampler,
}
_NEEDS = {"cmaes": "cmaes", "gp": "torch"}  # imported by Optuna when it first samples

# The share of trials that TPE's next are to be like. Optuna's tenth means the best alone in all of
# a short sweep, and finds less where few train at once (benchmarks.search).
_GOOD_SHARE, _MOST_GOOD = 1 / 3, 25

_DRAWS = 10  # of the sampler itself: one that has made up its mind says the same each time
_RANDOM_DRAWS = 1000


def make_sampler(settings: StudySettings, space: Space, number: int) -> BaseSampler:
    """The sampler of the trial `number`, with its own seed: a resumed sweep draws the same.

    Raises SettingsError for an option that the sampler doesn't have.
    """
    own: dict[str, Any] = {"seed": key_seed(settings.seed, "sampler", number) % 2**31}
    if settings.sampler == "qmc":  # one scrambled sequence for all trials
        own = {"seed": settings.seed, "scramble": True, "warn_asynchronous_seeding": False}
    kind = SAMPLERS[settings.sampler]
    if "warn_independent_sampling" in inspect.signature(kind).parameters:
        own["warn_independent_sampling"] = False  # nearly each trial, of what a method can't model
    options = dict(settings.sampler_options)
    if settings.sampler == "tpe":
        if space.conditions:  # parameters that only some trials have
            own["group"] = own["multivariate"] = True
        own["gamma"] = partial(_num_good, options.pop("gamma", _GOOD_SHARE))
    if settings.sampler == "cmaes":
        load_states_only()
        # else it learns from the few that are left
        own["consider_pruned_trials"] = settings.pruner != "none"
    sampler: BaseSampler = build_from_options(kind, "sampler", settings, own, options)
    return sampler


def _num_good(share: float, num_trials: int) -> int:
    return max(1, min(math.ceil(share * num_trials), _MOST_GOOD))


def check_installed(settings: StudySettings) -> None:
    """Raise SettingsError if a package that only this sampler needs is missing."""
    from importlib.util import find_spec

    package = _NEEDS.get(settings.sampler)
    if package is not None and find_spec(package) is None:
        raise SettingsError(
            f"study.sampler={settings.sampler} needs {package}: pip install 'lorasweep[samplers]'"
        )


class PointSampler(BaseSampler):
    """The study's sampler, asked for whole points until one is new; if it has none, chance decides.

    Optuna's samplers name points of small spaces again and again, and a run that was trained comes
    to the same a second time. A number that the sampler names for a choice between numbers becomes
    the nearest of them.
    """

    def __init__(
        self, settings: StudySettings, space: Space, tried: Callable[[int], Collection[str]]
    ) -> None:
        """`tried` gives the `point_key` of each trial before that of a number.

        Raises SettingsError for an option that the study's sampler doesn't have.
        """
        self._settings, self._space, self._tried = settings, space, tried
        self._sampler = make_sampler(settings, space, 0)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Take the sampler of this trial."""
        self._sampler = make_sampler(self._settings, self._space, trial.number)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All of it."""
        return {name: distribution(one) for name, one in self._space.parameters.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A whole point, with the parameters that the trial was given."""
        chance = RandomSampler(key_seed(self._settings.seed, "points", trial.number) % 2**31)
        tried = self._tried(trial.number)
        point: dict[str, Value] = {}
        for sampler in [self._sampler] * _DRAWS + [chance] * _RANDOM_DRAWS:
            point = self._draw(sampler, study, trial)
            if point_key(point) not in tried:
                break
        return point

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """What the study's sampler says."""
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        """What the study's sampler does."""
        self._sampler.after_trial(study, trial, state, values)

    def _draw(
        self, sampler: BaseSampler, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, Value]:
        known = sampler.infer_relative_search_space(study, trial)
        together = sampler.sample_relative(study, trial, known)
        given = trial.user_attrs.get(GIVEN, {})

        def value(name: str, parameter: Parameter) -> Value:
            kind = distribution(parameter)
            if name in given or kind.single():
                found: Value = given.get(name, parameter.probes()[0])
            elif name in together:
                found = together[name]
            else:
                found = sampler.sample_independent(study, trial, name, kind)
            if isinstance(parameter, Choice) and parameter.interval is None:
                return found
            assert isinstance(found, int | float)
            return parameter.nearest(found)  # a step's sums end in 0.30000000000000004

        return self._space.ask(value)


def point_key(params: Params) -> str:
    """A point, to be looked up."""
    return json.dumps(dict(sorted(params.items())))


def distribution(parameter: Parameter) -> BaseDistribution:
    """Optuna's form of a parameter. Of choices between numbers it is told which are near."""
    if isinstance(parameter, Choice):
        if parameter.interval is None:
            return CategoricalDistribution(parameter.values)
        parameter = parameter.interval
    if parameter.integer:
        step = int(parameter.step or 1)
        return IntDistribution(int(parameter.low), int(parameter.high), parameter.log, step)
    if parameter.step is None:
        return FloatDistribution(parameter.low, parameter.high, parameter.log)
    low, high, step_size = map(rounded, (parameter.low, parameter.high, parameter.step))
    return FloatDistribution(low, high, step=step_size)
