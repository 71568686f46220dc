"""Trials in batches, through a launcher that returns when all of a batch have ended."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorasweep import config as configs
from lorasweep import run_folder
from lorasweep.checkpoint import DiskFullError
from lorasweep.config import Run
from lorasweep.flow import Limits, SweepError
from lorasweep.jobs import Jobs
from lorasweep.run import PassingError, PausingError, UnreadyError
from lorasweep.tracking import TrackingError
from lorasweep.trials import say_pruned

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn

    from lorasweep.study.study import Study
    from lorasweep.study.trial import Trial

log = logging.getLogger(__name__)


class Batches:
    """Trials through one of Hydra's own launchers, which return when a whole batch has ended.

    The jobs report to the study themselves and stop where they are to be pruned.
    """

    def __init__(self, study: Study, jobs: Jobs, launcher: Any, limits: Limits) -> None:
        self._study, self._jobs, self._launcher, self._limits = study, jobs, launcher, limits
        self._runs: dict[int, Run] = {}  # of the trials that were asked and have not ended

    def run(self) -> None:
        """Go on until the study has enough trials, or a limit is reached."""
        while not self._limits.reached and (trials := self._batch()):
            for part in _consecutive(trials):
                self._launch(part)

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
                self._fail(trial, configs.one_line(error) or str(error), transient=False)
                continue
            trial.plan(run.trainer.max_train_epochs)
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
            if configs.one_line(error) is not None:  # the user's to mend: the trials stay open
                raise
            log.exception("the launcher failed")
            returns = [error] * len(trials)
        reasons = [self._pause(one) for one in returns]
        for trial, returned, reason in zip(trials, returns, reasons, strict=True):
            if reason is None:
                self._settle(trial, returned)
        if paused := next(filter(None, reasons), None):
            if all(reasons) and self._study.is_untouched:
                self._study.note_lack()
            raise SweepError(paused)  # the trials stay open

    def _pause(self, returned: JobReturn | Exception) -> str | None:
        """Why a job waits for somebody to mend something, as in Flow."""
        error = returned if isinstance(returned, Exception) else returned._return_value
        unready = isinstance(error, UnreadyError | ValueError)
        lacking = unready and self._limits.alike and self._study.is_untouched
        pauses = isinstance(error, PausingError | DiskFullError | TrackingError)
        return _reason(returned) if pauses or lacking else None

    def _settle(self, trial: Trial, returned: JobReturn | Exception) -> None:
        reason = _reason(returned)
        if reason is None:
            self._complete(trial)
        else:
            self._fail(trial, reason, transient=_may_pass(returned))

    def _fail(self, trial: Trial, reason: str, *, transient: bool) -> None:
        again = self._study.fail(trial, reason, transient=transient)
        log.error(
            "trial %d failed%s: %s", trial.number, ", is tried again" if again else "", reason
        )
        if not again:
            self._limits.failed(reason)

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


def _may_pass(returned: JobReturn | Exception) -> bool:
    """Was it lost with its launcher or with its process, which says nothing of the trial itself?"""
    return isinstance(returned, Exception) or isinstance(returned._return_value, PassingError)


def _reason(returned: JobReturn | Exception) -> str | None:
    """Why a job failed; None if it didn't."""
    from hydra.core.utils import JobStatus

    if isinstance(returned, Exception):
        error: Any = returned
    elif returned.status == JobStatus.COMPLETED:
        return None
    else:
        error = returned._return_value
    known = configs.one_line(error) if isinstance(error, Exception) else None
    return known or f"{type(error).__name__}: {error}"
