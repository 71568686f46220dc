"""Asks the study for trials, trains them, tells it what they came to, prunes.

`TrialsOneByOne` gives each run to the workers here as soon as there is room; `TrialsInBatches`
gives a batch of jobs to a launcher, of a cluster or of Hydra's, which returns when all have ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING, Any, Protocol

from lorasweep.config.error_messages import one_line
from lorasweep.config.run import Run
from lorasweep.core.failures import FailureKind, RunError
from lorasweep.runs import run_folder
from lorasweep.runs.session import Failure, Finished, Report, failure_kind
from lorasweep.sweeps.compose_jobs import TrialJobs
from lorasweep.sweeps.sweep_limits import FailedTrials, StopRules, SweepError
from lorasweep.sweeps.trial_job import report_epochs, say_pruned

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn

    from lorasweep.sweeps.study.study import Study
    from lorasweep.sweeps.study.trial import Trial

log = logging.getLogger(__name__)


class Workers(Protocol):
    """What trains runs: a WorkerPool, as far as a sweep needs it."""

    max_pack: int

    @property
    def has_room(self) -> bool: ...
    def submit(self, run: Run) -> bool: ...
    def drop(self, name: str) -> None: ...
    def events(self) -> Sequence[Report]: ...


class _Trials:
    """What both loops do: ask the study, and count how its trials end."""

    def __init__(self, study: Study, rules: StopRules) -> None:
        self._study, self._rules = study, rules
        self._failed = FailedTrials(study, rules)

    def _ask(self, prepare: Callable[[Trial], Run]) -> tuple[Trial, Run] | None:
        """The next trial that can be composed, and its run; None if there is no more to begin."""
        while not self._rules.reached and (trial := self._study.next()):
            try:
                run = prepare(trial)
            except ValueError as error:
                self._failed.add(trial, one_line(error) or str(error))
                continue
            trial.plan(run.max_train_epochs)
            log.info("trial %d: %s", trial.number, " ".join(trial.overrides))
            return trial, run
        return None


class TrialsOneByOne(_Trials):
    """Trials that come and go one by one: a new one begins as soon as there is room for it."""

    def __init__(
        self, study: Study, prepare: Callable[[Trial], Run], workers: Workers, rules: StopRules
    ) -> None:
        super().__init__(study, rules)
        self._prepare, self._workers = prepare, workers
        self._trials: dict[str, Trial] = {}  # by their run's name, those that train
        self._queue: list[tuple[Trial, Run]] = []  # those that can join no pack that trains

    def run(self) -> None:
        """Go on until the study has enough trials, or a stop rule is reached."""
        self._begin_trials()
        while self._trials:
            events = self._workers.events()
            if not events:
                raise SweepError("the workers ended without a word of their runs; see the log")
            to_prune = report_epochs(self._trials, events)
            for event in events:
                self._note_end(event)
            for name in to_prune:
                self._workers.drop(name)
            self._failed.review()
            self._begin_trials()
        self._failed.review(at_end=True)

    def _begin_trials(self) -> None:
        """Begin trials while there is room; each knows all that was told before it.

        One that can share no pack that trains is queued until a device is free, and others are
        asked for meanwhile: at most a pack of them, for they would know more later.
        """
        self._submit_queue()
        while len(self._queue) < self._workers.max_pack and self._workers.has_room:
            asked = self._ask(self._prepare)
            if asked is None:
                return
            self._queue.append(asked)
            self._submit_queue()

    def _submit_queue(self) -> None:
        left = []
        for trial, run in self._queue:
            if self._rules.reached or not self._workers.submit(run):
                left.append((trial, run))
            else:
                self._trials[run.name] = trial
        self._queue = left

    def _note_end(self, event: Report) -> None:
        """Tell the study if the run has ended."""
        if event.run not in self._trials or not isinstance(event, Failure | Finished):
            return
        if isinstance(event, Failure) and event.kind == FailureKind.ENVIRONMENT:
            raise SweepError(f"{event.run}: {event.reason}")  # the trial stays open
        trial = self._trials.pop(event.run)
        if isinstance(event, Failure):
            self._failed.add(trial, event.reason, event.kind)
            return
        if event.dropped:  # by us, or by a driver that was killed
            self._study.prune(trial)
        else:
            self._study.complete(trial)
        self._rules.count(None if trial.best else "no epoch had a finite score")


class TrialsInBatches(_Trials):
    """Trials as jobs of a launcher that returns when a whole batch has ended.

    The jobs report to the study themselves and stop where they are to be pruned.
    """

    def __init__(self, study: Study, jobs: TrialJobs, launcher: Any, rules: StopRules) -> None:
        super().__init__(study, rules)
        self._jobs, self._launcher = jobs, launcher
        self._runs: dict[int, Run] = {}  # of the trials that were asked and have not ended

    def run(self) -> None:
        """Go on until the study has enough trials, or a stop rule is reached."""
        while not self._rules.reached and (trials := self._batch()):
            for part in _consecutive(trials):
                self._launch(part)
        self._failed.review(at_end=True)

    def _batch(self) -> list[Trial]:
        trials: list[Trial] = []
        while len(trials) < self._study.settings.batch_size:
            asked = self._ask(self._jobs.run_of)
            if asked is None:
                break
            trial, run = asked
            self._runs[trial.number] = run
            if run_folder.status_of(run) == "dropped":  # a job would train it to its end
                say_pruned(trial)
                trial.mark_pruned()
                self._complete(trial)
            else:
                trials.append(trial)
        return trials

    def _launch(self, trials: Sequence[Trial]) -> None:
        overrides = [self._jobs.overrides(trial) for trial in trials]
        try:
            returned = self._launcher.launch(overrides, initial_job_idx=trials[0].number)
            errors = [_error(one) for one in returned]
        except Exception as error:  # a launcher raises when a worker dies; which one, it can't say
            if one_line(error) is not None:  # the user's to mend: the trials stay open
                raise
            log.exception("the launcher failed")
            lost = RunError(f"{type(error).__name__}: {error}", FailureKind.RETRY)
            errors = [lost] * len(trials)
        environment: list[str] = []
        for trial, failed in zip(trials, errors, strict=True):
            if failed is None:
                self._complete(trial)
                continue
            reason = one_line(failed) or f"{type(failed).__name__}: {failed}"
            kind = failure_kind(failed)
            if kind == FailureKind.ENVIRONMENT:
                environment.append(reason)  # the trial stays open
            else:
                self._failed.add(trial, reason, kind)
        self._failed.review()
        if environment:
            raise SweepError(environment[0])

    def _complete(self, trial: Trial) -> None:
        scored = run_folder.scored_checkpoints(self._runs.pop(trial.number))
        self._rules.count(self._study.settle(trial.number, scored))


def _consecutive(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Parts whose numbers follow each other, as Hydra numbers the jobs of a batch."""
    parts: list[list[Trial]] = []
    for trial in trials:
        if parts and parts[-1][-1].number + 1 == trial.number:
            parts[-1].append(trial)
        else:
            parts.append([trial])
    return parts


def _error(returned: JobReturn) -> Exception | None:
    """Why a job failed; None if it didn't."""
    try:
        with redirect_stderr(StringIO()):  # where Hydra says it too
            _ = returned.return_value
    except Exception as error:  # what the job itself raised
        return error
    return None
