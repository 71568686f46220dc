"""Trials in batches, through a launcher that returns when all of a batch have ended."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorasweep.config.error_messages import one_line
from lorasweep.config.run import Run
from lorasweep.core.atomic_write import DiskFullError
from lorasweep.runs import run_folder
from lorasweep.runs.session import PassingError, PausingError, UnreadyError
from lorasweep.sweeps.stop_rules import Failures, Limits, SweepError
from lorasweep.sweeps.trial_jobs import Jobs
from lorasweep.sweeps.trial_processes import say_pruned
from lorasweep.tracking import TrackingError

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn

    from lorasweep.sweeps.study.study import Study
    from lorasweep.sweeps.study.trial import Trial

log = logging.getLogger(__name__)


class Batches:
    """Trials through one of Hydra's own launchers, which return when a whole batch has ended.

    The jobs report to the study themselves and stop where they are to be pruned.
    """

    def __init__(self, study: Study, jobs: Jobs, launcher: Any, limits: Limits) -> None:
        self._study, self._jobs, self._launcher, self._limits = study, jobs, launcher, limits
        self._failures = Failures(study, limits)
        self._runs: dict[int, Run] = {}  # of the trials that were asked and have not ended

    def run(self) -> None:
        """Go on until the study has enough trials, or a limit is reached."""
        while not self._limits.reached and (trials := self._batch()):
            for part in _consecutive(trials):
                self._launch(part)
        self._failures.review(at_end=True)

    def _batch(self) -> list[Trial]:
        trials: list[Trial] = []
        while len(trials) < self._study.settings.batch_size and not self._limits.reached:
            trial = self._study.next()
            if trial is None:
                break
            log.info("trial %d: %s", trial.number, " ".join(trial.overrides))
            try:
                run = self._runs[trial.number] = self._jobs.run_of(trial)
            except ValueError as error:
                self._failures.fail(trial, one_line(error) or str(error))
                continue
            trial.plan(run.max_train_epochs)
            if run_folder.was_dropped(run):  # a job would train it to its end
                say_pruned(trial)
                trial.mark_pruned()
                self._complete(trial)
            else:
                trials.append(trial)
        return trials

    def _launch(self, trials: Sequence[Trial]) -> None:
        overrides = [self._jobs.overrides(trial) for trial in trials]
        try:
            returns = self._launcher.launch(overrides, initial_job_idx=trials[0].number)
        except Exception as error:  # a launcher raises when a worker dies; which one, it can't say
            if one_line(error) is not None:  # the user's to mend: the trials stay open
                raise
            log.exception("the launcher failed")
            returns = [error] * len(trials)
        for trial, returned in zip(trials, returns, strict=True):
            if not _pauses(returned):
                self._settle(trial, returned)
        self._failures.review()
        if paused := next(filter(_pauses, returns), None):
            raise SweepError(_reason(paused))  # the trials stay open

    def _settle(self, trial: Trial, returned: JobReturn | Exception) -> None:
        reason = _reason(returned)
        if reason is None:
            self._complete(trial)
        elif _may_pass(returned):
            self._failures.fail(trial, reason, transient=True)
        elif isinstance(_error(returned), UnreadyError | ValueError):
            self._failures.lack(trial, reason)
        else:
            self._failures.fail(trial, reason)

    def _complete(self, trial: Trial) -> None:
        scored = run_folder.scored_checkpoints(self._runs.pop(trial.number))
        reason = self._study.settle(trial.number, scored)
        if reason is None:
            self._limits.failures = 0
        else:
            self._limits.failed(reason)


def _consecutive(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Parts whose numbers follow each other, as Hydra numbers the jobs of a batch."""
    parts: list[list[Trial]] = []
    for trial in trials:
        if parts and parts[-1][-1].number + 1 == trial.number:
            parts[-1].append(trial)
        else:
            parts.append([trial])
    return parts


def _error(returned: JobReturn | Exception) -> Any:
    """Why a job failed; None if it didn't."""
    from hydra.core.utils import JobStatus

    if isinstance(returned, Exception):
        return returned
    return None if returned.status == JobStatus.COMPLETED else returned._return_value


def _pauses(returned: JobReturn | Exception) -> bool:
    """Does it wait for somebody to mend something?"""
    return isinstance(_error(returned), PausingError | DiskFullError | TrackingError)


def _may_pass(returned: JobReturn | Exception) -> bool:
    """Was it lost with its launcher or with its process, which says nothing of the trial itself?"""
    return isinstance(returned, Exception) or isinstance(returned._return_value, PassingError)


def _reason(returned: JobReturn | Exception) -> str | None:
    """Likewise in one line."""
    error = _error(returned)
    known = one_line(error) if isinstance(error, Exception) else None
    return known or (f"{type(error).__name__}: {error}" if error is not None else None)
