"""A study: asks for trials until there are enough, is told of each, goes on after a break."""

from __future__ import annotations

import json
import logging
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from lorasweep.core.components import with_short_names
from lorasweep.core.rng import key_seed
from lorasweep.core.settings import SettingsError
from lorasweep.runs.run_folder import ScoredCheckpoint, sweep_name
from lorasweep.sweeps.study.methods import (
    CURVE,
    ORIGIN,
    PRUNED,
    TERMS,
    WARM_START,
    check_installed,
    distribution,
    make_pruner,
    make_sampler,
    own_trials,
)
from lorasweep.sweeps.study.pareto import FirstObjective
from lorasweep.sweeps.study.points import PointSampler, point_key
from lorasweep.sweeps.study.search_space import Choice, Parameter, Space, Value
from lorasweep.sweeps.study.study_settings import StudySettings
from lorasweep.sweeps.study.study_storage import find_journal, journal_path, open_storage
from lorasweep.sweeps.study.trial import BEST, EPOCHS, Trial, excess

log = logging.getLogger(__name__)

# user attributes of a trial
ATTEMPT = "attempt"  # how many times it failed and was begun again
REASON = "reason"  # why it failed last
SOURCE, THEIR_NUMBER = "warm_start", "warm_start_number"  # of a warm start: which study's, and its
# user attributes of the study
BASIS = "basis"  # what must stay the same when it is continued
LACKING = "lacking"  # it was stopped because no run could begin
LEARNED = "learned"  # the other study, all of whose trials were taken


@dataclass
class _Plan:
    """What a study has yet to ask, kept so that no trial's cost grows with their number."""

    created: int  # trials in all, with those of a warm start
    begun: int
    waiting: deque[int]  # created with parameters, and not begun
    wanted: deque[tuple[dict[str, Value], str]]
    """Parameters to be tried, and their origin."""
    points: dict[str, int]
    """Of every point that was tried, the first trial."""


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
        self._guesses = [space.inside(guess) for guess in guesses]
        self._grid = self._guessed_first(space.grid()) if settings.sampler == "grid" else []
        self._num_points = len(self._grid) or space.count()
        pruner = make_pruner(settings, max_epochs)
        self._sampler = make_sampler(settings, space, 0)  # checks its options, before any work
        self.storage: BaseStorage = open_storage(settings.storage, folder)
        self._again: deque[int] = deque()  # trials to be trained once more
        self._plan: _Plan | None = None
        self._study = self._open(pruner)
        ours = self._basis(basis or {})
        if self._changed(ours) and self._may_begin_anew(folder):
            log.info("sweep %s had trained nothing: it begins anew, with other settings", name)
            optuna.delete_study(study_name=name, storage=self.storage)
            self._study = self._open(pruner)
        self._check_basis(ours)
        self._by_first = FirstObjective(self._study, self.storage) if settings.pareto else None
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
    def is_untouched(self) -> bool:
        """Has no trial come to the end of an epoch?"""
        return not any(trial.user_attrs.get(EPOCHS) for trial in self.trials)

    def note_lack(self) -> None:
        """Note that all runs lacked something to begin, and that none is left under way."""
        self._study.set_user_attr(LACKING, True)

    def take_over(self) -> list[int]:
        """Let `next` give the trials that a killed driver left running once more; their numbers.

        Only for the one process that drives the study.
        """
        if self._study.user_attrs.get(LACKING):
            self._study.set_user_attr(LACKING, False)
        left = [t.number for t in self.trials if t.state == TrialState.RUNNING]
        self._again = deque(left)
        return left

    def next(self) -> Trial | None:
        """The next trial to run, those to be trained again first; None once there are enough."""
        if self._plan is None:
            self._plan = self._read_plan()
        if self._again:
            return self._begin(self._again.popleft())
        if self._plan.begun >= self.n_trials:
            return None
        self._plan.begun += 1
        return self._begin(None)

    def _begin(self, number: int | None) -> Trial:
        """Ask for a trial, or for one by its number; parameters that it has already stay."""
        assert self._plan is not None
        points = self._plan.points
        known = self._upcoming() if number is None else number
        self._study.sampler = PointSampler(
            make_sampler(self.settings, self.space, known, self._sampler),
            self.space,
            lambda point: points.get(point, known) < known,
            key_seed(self.settings.seed, "points", known) % 2**31,
        )
        trial = self._study.ask() if number is None else self.trial(number)._trial
        params = self.space.ask(lambda name, parameter: _suggest(trial, name, parameter))
        points.setdefault(point_key(params), known)
        if trial.user_attrs.get(PRUNED):
            trial.set_user_attr(PRUNED, False)
        return Trial(trial, self.settings, self.space, self._by_first)

    def _upcoming(self) -> int:
        """The number that Optuna's next trial gets, whose parameters may have to be given."""
        assert self._plan is not None
        plan = self._plan
        if not plan.waiting and plan.wanted:
            params, origin = plan.wanted.popleft()
            self._study.enqueue_trial(params, user_attrs={ORIGIN: origin})
            plan.waiting.append(plan.created)
            plan.created += 1
        if plan.waiting:
            return plan.waiting.popleft()
        plan.created += 1
        return plan.created - 1

    def trial(self, number: int) -> Trial:
        """A trial under way, by its number."""
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(
            self._study._study_id, number
        )
        live = optuna.Trial(self._study, trial_id)
        return Trial(live, self.settings, self.space, self._by_first)

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

    def fail(self, trial: Trial, reason: str, *, transient: bool = False) -> bool:
        """The run failed. Returns whether `next` will give the trial again."""
        live = trial._trial
        live.set_user_attr(REASON, reason)
        attempt = int(live.user_attrs.get(ATTEMPT, 0))
        if transient and attempt < self.settings.retries:
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

    @property
    def has_learned(self) -> bool:
        """Has it taken all of another study's trials as knowledge?"""
        return LEARNED in self._study.user_attrs

    @property
    def learns_from(self) -> str | None:
        """The other study of which it has trials; all of them, unless a kill came between."""
        sources = [one.user_attrs[SOURCE] for one in self._warm]
        return self._study.user_attrs.get(LEARNED, sources[0] if sources else None)

    def learn(self, other: Sequence[FrozenTrial], name: str) -> int:
        """Take another study's trials as knowledge, once; how many fit this one."""
        if self.has_learned:
            return 0
        there = {one.user_attrs[THEIR_NUMBER] for one in self._warm}  # before a kill
        known = [one for one in (self._known(trial, name) for trial in other) if one is not None]
        for trial in known:
            if trial.user_attrs[THEIR_NUMBER] not in there:
                self._study.add_trial(trial)
        self._study.set_user_attr(LEARNED, name)
        return len(known)

    @property
    def _warm(self) -> list[FrozenTrial]:
        found = self._study.get_trials(deepcopy=False)
        return [trial for trial in found if trial.user_attrs.get(ORIGIN) == WARM_START]

    @property
    def optuna_study(self) -> optuna.Study:
        """For Optuna's own analyses."""
        return self._study

    def _guessed_first(self, grid: list[dict[str, Value]]) -> list[dict[str, Value]]:
        """The grid, for each guess the first point that has its values before the others."""
        first: dict[int, None] = {}
        for guess in filter(None, self._guesses):
            like = (n for n, point in enumerate(grid) if guess.items() <= point.items())
            found = next(like, None)
            if found is None:
                log.warning("no point of the grid has all of %s, so it isn't tried first", guess)
            else:
                first[found] = None
        return [grid[n] for n in first] + [one for n, one in enumerate(grid) if n not in first]

    def _read_plan(self) -> _Plan:
        """What is to come, by the trials that there are."""
        trials = self.trials
        origins = {trial.user_attrs.get(ORIGIN) for trial in trials}
        kind, given = ("grid", self._grid) if self._grid else ("guess", self._guesses)
        named = {f"{kind} {json.dumps(params)}": params for params in given if params}
        inside = self.space.inside  # 8 for 8.0, 0.3 for 0.30000000000000004
        points = {point_key(inside(t.params)): t.number for t in reversed(trials) if t.params}
        wanted = deque(
            (params, origin)
            for origin, params in named.items()
            if origin not in origins and point_key(params) not in points
        )
        waiting = deque(trial.number for trial in trials if trial.state == TrialState.WAITING)
        created = len(self._study.get_trials(deepcopy=False))
        return _Plan(created, len(trials) - len(waiting), waiting, wanted, points)

    def _known(self, trial: FrozenTrial, name: str) -> FrozenTrial | None:
        """Another study's trial as one of ours; None if it isn't a point of our space.

        Likewise without a score for each of our constraints: samplers would take it to keep them.
        Without its curve: pruners compare scores of the same images only. A pruned one's values are
        known all the same, and without a curve samplers would take it for the worst.
        """
        scores, bounds = trial.user_attrs.get(BEST, {}).get("scores", {}), self.settings.constraints
        values = trial.values or [scores.get(name) for name in self.settings.objectives]
        if not self.space.holds(trial.params) or None in values:
            return None
        if len(values) != len(self.settings.objectives) or not bounds.keys() <= scores.keys():
            return None
        params = self.space.inside(trial.params)
        attrs = {k: v for k, v in trial.user_attrs.items() if k not in (CURVE, TERMS)}
        attrs |= {ORIGIN: WARM_START, SOURCE: name, THEIR_NUMBER: trial.number}
        return optuna.trial.create_trial(
            state=TrialState.COMPLETE,
            params=params,
            distributions={name: distribution(self.space.parameters[name]) for name in params},
            values=values,
            user_attrs=attrs,
            constraints=excess(scores, bounds),
        )

    def _open(self, pruner: optuna.pruners.BasePruner) -> optuna.Study:
        return optuna.create_study(
            study_name=self.name,
            storage=self.storage,
            directions=["minimize" if sign > 0 else "maximize" for sign in self.settings.signs],
            pruner=pruner,
            load_if_exists=True,
        )

    def _basis(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """The study's question, and `more` that must stay as it was when it was begun."""
        return {
            **_question(self.settings),
            "study.constraints": dict(self.settings.constraints),  # old trials' bounds
            "study.params": {n: repr(p) for n, p in self.space.parameters.items()},
            "study.conditions": {n: repr(c) for n, c in self.space.conditions.items()},
            **more,
        }

    def _may_begin_anew(self, folder: Path) -> bool:
        """Was it stopped before any training, with no job left that might report to it?"""
        own = self.settings.storage is None  # in others, another folder's driver may be at work
        lacked = own and bool(self._study.user_attrs.get(LACKING)) and self.is_untouched
        return lacked and not any(folder.glob("*/run.json"))

    def _changed(self, ours: Mapping[str, Any]) -> str | None:
        """What of the basis is not as it was when the study was begun."""
        theirs = _basis_of(self._study)
        return next((key for key in theirs if ours.get(key) != theirs[key]), None)

    def _check_basis(self, ours: Mapping[str, Any]) -> None:
        """Refuse to continue a study with another question."""
        theirs = _basis_of(self._study)
        if not theirs:
            self._study.set_user_attr(BASIS, ours)
        elif key := self._changed(ours):
            keep = f" (and study.warm_start={self.name} to keep what it knows)"
            hint = "" if key in _question(self.settings) else keep
            raise SettingsError(
                f"sweep {self.name} was begun {_difference(key, theirs, ours)}; give another"
                f" study.name{hint}"
            )


def _basis_of(study: optuna.Study) -> dict[str, Any]:
    """What must stay the same when the study is continued; {} of a new one."""
    logged = json.dumps(study.user_attrs.get(BASIS, {}))
    basis: dict[str, Any] = json.loads(with_short_names(logged))
    return basis


def join_study(
    settings: StudySettings, folder: Path, numbers: Sequence[int], *, max_epochs: int
) -> list[Trial]:
    """Trials of the sweep in `folder`, from any process that reaches its storage."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(settings.storage, folder)
    study = optuna.load_study(
        study_name=sweep_name(folder), storage=storage, pruner=make_pruner(settings, max_epochs)
    )
    by_first = FirstObjective(study, storage) if settings.pareto else None

    def trial(number: int) -> Trial:
        trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
        return Trial(optuna.Trial(study, trial_id), settings, Space({}, {}), by_first)

    return [trial(number) for number in numbers]


def known_trials(
    sweep: str, settings: StudySettings, output_root: Path, folder: Path
) -> list[FrozenTrial]:
    """The trials of another sweep that ended with a value: of a database, or of its journal.

    It is not that of `folder`. Raises SettingsError if there is no such sweep, or if its values are
    of something else.
    """
    study = _other_study(sweep, settings.storage, output_root, folder)
    theirs = _basis_of(study)
    for key, ours in _question(settings).items():
        if theirs.get(key) != ours:
            raise SettingsError(
                f"study.warm_start={sweep}: its {key} is {theirs.get(key)}, not {ours}, so its"
                " values say nothing here; give another sweep, or null"
            )
    return study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))


def _other_study(sweep: str, storage: str | None, output_root: Path, folder: Path) -> optuna.Study:
    """Found in the storage by its name or folder; else in a journal of its own."""
    beside = ""
    if storage is not None:
        opened = open_storage(storage, output_root)
        kept = [one for one in optuna.get_all_study_names(opened) if one != sweep_name(folder)]
        for name in (sweep, sweep_name(Path(sweep).absolute())):
            if name in kept:
                return optuna.load_study(study_name=name, storage=opened)
        beside = f"; in study.storage there are: {', '.join(kept) or 'none'}"
    try:
        journal = find_journal(sweep, output_root, but=journal_path(storage, folder))
    except SettingsError as error:
        raise SettingsError(f"study.warm_start: {error}{beside}") from None
    opened = open_storage(str(journal), journal.parent)
    names = optuna.get_all_study_names(opened)
    if len(names) != 1 and sweep not in names:
        raise SettingsError(
            f"study.warm_start={sweep}: {journal} holds several studies, or none; give one of"
            f" their names with study.storage={journal}: {', '.join(names) or 'none'}"
        )
    name = sweep if sweep in names else names[0]
    return optuna.load_study(study_name=name, storage=opened)


def _question(settings: StudySettings) -> dict[str, list[str]]:
    """What the values of a study's trials are."""
    return {
        "study.objectives": list(settings.objectives),
        "study.maximize": sorted(settings.maximize),
    }


def _difference(key: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What of the basis has changed, short."""
    then, now = theirs.get(key), ours.get(key)
    if key == "overrides" and isinstance(then, list) and isinstance(now, list):
        gone, new = ([o for o in a if o not in b] for a, b in ((then, now), (now, then)))
        said = [f"with {', '.join(gone)} (not given now)"] if gone else []
        said += [f"without {', '.join(new)}"] if new else []
        return " and ".join(said)
    if isinstance(then, dict) and isinstance(now, dict):

        def known(basis: Mapping[str, Any], name: str) -> Any:
            """Of a point: what all points have the same is among the settings alone."""
            return basis[key].get(name, basis.get("settings", {}).get(name.rpartition(": ")[2]))

        none = object()
        names = [n for n in [*then, *now] if then.get(n, none) != now.get(n, none)]
        name = next((n for n in names if known(theirs, n) != known(ours, n)), names[0])
        if key in ("settings", "points", "study.constraints"):
            place = f"{key}." if key == "study.constraints" else ""
            return f"with {place}{name}={known(theirs, name)}, not {known(ours, name)}"
        return f"with another {key}.{name}"
    return f"with {key}={then}, not {now}"


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
