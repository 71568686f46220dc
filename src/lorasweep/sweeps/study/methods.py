"""Samplers and pruners by name: Optuna's, and our own where runs in packs need another."""

from __future__ import annotations

import bisect
import inspect
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lorasweep.core.rng import key_seed
from lorasweep.core.settings import SettingsError, unknown_key
from lorasweep.sweeps.study.journal import Journal
from lorasweep.sweeps.study.search_space import Choice, Parameter, Space, rounded
from lorasweep.sweeps.study.study_settings import StudySettings

log = logging.getLogger(__name__)

CURVE = "curve"  # user attribute: epoch -> first objective of the best candidate so far
TERMS = "terms"  # user attribute: epoch -> the terms of the best candidate so far
PRUNED = "pruned"  # user attribute: its run was stopped early, though Optuna may call it complete
ORIGIN = "origin"  # user attribute: why it was asked with given parameters: guess, grid, …
WARM_START = "warm start"  # the origin of another study's trials

# The share of trials that TPE's next are to be like. Optuna's tenth means the best alone in all of
# a short sweep, and finds less where few train at once (benchmarks.search).
_GOOD_SHARE, _MOST_GOOD = 1 / 3, 25
_MOST_LAST = 100  # trials that TPE is fitted to beside the good ones


def was_pruned(trial: FrozenTrial) -> bool:
    """Was its run stopped early? With several objectives Optuna has it as complete."""
    is_marked = bool(trial.user_attrs.get(PRUNED)) and trial.state != TrialState.FAIL
    return is_marked or trial.state == TrialState.PRUNED


class _Best:
    """The best of a study's trials, each ranked once."""

    def __init__(self) -> None:
        self._is_bound = False
        self._known: set[int] = set()
        self._ranked: list[tuple[tuple[float, float, int], FrozenTrial]] = []

    def of(self, trials: Sequence[FrozenTrial], sign: int, *, is_bound: bool) -> list[FrozenTrial]:
        """The best of `trials` by their first value, in their order; `is_bound` by constraints."""
        if is_bound != self._is_bound:
            self._is_bound, self._known, self._ranked = is_bound, set(), []
        new = [trial for trial in trials if trial._trial_id not in self._known and trial.values]
        for trial in new:
            excess = trial.constraints.values() if is_bound else ()
            broken = sum(max(0.0, one) for one in excess)
            rank = (broken, sign * trial.values[0], trial.number)
            bisect.insort(self._ranked, (rank, trial), key=itemgetter(0))
        self._known.update(trial._trial_id for trial in new)
        del self._ranked[_MOST_GOOD:]
        return sorted((trial for _, trial in self._ranked), key=lambda trial: trial.number)


class _View:
    """A study of which a sampler sees some trials only."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _all(self, *, use_cache: bool = False, **options: Any) -> list[FrozenTrial]:
        """Optuna keeps a list of all trials while it asks; the journal has one of those wanted."""
        use_cache = use_cache and not isinstance(self._study._storage, Journal)
        return self._study._get_trials(use_cache=use_cache, **options)


class _Fitted(_View):
    """A study as TPE sees it: its best trials and its last, so that no fit costs more than another.

    In a short study these are all. With several objectives all trials are seen, for there the best
    are as costly to find.
    """

    def __init__(self, study: optuna.Study, best: _Best) -> None:
        super().__init__(study)
        self._best = best

    def _get_trials(self, **options: Any) -> list[FrozenTrial]:
        trials = self._all(**options)
        older, last = trials[:-_MOST_LAST], trials[-_MOST_LAST:]
        if not older or len(self._study.directions) > 1:
            return trials
        sign = 1 if self._study.direction == StudyDirection.MINIMIZE else -1
        is_bound = any(trial.constraints for trial in last)
        best = self._best.of(older, sign, is_bound=is_bound)
        # one that was ranked is among the last again when running ones fail
        return [*(trial for trial in best if trial.number < last[0].number), *last]


class TPE(optuna.samplers.TPESampler):
    """Optuna's, fitted to the best and the last trials."""

    best: _Best

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As Optuna's."""
        seen: Any = _Fitted(study, self.best)
        return super().sample_relative(seen, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """As Optuna's."""
        seen: Any = _Fitted(study, self.best)
        return super().sample_independent(seen, trial, param_name, param_distribution)


class _Newest(_View):
    """A study as a genetic sampler sees it that looks for its newest generation: only that one.

    Generations never fall from a trial to the next, so it ends the list of those that have one.
    """

    def __init__(self, study: optuna.Study, key: str) -> None:
        super().__init__(study)
        self._key = key

    def _get_trials(self, **options: Any) -> list[FrozenTrial]:
        last_first = reversed(self._all(**options))
        known = (trial for trial in last_first if self._key in trial.system_attrs)
        by_generation = groupby(known, key=lambda trial: trial.system_attrs[self._key])
        return next((list(newest) for _, newest in by_generation), [])


class _Genetic:
    """Of Optuna's genetic samplers: finds generations without reading all trials each time."""

    parents: dict[int, list[FrozenTrial]]

    def get_trial_generation(self, study: optuna.Study, trial: FrozenTrial) -> int:
        """As Optuna's."""
        seen = _Newest(study, self._get_generation_key())  # type: ignore[attr-defined]
        return super().get_trial_generation(seen, trial)  # type: ignore[misc]

    def get_parent_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        """As Optuna's."""
        if generation not in self.parents:  # once chosen, they stay
            found = super().get_parent_population(study, generation)  # type: ignore[misc]
            self.parents[generation] = sorted(found, key=lambda trial: trial.number)
        return self.parents[generation]


class NSGAIISampler(_Genetic, optuna.samplers.NSGAIISampler):
    """Optuna's, at a cost that doesn't grow with the trials; its name is part of what is stored."""


class NSGAIIISampler(_Genetic, optuna.samplers.NSGAIIISampler):
    """Likewise."""


SAMPLERS: dict[str, type[BaseSampler]] = {
    "tpe": TPE,
    "gp": optuna.samplers.GPSampler,
    "cmaes": optuna.samplers.CmaEsSampler,
    "random": optuna.samplers.RandomSampler,
    "grid": optuna.samplers.RandomSampler,  # its points are enqueued, see Study
    "qmc": optuna.samplers.QMCSampler,
    "nsgaii": NSGAIISampler,
    "nsgaiii": NSGAIIISampler,
}
_NEEDS = {"cmaes": "cmaes", "gp": "torch"}  # imported by Optuna when it first samples


class Wilcoxon(BasePruner):
    """Prunes a run whose best candidate is worse than the best run's, image by image.

    Both are taken as they were at the same epoch. Their terms of the score (one an image, scored on
    the same noise) are compared by a one-sided Wilcoxon signed-rank test (Wilcoxon, 1945); a
    p-value below `p_threshold` prunes. Optuna's own WilcoxonPruner reads a trial's reports as
    instances, and here they are epochs.
    """

    def __init__(self, *, p_threshold: float = 0.05) -> None:
        if not 0 < p_threshold < 1:
            raise ValueError(f"p_threshold must lie between 0 and 1, got {p_threshold}")
        self.p_threshold = p_threshold
        self._has_warned = False

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Is the trial's best candidate so far surely worse?"""
        from scipy.stats import wilcoxon

        epoch = str(trial.last_step)
        ours = trial.user_attrs.get(TERMS, {}).get(epoch)
        sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
        rivals = [
            (sign * one.values[0], one.user_attrs[TERMS][epoch])
            for one in own_trials(study)
            if one.state == TrialState.COMPLETE
            and one.values
            and epoch in one.user_attrs.get(TERMS, {})
        ]
        self._warn_of_few(len(ours or ()))
        if not ours or not rivals:
            return False
        best = min(rivals, key=lambda rival: rival[0])[1]
        worse = [sign * (a - b) for a, b in zip(ours, best, strict=False)]
        if len(ours) != len(best) or not any(worse):
            return False
        return bool(wilcoxon(worse, alternative="greater").pvalue < self.p_threshold)

    def _warn_of_few(self, count: int) -> None:
        """The smallest p-value is that of being worse on each of the images: 2 ** -count."""
        if count and 0.5**count >= self.p_threshold and not self._has_warned:
            self._has_warned = True
            log.warning(
                "study.pruner=wilcoxon never prunes with %d held-out images: its p-value is at"
                " least %.3g, and p_threshold %.3g; give dataset.num_holdout more",
                *(count, 0.5**count, self.p_threshold),
            )


class SuccessiveHalving(BasePruner):
    """Keeps the best 1 / `reduction_factor` of the runs at each rung, without waiting for the rest.

    Rungs lie at `min_resource` epochs, `reduction_factor` times as many, and so on. A run is
    compared with all that have come so far when it reaches one (ASHA, arXiv 1810.05934). Optuna's
    own compares with those that were judged before only, so that of a pack whose runs reach a rung
    together, the first is always kept.
    """

    def __init__(self, *, min_resource: int = 1, reduction_factor: int = 4) -> None:
        if min_resource < 1 or reduction_factor < 2:
            raise ValueError("min_resource must be at least 1 and reduction_factor at least 2")
        self.min_resource, self.reduction_factor = min_resource, reduction_factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Has the trial reached a rung, and is it not among the best there?"""
        epoch = trial.last_step
        if epoch is None or not self._is_rung(epoch):
            return False
        sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
        values = sorted(
            sign * one.intermediate_values[epoch]
            for one in own_trials(study)
            if epoch in one.intermediate_values
        )
        kept = max(1, len(values) // self.reduction_factor)
        return sign * trial.intermediate_values[epoch] > values[kept - 1]

    def _is_rung(self, epoch: int) -> bool:
        rung = self.min_resource
        while rung < epoch:
            rung *= self.reduction_factor
        return rung == epoch


class Patient(BasePruner):
    """Stops a run whose best candidate has not improved for `patience` epochs: it overfits.

    Optuna's own looks for values that get worse, and a best candidate's never does.
    """

    def __init__(self, *, patience: int = 5, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0:
            raise ValueError("patience must be at least 1 and min_delta at least 0")
        self.patience, self.min_delta = patience, min_delta

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Has nothing improved since `patience` epochs ago?"""
        curve, epoch = trial.intermediate_values, trial.last_step
        if epoch is None or epoch - self.patience not in curve:
            return False
        return abs(curve[epoch - self.patience] - curve[epoch]) <= self.min_delta


PRUNERS: dict[str, type[BasePruner]] = {
    "median": optuna.pruners.MedianPruner,
    "percentile": optuna.pruners.PercentilePruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "asha": SuccessiveHalving,
    "wilcoxon": Wilcoxon,
    "patient": Patient,
    "none": optuna.pruners.NopPruner,
}


def own_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Without those of a warm start, whose scores are of other images."""
    found = study.get_trials(deepcopy=False)
    return [trial for trial in found if trial.user_attrs.get(ORIGIN) != WARM_START]


def make_sampler(
    settings: StudySettings, space: Space, number: int, first: BaseSampler | None = None
) -> BaseSampler:
    """The sampler of the trial `number`, with randomness of its own: a resumed sweep goes on alike.

    `first` is another one of the same study and tells what is searched: it reads only the trials
    that have come since, where each anew would read all. Raises SettingsError for an option that
    the sampler doesn't have.
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
    if settings.sampler == "cmaes":  # else it learns from the few that are left
        own["consider_pruned_trials"] = settings.pruner != "none"
    made = _make(kind, "sampler", settings.sampler, own, settings, options)
    if isinstance(made, TPE):
        made.best = first.best if isinstance(first, TPE) else _Best()
    if isinstance(made, _Genetic):
        made.parents = first.parents if isinstance(first, _Genetic) else {}
    is_its_own = settings.sampler == "qmc" or {**own, **options}.get("group")
    if first is not None and not is_its_own:
        made.infer_relative_search_space = first.infer_relative_search_space
    sampler: BaseSampler = made
    return sampler


def _num_good(share: float, num_trials: int) -> int:
    return max(1, min(math.ceil(share * num_trials), _MOST_GOOD))


def make_pruner(settings: StudySettings, max_epochs: int) -> BasePruner:
    """The pruner for runs of at most `max_epochs`. Raises SettingsError as `make_sampler`."""
    kind = PRUNERS[settings.pruner]
    own: dict[str, Any] = {}
    if settings.pruner == "hyperband":
        own = {"max_resource": max_epochs}
    if settings.pruner == "asha":
        own = {"min_resource": settings.min_epochs}
    if settings.pruner in ("median", "percentile"):  # runs of ours; a warm start's don't count
        startup = settings.pruner_options.get("n_startup_trials", settings.startup_trials)
        own = {"n_min_trials": max(1, startup)} if isinstance(startup, int) else {}
    if settings.pruner == "percentile":
        own["percentile"] = 25.0
    return _make(kind, "pruner", settings.pruner, own, settings, settings.pruner_options)


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


def _make(
    kind: type[Any],
    what: str,
    name: str,
    own: Mapping[str, Any],
    settings: StudySettings,
    options: Mapping[str, Any],
) -> Any:
    """Build it from what we set, `startup_trials` where it takes such, and the user's options."""
    where = f"study.{what}_options"
    known = [key for key in inspect.signature(kind).parameters if key != "study"]
    for key in options:
        if key not in known:
            raise SettingsError(unknown_key(f"{where}.{key}", [f"{where}.{one}" for one in known]))
    startup = {"n_startup_trials": settings.startup_trials}
    ours = {key: value for key, value in {**startup, **own}.items() if key in known}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a method is experimental
            return kind(**{**ours, **options})
    except (TypeError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingsError(f"{where} of {name}: {reason}") from None


def check_installed(settings: StudySettings) -> None:
    """Raise SettingsError if a package that only this sampler needs is missing."""
    from importlib.util import find_spec

    package = _NEEDS.get(settings.sampler)
    if package is not None and find_spec(package) is None:
        raise SettingsError(
            f"study.sampler={settings.sampler} needs {package}: pip install 'lorasweep[samplers]'"
        )


def importance(study: optuna.Study, names: Sequence[str]) -> dict[str, float]:
    """How much each parameter matters for the score (PED-ANOVA, Watanabe et al., 2023)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(study, params=list(names) or None)
    return {name: value for name, value in found.items() if value == value}
