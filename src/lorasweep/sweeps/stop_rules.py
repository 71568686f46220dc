"""When a sweep begins no more trials, and what becomes of those that failed."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorasweep.sweeps.study.study import Study
    from lorasweep.sweeps.study.trial import Trial

log = logging.getLogger(__name__)


class SweepError(RuntimeError):
    """A sweep that can't go on; the message says why."""


@dataclass
class Limits:
    """When a sweep begins no more trials: its time is up, or too many failed one after another.

    Trials that are tried again have not failed yet.
    """

    max_hours: float | None
    max_failures: int | None
    began: float
    alike: bool = False
    """Can all runs share a pack? Then what one lacks to begin all lack."""
    failures: int = 0  # since the last trial that ended well
    last_reason: str = ""

    @property
    def hopeless(self) -> bool:
        """Have too many failed?"""
        return self.max_failures is not None and self.failures >= self.max_failures

    @property
    def reached(self) -> bool:
        """Is no more trial to begin?"""
        hours = (time.monotonic() - self.began) / 3600
        return self.hopeless or (self.max_hours is not None and hours >= self.max_hours)

    def failed(self, reason: str) -> None:
        """Count a failure."""
        self.failures, self.last_reason = self.failures + 1, reason


class Failures:
    """Tells the study of trials that failed.

    Those that could not even begin, for something that they share with others was not to be had,
    wait until it is known who lacks it: if others train, they failed; if none does, it is for the
    user to mend, and they stay open. While they wait they are no failures of the sweep's limits, so
    that all kinds of runs are tried.
    """

    def __init__(self, study: Study, limits: Limits) -> None:
        self._study, self._limits = study, limits
        self._lacking: list[tuple[Trial, str]] = []

    def fail(self, trial: Trial, reason: str, *, transient: bool = False) -> None:
        """The trial failed, for now if it was `transient` and may be tried again."""
        again = self._study.fail(trial, reason, transient=transient)
        said = ", is tried again" if again else ""
        log.error("trial %d failed%s: %s", trial.number, said, reason)
        if not again:  # the death of one worker fails a whole pack
            self._limits.failed(reason)

    def lack(self, trial: Trial, reason: str) -> None:
        """The trial could not begin."""
        if not self._study.is_untouched:
            self.fail(trial, reason)
            return
        if reason not in [said for _, said in self._lacking]:
            log.error("trial %d can't begin: %s", trial.number, reason)
        self._lacking.append((trial, reason))

    def review(self, *, at_end: bool = False) -> None:
        """Decide on the trials that wait, if that is known. Raises SweepError if all lack it."""
        if not self._lacking:
            return
        untouched = self._study.is_untouched
        if self._limits.alike or (at_end and untouched):
            if untouched:
                self._study.note_lack()
            trial, reason = self._lacking[0]
            raise SweepError(f"trial {trial.number}: {reason}")
        if not untouched:
            for trial, reason in self._lacking:
                self.fail(trial, reason)
            self._lacking = []
