"""Trials that come and go one by one, in packs that workers train."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lorasweep import config as configs
from lorasweep.config import Run
from lorasweep.run import EpochReport, Failure, Finished, Report
from lorasweep.trials import note, say_pruned

if TYPE_CHECKING:
    from lorasweep.study.study import Study
    from lorasweep.study.trial import Trial

log = logging.getLogger(__name__)


class SweepError(RuntimeError):
    """A sweep that can't go on; the message says why."""


class Trainers(Protocol):
    """What trains runs: a Fleet, as far as a sweep needs it."""

    max_pack: int

    @property
    def has_room(self) -> bool: ...
    def room_for(self, run: Run) -> bool: ...
    def submit(self, run: Run) -> None: ...
    def drop(self, name: str) -> None: ...
    def events(self, timeout: float | None = None) -> Sequence[Report]: ...


@dataclass
class Limits:
    """When a sweep begins no more trials: its time is up, or too many failed one after another.

    Trials that are tried again have not failed yet.
    """

    max_hours: float | None
    max_failures: int | None
    began: float
    alike: bool = False
    """Can all runs share a pack? Then what keeps one from beginning keeps all."""
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
        self._held: list[tuple[Trial, Run]] = []  # asked for, and they share no pack that trains

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
        """Begin trials while there is room; each knows all that was told before it.

        One that can share no pack that trains is held until a device is free, and others are asked
        for meanwhile: at most a pack of them, for they would know more later.
        """
        self._begin_held()
        while self._may_ask and self._ask():
            self._begin_held()

    @property
    def _may_ask(self) -> bool:
        full = len(self._held) >= self._fleet.max_pack or not self._fleet.has_room
        return not full and not self._limits.reached

    def _ask(self) -> bool:
        """Ask the study for a trial; False if it has no more."""
        trial = self._study.next()
        if trial is None:
            return False
        try:
            run = self._prepare(trial)
        except ValueError as error:
            self._failed(trial, configs.one_line(error) or str(error), transient=False)
            return True
        trial.plan(run.trainer.max_train_epochs)
        log.info("trial %d: %s", trial.number, " ".join(trial.overrides))
        self._held.append((trial, run))
        return True

    def _begin_held(self) -> None:
        waiting = []
        for trial, run in self._held:
            if self._limits.reached or not self._fleet.room_for(run):
                waiting.append((trial, run))
                continue
            self._fleet.submit(run)
            self._trials[run.name] = trial
        self._held = waiting

    def _take(self, event: Report) -> None:
        trial = self._trials.get(event.run)
        if trial is None:  # of a run that was ended before
            return
        if isinstance(event, EpochReport):
            note(trial, event)
        elif isinstance(event, Failure) and self._pauses(event):
            if not event.pauses:
                self._study.note_lack()
            raise SweepError(f"{event.run}: {event.reason}")  # the trial stays open
        elif isinstance(event, Failure):
            del self._trials[event.run]
            self._dropped.discard(event.run)  # it may come again
            self._failed(trial, event.reason, transient=event.transient)
        elif isinstance(event, Finished):
            del self._trials[event.run]
            self._ended(trial, pruned=event.dropped)  # by us, or by a driver that was killed

    def _pauses(self, failure: Failure) -> bool:
        """Is it for the user to mend? Of what a pack shares, only if all runs lack it."""
        lacking = failure.unready and self._limits.alike and self._study.is_untouched
        return failure.pauses or lacking

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
