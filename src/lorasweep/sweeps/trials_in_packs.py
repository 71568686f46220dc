"""Trials that come and go one by one, in packs that workers train."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from lorasweep.config.error_messages import one_line
from lorasweep.config.run import Run
from lorasweep.runs.session import EpochReport, Failure, Finished, Report
from lorasweep.sweeps.stop_rules import Failures, Limits, SweepError
from lorasweep.sweeps.trial_processes import note, say_pruned

if TYPE_CHECKING:
    from lorasweep.sweeps.study.study import Study
    from lorasweep.sweeps.study.trial import Trial

log = logging.getLogger(__name__)


class Trainers(Protocol):
    """What trains runs: a Fleet, as far as a sweep needs it."""

    max_pack: int

    @property
    def has_room(self) -> bool: ...
    def room_for(self, run: Run) -> bool: ...
    def submit(self, run: Run) -> None: ...
    def drop(self, name: str) -> None: ...
    def events(self, timeout: float | None = None) -> Sequence[Report]: ...


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
        self._failures = Failures(study, limits)
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
            self._failures.review()
            self._fill()
        self._failures.review(at_end=True)

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
            self._failures.fail(trial, one_line(error) or str(error))
            return True
        trial.plan(run.max_train_epochs)
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
        elif isinstance(event, Failure) and event.pauses:
            raise SweepError(f"{event.run}: {event.reason}")  # the trial stays open
        elif isinstance(event, Failure):
            del self._trials[event.run]
            self._dropped.discard(event.run)  # it may come again
            if event.unready:
                self._failures.lack(trial, event.reason)
            else:
                self._failures.fail(trial, event.reason, transient=event.transient)
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
