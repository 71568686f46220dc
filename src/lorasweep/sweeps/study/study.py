"""A study: asks for trials until there are enough, is told of each, goes on after a break."""

from __future__ import annotations

import json
import logging
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from lorasweep.core.failures import FailureKind
from lorasweep.runs.run_folder import ScoredCheckpoint, sweep_name
from lorasweep.sweeps.study.check_unchanged import as_begun, changed, check_basis, study_basis
from lorasweep.sweeps.study.continue_trial import continue_trial
from lorasweep.sweeps.study.pruners import FirstObjective, make_pruner
from lorasweep.sweeps.study.samplers import PointSampler, check_installed, distribution, point_key
from lorasweep.sweeps.study.search_space import Choice, Parameter, Space, Value
from lorasweep.sweeps.study.study_settings import StudySettings
from lorasweep.sweeps.study.study_storage import open_storage
from lorasweep.sweeps.study.trial import Trial
from lorasweep.sweeps.study.trial_attributes import (
    ATTEMPT,
    EPOCHS,
    GIVEN,
    ORIGIN,
    PRUNED,
    REASON,
    SETUP_FAILED,
    own_trials,
)

log = logging.getLogger(__name__)


class Study:
    """An Optuna study that one process drives; `settings.n_trials` is the total over all its life.

    What to do next follows from the trials alone, so a driver that was killed at any moment is
    followed by one that does the same.
    """

    def __init__(
        self,
        settings: StudySettings,
        space: Space,
        name: str,
        folder: Path,
        *,
        max_epochs: int = 1,
        guesses: Sequence[Mapping[str, Any]] = (),
        basis: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the study `name`, or begin it. `guesses` are tried first.

        `basis` is what else must be as it was when the study was begun. Raises SettingsError.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        check_installed(settings)
        self.settings, self.space, self.name = settings, space, name
        self._wanted, self._num_points = self._tried_first([space.inside(one) for one in guesses])
        pruner = make_pruner(settings, max_epochs)
        sampler = PointSampler(settings, space, self._points_before)
        self.storage: BaseStorage = open_storage(settings.storage, folder)
        self._again: deque[int] = deque()  # trials to be trained once more
        self._study = self._open(sampler, pruner)
        self.settings = settings = as_begun(self._study, settings)
        ours = study_basis(settings, space, basis or {})
        if changed(self._study, ours) and self._may_begin_anew(folder):
            log.info("sweep %s had trained nothing: it begins anew, with other settings", name)
            optuna.delete_study(study_name=name, storage=self.storage)
            self._study = self._open(sampler, pruner)
        check_basis(self._study, ours, settings)
        self._by_first = FirstObjective(self._study) if settings.pareto else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is experimental
            self._study.set_metric_names(list(settings.objectives))  # for the dashboard

    @property
    def n_trials(self) -> int:
        """Trials in all; no more than the space has points."""
        bounds = [n for n in (self.settings.n_trials, self._num_points) if n is not None]
        return min(bounds)

    @property
    def trials(self) -> list[FrozenTrial]:
        """This sweep's own trials, without those of a warm start."""
        return own_trials(self._study)

    @property
    def optuna_study(self) -> optuna.Study:
        """For Optuna's own analyses."""
        return self._study

    @property
    def is_untouched(self) -> bool:
        """Has no trial come to the end of an epoch?"""
        return not any(trial.user_attrs.get(EPOCHS) for trial in self.trials)

    def note_setup_failed(self) -> None:
        """Note that no run could be set up, and that none is left under way."""
        self._study.set_user_attr(SETUP_FAILED, True)

    def take_over(self) -> list[int]:
        """Let `next` give the trials that a killed driver left running once more; their numbers.

        Only for the one process that drives the study.
        """
        if self._study.user_attrs.get(SETUP_FAILED):
            self._study.set_user_attr(SETUP_FAILED, False)
        left = [t.number for t in self.trials if t.state == TrialState.RUNNING]
        self._again = deque(left)
        return left

    def next(self) -> Trial | None:
        """The next trial to run, those to be trained again first; None once there are enough."""
        if self._again:
            return self._begin(self._live(self._again.popleft()))
        trials = self.trials
        num_begun = sum(trial.state != TrialState.WAITING for trial in trials)
        if num_begun >= self.n_trials:
            return None
        if num_begun == len(trials):
            self._enqueue_wanted(trials)
        return self._begin(self._study.ask())

    def trial(self, number: int) -> Trial:
        """A trial under way, by its number."""
        return Trial(self._live(number), self.settings, self.space, self._by_first)

    def complete(self, trial: Trial) -> str | None:
        """The run has trained to its end: its value is its best candidate's; why it has none."""
        if trial.best is None:
            reason = f"no epoch had a finite {', '.join(self.settings.objectives)}"
            self.fail(trial, reason)
            return reason
        trial.constrain()
        self._study.tell(trial.number, trial.values, skip_if_finished=True)
        return None

    def prune(self, trial: Trial) -> None:
        """The run was stopped early; its candidates stand, and the study knows its best.

        Of several objectives Optuna keeps no values of a pruned trial: to TPE it would be one of
        the worst, to NSGA-II none. There it is a complete one, marked as pruned.
        """
        trial.constrain()
        if self.settings.pareto and trial.best is not None:
            trial.mark_pruned()
            self._study.tell(trial.number, trial.values, skip_if_finished=True)
        else:
            self._study.tell(trial.number, state=TrialState.PRUNED, skip_if_finished=True)

    def fail(self, trial: Trial, reason: str, kind: FailureKind = FailureKind.OWN) -> bool:
        """The run failed. Returns whether `next` will give the trial again."""
        live = trial.optuna_trial
        live.set_user_attr(REASON, reason)
        attempt = int(live.user_attrs.get(ATTEMPT, 0))
        if kind == FailureKind.RETRY and attempt < self.settings.retries:
            live.set_user_attr(ATTEMPT, attempt + 1)
            self._again.append(trial.number)
            return True
        self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        return False

    def settle(self, number: int, scored: Iterable[ScoredCheckpoint]) -> str | None:
        """End a trial whose run was trained by another process; why it failed, if it did.

        What that process didn't report of the `scored` checkpoints is reported now.
        """
        trial = self.trial(number)
        known = trial.epochs  # of its own reports, or of a driver that had the trial before
        for one in [] if trial.is_whole else scored:
            if one.epoch > known:
                terms = {self.settings.objectives[0]: (), **one.terms}  # long ones aren't kept
                trial.report(one.epoch, one.path, one.scores, terms)
        if trial.is_marked_pruned:
            self.prune(trial)
            return None
        return self.complete(trial)

    def _begin(self, live: optuna.Trial) -> Trial:
        """Suggest the parameters of a trial; those that it has already stay."""
        self.space.ask(lambda name, parameter: _suggest(live, name, parameter))
        if live.user_attrs.get(PRUNED):
            live.set_user_attr(PRUNED, False)
        return Trial(live, self.settings, self.space, self._by_first)

    def _live(self, number: int) -> optuna.Trial:
        return continue_trial(self._study, self.storage, number)

    def _tried_first(
        self, guesses: Sequence[dict[str, Value]]
    ) -> tuple[dict[str, dict[str, Value]], int | None]:
        """What is asked before the sampler's own points, by its origin; how many points there are.

        Of a grid that is every point, those of the guesses first.
        """
        if self.settings.sampler != "grid":
            wanted = {f"guess {json.dumps(params)}": params for params in guesses if params}
            return wanted, self.space.count()
        grid = self.space.grid()
        first: dict[int, None] = {}
        for guess in filter(None, guesses):
            like = (n for n, point in enumerate(grid) if guess.items() <= point.items())
            found = next(like, None)
            if found is None:
                log.warning("no point of the grid has all of %s, so it isn't tried first", guess)
            else:
                first[found] = None
        ordered = [grid[n] for n in first] + [one for n, one in enumerate(grid) if n not in first]
        return {f"grid {json.dumps(params)}": params for params in ordered}, len(grid)

    def _enqueue_wanted(self, trials: Sequence[FrozenTrial]) -> None:
        """Let the next trial be the first that is wanted and was not asked for yet."""
        origins = {trial.user_attrs.get(ORIGIN) for trial in trials}
        left = {origin: params for origin, params in self._wanted.items() if origin not in origins}
        points = self._points(trials) if left else set()
        for origin, params in left.items():
            if point_key(params) not in points:
                attrs = {ORIGIN: origin, GIVEN: params}
                self._study.enqueue_trial(params, user_attrs=attrs)
                return

    def _points_before(self, number: int) -> set[str]:
        return self._points([trial for trial in self.trials if trial.number < number])

    def _points(self, trials: Sequence[FrozenTrial]) -> set[str]:
        """The points of trials: 8 for 8.0, 0.3 for 0.30000000000000004."""
        return {point_key(self.space.inside(one.params)) for one in trials if one.params}

    def _open(self, sampler: PointSampler, pruner: optuna.pruners.BasePruner) -> optuna.Study:
        return optuna.create_study(
            study_name=self.name,
            storage=self.storage,
            directions=["minimize" if sign > 0 else "maximize" for sign in self.settings.signs],
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )

    def _may_begin_anew(self, folder: Path) -> bool:
        """Was it stopped before any training, with no job left that might report to it?"""
        own = self.settings.storage is None  # in others, another folder's driver may be at work
        untouched = bool(self._study.user_attrs.get(SETUP_FAILED)) and self.is_untouched
        return own and untouched and not any(folder.glob("*/run.json"))


def join_study(
    settings: StudySettings, folder: Path, numbers: Sequence[int], *, max_epochs: int
) -> list[Trial]:
    """Trials of the sweep in `folder`, from any process that reaches its storage."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(settings.storage, folder)
    study = optuna.load_study(
        study_name=sweep_name(folder), storage=storage, pruner=make_pruner(settings, max_epochs)
    )
    settings = as_begun(study, settings)
    by_first = FirstObjective(study) if settings.pareto else None
    return [
        Trial(continue_trial(study, storage, number), settings, Space({}, {}), by_first)
        for number in numbers
    ]


def _suggest(trial: optuna.Trial, name: str, parameter: Parameter) -> Value:
    if isinstance(parameter, Choice):
        if parameter.interval is None:
            return trial.suggest_categorical(name, parameter.values)
        number = _suggest(trial, name, parameter.interval)
        assert isinstance(number, int | float)
        return parameter.nearest(number)
    kind = distribution(parameter)
    if isinstance(kind, IntDistribution):
        return trial.suggest_int(name, kind.low, kind.high, step=kind.step, log=kind.log)
    assert isinstance(kind, FloatDistribution)
    return trial.suggest_float(name, kind.low, kind.high, step=kind.step, log=kind.log)
