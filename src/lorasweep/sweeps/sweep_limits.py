"""When a sweep begins no more trials, and what becomes of those that failed."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasweep.core.failures import FailureKind

if TYPE_CHECKING:
    from lorasweep.sweeps.study.study import Study
    from lorasweep.sweeps.study.trial import Trial

log = logging.getLogger(__name__)


class SweepError(RuntimeError):
    """A sweep that can't go on; the message says why."""


@dataclass
class StopRules:
    """When a sweep begins no more trials: its time is up, or too many failed one after another.

    Trials that are tried again have not failed yet.
    """

    max_hours: float | None
    max_failures: int | None
    began: float
    same_setup: bool = False
    """Can all runs share a pack? Then the set-up that failed for one fails for all."""
    failures: int = 0  # since the last trial that ended well
    last_reason: str = ""

    @property
    def too_many_failed(self) -> bool:
        """Is it the failures that end the sweep?"""
        return self.max_failures is not None and self.failures >= self.max_failures

    @property
    def reached(self) -> bool:
        """Is no more trial to begin?"""
        hours = (time.monotonic() - self.began) / 3600
        return self.too_many_failed or (self.max_hours is not None and hours >= self.max_hours)

    def count(self, failure: str | None) -> None:
        """Count a trial that ended well, or the reason why it failed."""
        if failure is None:
            self.failures = 0
        else:
            self.failures, self.last_reason = self.failures + 1, failure


class FailedTrials:
    """Tells the study of trials that failed.

    Trials that failed during set-up wait until it is known if others could be set up: if others
    train, they failed; if none does, it is for the user to mend, and they stay open. While they
    wait they don't count for the sweep's stop rules, so that all kinds of runs are tried.
    """

    def __init__(self, study: Study, rules: StopRules) -> None:
        self._study, self._rules = study, rules
        self._in_setup: list[tuple[Trial, str]] = []

    def add(self, trial: Trial, reason: str, kind: FailureKind = FailureKind.OWN) -> None:
        """The trial failed: for good, for now if it is tried again, or during set-up."""
        if kind == FailureKind.SETUP and self._study.is_untouched:
            if reason not in [said for _, said in self._in_setup]:
                log.error("trial %d can't begin: %s", trial.number, reason)
            self._in_setup.append((trial, reason))
            return
        again = self._study.fail(trial, reason, kind)
        said = ", is tried again" if again else ""
        log.error("trial %d failed%s: %s", trial.number, said, reason)
        if not again:  # the death of one worker fails a whole pack
            self._rules.count(reason)

    def review(self, *, at_end: bool = False) -> None:
        """Decide on the trials that wait, if that is known. Raises SweepError if none began."""
        if not self._in_setup:
            return
        untouched = self._study.is_untouched
        if self._rules.same_setup or (at_end and untouched):
            if untouched:
                self._study.note_setup_failed()
            trial, reason = self._in_setup[0]
            raise SweepError(f"trial {trial.number}: {reason}")
        if not untouched:
            waiting, self._in_setup = self._in_setup, []
            for trial, reason in waiting:
                self.add(trial, reason)
