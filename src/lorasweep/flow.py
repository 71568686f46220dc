"""Trials that come and go one by one, in packs that workers train."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from lorasweep import config as configs
from lorasweep.config import Run
from lorasweep.jobs import note, say_pruned
from lorasweep.run import EpochReport, Failure, Finished, Report

if TYPE_CHECKING:
    from lorasweep.study.study import Study
    from lorasweep.study.trial import Trial

log = logging.getLogger(__name__)


class SweepError(RuntimeError):
    """A sweep that can't go on; the message says why."""


class Trainers(Protocol):
    """What trains runs: a Fleet, as far as a sweep needs it."""

    def room_for(self, run: Run) -> bool: ...
    def submit(self, run: Run) -> None: ...
    def drop(self, name: str) -> None: ...
    def events(self, timeout: float | None = None) -> Sequence[Report]: ...
    def __enter__(self) -> Trainers: ...
    def __exit__(self, *error: Any) -> None: ...


@dataclass
class Limits:
    """When a sweep begins no more trials: its time is up, or too many failed one after another.

    Trials that are tried again have not failed yet.
    """

    max_hours: float | None
    max_failures: int | None
    began: float
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


class Flow:
    """Trials that come and go one by one: a new one begins as soon as there is room for it."""

    def __init__(
        self,
        study: Study,
        prepare: Callable[[Trial], Run],
        fleet: Trainers,
        limits: Limits,
    ) -> None:
        self._study, self._prepare, self._fleet = study, prepare, fleet
        self._limits = limits
        self._trials: dict[str, Trial] = {}  # by their run's name, those that train
        self._dropped: set[str] = set()
        self._held: tuple[Trial, Run] | None = None  # asked for, and waiting for room
        self._probe: Run | None = None  # like the last, under a name that nobody has

    def run(self) -> None:
        """Go on until the study has enough trials, or a limit is reached."""
        self._fill()
        while self._trials:
            events = self._fleet.events()
            if not events:
                raise SweepError("the workers ended without a word of their runs; see the log")
            for event in events:
                self._take(event)
            for event in events:  # once all have reported: each is compared with all
                self._prune(event)
            self._fill()

    def _fill(self) -> None:
        """Begin trials while there is room; each knows all that was told before it."""
        while not self._limits.reached and self._hold():
            assert self._held is not None
            trial, run = self._held
            if self._trials and not self._fleet.room_for(run):
                return
            self._fleet.submit(run)
            self._trials[run.name] = trial
            self._held, self._probe = None, replace(run, name=f"{run.name}-next")

    def _hold(self) -> bool:
        """Have a trial in hand that could begin, unless all places are taken."""
        while self._held is None:
            full = self._probe is not None and not self._fleet.room_for(self._probe)
            if self._limits.reached or (self._trials and full):
                return False
            trial = self._study.next()
            if trial is None:
                return False
            try:
                run = self._prepare(trial)
            except ValueError as error:
                self._failed(trial, configs.one_line(error) or str(error), transient=False)
                continue
            trial.plan(run.trainer.max_train_epochs)
            log.info("trial %d: %s", trial.number, " ".join(trial.overrides))
            self._held = trial, run
        return True

    def _take(self, event: Report) -> None:
        trial = self._trials.get(event.run)
        if trial is None:  # of a run that was ended before
            return
        if isinstance(event, EpochReport):
            note(trial, event)
        elif isinstance(event, Failure) and event.pauses:
            raise SweepError(f"{event.run}: {event.reason}")  # the trial stays open
        elif isinstance(event, Failure):
            del self._trials[event.run]
            self._dropped.discard(event.run)  # it may come again
            self._failed(trial, event.reason, transient=event.transient)
        elif isinstance(event, Finished):
            del self._trials[event.run]
            self._ended(trial, pruned=event.dropped)  # by us, or by a driver that was killed

    def _prune(self, event: Report) -> None:
        trial = self._trials.get(event.run)
        if trial is None or event.run in self._dropped or not isinstance(event, EpochReport):
            return
        if trial.should_prune():
            say_pruned(trial)
            self._dropped.add(event.run)
            self._fleet.drop(event.run)

    def _ended(self, trial: Trial, *, pruned: bool) -> None:
        if pruned:
            self._study.prune(trial)
        else:
            self._study.complete(trial)
        if trial.best is None:
            self._limits.failed("no epoch had a finite score")
        else:
            self._limits.failures = 0

    def _failed(self, trial: Trial, reason: str, *, transient: bool) -> None:
        again = self._study.fail(trial, reason, transient=transient)
        log.error(
            "trial %d failed%s: %s", trial.number, ", is tried again" if again else "", reason
        )
        if not again:  # the death of one worker fails a whole pack
            self._limits.failed(reason)
