"""One trial: a run that reports its candidates and may be pruned."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from lorasweep.judging.pick_rule import sign
from lorasweep.sweeps.study.pruners import FirstObjective
from lorasweep.sweeps.study.search_space import Space
from lorasweep.sweeps.study.study_settings import StudySettings
from lorasweep.sweeps.study.trial_attributes import (
    BEST,
    CURVE,
    EPOCHS,
    PLANNED,
    PRUNED,
    TERMS,
)


@dataclass(frozen=True, kw_only=True)
class BestCheckpoint:
    """The best checkpoint of a trial so far."""

    epoch: int
    path: str
    scores: Mapping[str, float]
    terms: Sequence[float]
    """Of the first objective; empty where the metric gives none."""


class Trial:
    """A trial under way. Any process that reaches the storage can hold one."""

    def __init__(
        self,
        trial: optuna.Trial,
        settings: StudySettings,
        space: Space,
        by_first: FirstObjective | None = None,
    ) -> None:
        """`by_first` decides what is pruned where there are several objectives."""
        self.optuna_trial, self._settings, self._space = trial, settings, space
        self._by_first = by_first
        self.number = trial.number
        best = trial.user_attrs.get(BEST)
        self.best = BestCheckpoint(**best) if best else None
        self.epochs = int(trial.user_attrs.get(EPOCHS, 0))
        self._furthest = self.epochs  # before a break

    @property
    def params(self) -> dict[str, Any]:
        """Parameter to value."""
        return self.optuna_trial.params

    @property
    def overrides(self) -> list[str]:
        """The parameters as Hydra's overrides."""
        return self._space.overrides(self.optuna_trial.params)

    def plan(self, epochs: int) -> None:
        """Note how many epochs the run would train if nothing stops it."""
        self.optuna_trial.set_user_attr(PLANNED, epochs)

    def report(
        self,
        epoch: int,
        path: Path,
        scores: Mapping[str, float],
        terms: Mapping[str, Sequence[float]],
    ) -> None:
        """Note the candidate of an epoch; that of a run that was begun again replaces the earlier.

        Raises SettingsError for an objective or constraint that is no score of the run, or a first
        objective that the pruner can't judge.
        """
        self._settings.check_scores(scores, terms)
        self.epochs = epoch
        new = self._candidate(epoch, path, scores, terms)
        if new is not None and self._replaces_best(new):
            self.best = new
            self.optuna_trial.set_user_attr(BEST, vars(new))
        if epoch > self._furthest:
            self.optuna_trial.set_user_attr(EPOCHS, epoch)
        if self.best is not None:
            self._note(epoch, self.best)

    def should_prune(self) -> bool:
        """Is the run to be stopped after the epoch last reported?

        Runs that reach an epoch together report first, so that each is compared with all.
        """
        if self.is_whole or self.best is None or self.epochs < self._settings.min_epochs:
            return False
        if self.epochs < self._furthest:  # it came further before a break, and was kept
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self._by_first is not None:
                return self._by_first.should_prune(self.optuna_trial)
            return self.optuna_trial.should_prune()

    @property
    def is_whole(self) -> bool:
        """Has it reported the last epoch of those planned?"""
        return bool(self.epochs >= self.optuna_trial.user_attrs.get(PLANNED, math.inf))

    def mark_pruned(self) -> None:
        """Note that the run has stopped for it was to be pruned: of a job, from its own process."""
        self.optuna_trial.set_user_attr(PRUNED, True)

    @property
    def is_marked_pruned(self) -> bool:
        """Has its job noted that?"""
        return bool(self.optuna_trial.user_attrs.get(PRUNED))

    @property
    def values(self) -> list[float]:
        """The best candidate's objectives."""
        assert self.best is not None
        return [self.best.scores[name] for name in self._settings.objectives]

    def constrain(self) -> None:
        """Tell Optuna by how much the best candidate breaks each constraint; at most 0 is good."""
        if self.best is not None:
            for name, by in excess(self.best.scores, self._settings.constraints).items():
                self.optuna_trial.set_constraint(name, by)

    def _candidate(
        self,
        epoch: int,
        path: Path,
        scores: Mapping[str, float],
        terms: Mapping[str, Sequence[float]],
    ) -> BestCheckpoint | None:
        names = [*self._settings.objectives, *self._settings.constraints]
        if not all(math.isfinite(scores.get(name, math.nan)) for name in names):
            return None
        kept = {name: value for name, value in scores.items() if math.isfinite(value)}
        of_first = list(terms.get(self._settings.objectives[0], ()))
        return BestCheckpoint(epoch=epoch, path=str(path), scores=kept, terms=of_first)

    def _replaces_best(self, new: BestCheckpoint) -> bool:
        best = self.best
        return best is None or best.epoch == new.epoch or self._rank(new) < self._rank(best)

    def _rank(self, candidate: BestCheckpoint) -> tuple[float, float]:
        """Smaller is better: first by broken constraints, then by the first objective."""
        over = excess(candidate.scores, self._settings.constraints)
        broken = sum(max(0.0, by) for by in over.values())
        sign = self._settings.signs[0]
        return broken, sign * candidate.scores[self._settings.objectives[0]]

    def _note(self, epoch: int, best: BestCheckpoint) -> None:
        """The best so far, as pruners and the dashboard see the run."""
        value = best.scores[self._settings.objectives[0]]
        if self._settings.pareto:
            curve = self.optuna_trial.user_attrs.get(CURVE, {})
            self.optuna_trial.set_user_attr(CURVE, {**curve, str(epoch): value})
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a trial taken over, the first report stands
                self.optuna_trial.report(value, epoch)
        if self._settings.pruner == "wilcoxon":
            terms = self.optuna_trial.user_attrs.get(TERMS, {})
            self.optuna_trial.set_user_attr(TERMS, {**terms, str(epoch): list(best.terms)})


def excess(scores: Mapping[str, float], bounds: Mapping[str, float]) -> dict[str, float]:
    """By how much scores break each constraint; at most 0 is good."""
    return {name: sign(name) * (scores[name] - bound) for name, bound in bounds.items()}
