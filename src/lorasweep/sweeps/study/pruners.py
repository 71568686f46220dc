"""Pruners by name: Optuna's, and our own where packs or scores in pairs need another."""

from __future__ import annotations

import logging
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lorasweep.sweeps.study.optuna_options import build_from_options
from lorasweep.sweeps.study.study_settings import StudySettings
from lorasweep.sweeps.study.trial_attributes import (
    CURVE,
    ORIGIN,
    PRUNER_NOTES,
    TERMS,
    own_trials,
    was_pruned,
)

log = logging.getLogger(__name__)


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
    pruner: BasePruner = build_from_options(kind, "pruner", settings, own, settings.pruner_options)
    return pruner


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


class FirstObjective:
    """A study of several objectives, pruned by the first of them.

    Optuna prunes with one objective only, so for each decision its pruner is shown a copy of the
    study in memory that has just this one.
    """

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._ended: dict[int, FrozenTrial] = {}  # as the copy has them: they can't change

    def should_prune(self, trial: optuna.Trial) -> bool:
        """Ask the study's pruner about a trial, and keep what it notes of the trial."""
        directions, number = self._study.directions, trial.number
        copy = optuna.create_study(direction=directions[0], study_name=self._study.study_name)
        copy.add_trials(map(self._with_first, self._study.get_trials(deepcopy=False)))
        before = copy.get_trials(deepcopy=False)[number]
        decision = self._study.pruner.prune(copy, before)
        notes = copy.get_trials(deepcopy=False)[number].system_attrs
        if notes.keys() != before.system_attrs.keys():  # Hyperband's
            trial.set_user_attr(PRUNER_NOTES, dict(notes))
        return decision

    def _with_first(self, trial: FrozenTrial) -> FrozenTrial:
        """The trial as if the first objective were the only one."""
        if trial.number in self._ended:
            return self._ended[trial.number]
        attrs, is_finished = trial.user_attrs, trial.state.is_finished()
        state = TrialState.PRUNED if is_finished and was_pruned(trial) else trial.state
        shown = optuna.trial.create_trial(
            state=state,
            value=trial.values[0] if state == TrialState.COMPLETE else None,
            intermediate_values={int(k): value for k, value in attrs.get(CURVE, {}).items()},
            user_attrs={key: attrs[key] for key in (ORIGIN, TERMS) if key in attrs},
            system_attrs={**trial.system_attrs, **attrs.get(PRUNER_NOTES, {})},
        )
        if is_finished:
            self._ended[trial.number] = shown
        return shown
