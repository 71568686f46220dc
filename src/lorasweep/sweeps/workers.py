"""Worker processes, one a device, that train the runs of a sweep in packs and take new ones in.

Driver and workers go in step: a worker that ended an epoch waits for its turn, so that what is
decided on that epoch's scores counts from the next one on.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import resource_tracker
from pickle import UnpicklingError
from types import TracebackType
from typing import TYPE_CHECKING

from lorasweep.config.run import Run
from lorasweep.core.progress import Screen, Tick
from lorasweep.models.devices import choose_devices
from lorasweep.runs.session import Failure, Finished, Report
from lorasweep.sweeps.worker_process import Boundary, Orders, Turn, work
from lorasweep.tracking.tracker import mark_broken

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

__all__ = ["Fleet", "choose_devices"]

log = logging.getLogger(__name__)

STOP_SECONDS = 60.0
"""How long a worker may write what waits for MLflow before it is killed."""


class Fleet:
    """One worker process a device, for the life of a sweep; leaving the `with` stops them.

    A pack that has ended an epoch waits until its events were taken by `events` and the next call
    of it begins: what is dropped and submitted between the two calls counts from the next epoch.
    """

    def __init__(self, devices: Sequence[str], max_pack: int) -> None:
        self._inbox: queue.SimpleQueue[_Letter] = queue.SimpleQueue()
        self._screen = Screen()
        self.devices, self.max_pack = tuple(devices), max_pack
        self._queue: list[Run] = []
        threads = max(1, (os.cpu_count() or 1) // len(devices)) if len(devices) > 1 else None
        self._seats = [
            _Seat(
                Orders(
                    device=device,
                    max_pack=max_pack,
                    num_threads=threads if device == "cpu" else None,
                    log_levels={},
                ),
                _label(devices, place),
                self._inbox,
                self._screen,
            )
            for place, device in enumerate(devices)
        ]

    @contextmanager
    def ready(self, number: int | None) -> Iterator[None]:
        """Within, workers import what they need before there is a run for them: at most `number`.

        That takes seconds, which a driver needs to compose and check its jobs.
        """
        for seat in self._seats[:number]:
            seat.start()
        try:
            yield
        finally:
            self._stop()

    @property
    def has_room(self) -> bool:
        """Would some run start or join a pack at the next epoch?"""
        return not self._queue and any(seat.num_free for seat in self._seats)

    def room_for(self, run: Run) -> bool:
        """Would the run start or join a pack at the next epoch?"""
        return not self._queue and any(seat.has_room(run) for seat in self._seats)

    def submit(self, run: Run) -> None:
        """Train the run as soon as there is room, on the device with the fewest runs."""
        self._queue.append(run)
        self._place()

    def drop(self, name: str) -> None:
        """Let the run leave its pack at the end of the epoch; then comes its Finished."""
        if any(seat.drop(name) for seat in self._seats):
            return
        before = len(self._queue)
        self._queue = [run for run in self._queue if run.name != name]
        if len(self._queue) < before:
            self._inbox.put(_Letter(None, Finished(run=name, dropped=True)))

    def events(self, timeout: float | None = None) -> list[Report]:
        """What has happened, at least one event; [] after `timeout` seconds or with nothing to do.

        All reports of one epoch of a pack come in one list.
        """
        until = None if timeout is None else time.monotonic() + timeout
        found: list[Report] = []
        while not found:
            self._place()
            for seat in self._seats:
                seat.take_turn()
            if self._inbox.empty() and not any(seat.runs for seat in self._seats):
                return []
            left = None if until is None else max(0.0, until - time.monotonic())
            try:
                found += self._read(self._inbox.get(timeout=left))
            except queue.Empty:
                return []
        while not self._inbox.empty():
            found += self._read(self._inbox.get())
        return found

    def __enter__(self) -> Fleet:
        self._screen.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is KeyboardInterrupt:  # a second one ends us, and the workers die with us
            log.info("stopping at the end of this step; once more stops at once")
        self._stop()
        self._screen.__exit__(kind, error, trace)

    def _stop(self) -> None:
        for seat in self._seats:
            seat.stop()
        until = time.monotonic() + STOP_SECONDS
        for seat in self._seats:
            seat.join(until)

    def _place(self) -> None:
        """Give runs that wait to workers with room, in order."""
        waiting = []
        for run in self._queue:
            seats = [seat for seat in self._seats if seat.has_room(run)]
            if seats:
                min(seats, key=lambda seat: len(seat.runs)).add(run)
            else:
                waiting.append(run)
        self._queue = waiting

    def _read(self, letter: _Letter) -> Sequence[Report]:
        if letter.seat is None:
            assert not isinstance(letter.content, Boundary | None)
            return [letter.content]
        if letter.process is not letter.seat.process:
            return []  # from one that has been replaced
        if isinstance(letter.content, Boundary):
            return letter.seat.note(letter.content)
        return letter.seat.bury()


class _Letter:
    """What a worker's reader found; no content: the worker has died."""

    def __init__(
        self,
        seat: _Seat | None,
        content: Boundary | Report | None,
        process: SpawnProcess | None = None,
    ) -> None:
        self.seat, self.content, self.process = seat, content, process


class _Seat:
    """A device and the process that works there, if one was needed yet."""

    def __init__(
        self, orders: Orders, label: str, inbox: queue.SimpleQueue[_Letter], screen: Screen
    ) -> None:
        self.orders, self.label, self.inbox, self.screen = orders, label, inbox, screen
        self.runs: dict[str, Run] = {}
        self.dropping: set[str] = set()
        self.process: SpawnProcess | None = None
        self._joining: list[Run] = []
        self._has_orders = False
        self._is_waiting = False  # for its turn
        self._has_begun = False
        self._max_runs: int | None = None  # of the pack that trains
        self._at_most: int | None = None  # since a larger pack ran out of memory

    def has_room(self, run: Run) -> bool:
        """Can the run train here from the next epoch on?"""
        if not self.runs:
            return True
        if run.name in self.runs or self.num_free == 0:
            return False
        return next(iter(self.runs.values())).can_share_pack(run)

    @property
    def num_free(self) -> int:
        """How many runs could join those that stay; of an empty one, how many could start."""
        bounds = (self.orders.max_pack, self._max_runs if self.runs else None, self._at_most)
        most = min(bound for bound in bounds if bound is not None)
        staying = [name for name in self.runs if name not in self.dropping]
        return max(0, most - len(staying))

    def add(self, run: Run) -> None:
        """Let the run train here; a process is started if none is there."""
        if not self.runs:
            self._max_runs = None
        self.runs[run.name] = run
        self._joining.append(run)
        self._open()

    def start(self) -> None:
        """Let a process get ready for a run that will come; one that died before is replaced."""
        died_early = self.process and not self._has_orders and not self.process.is_alive()
        if self.process is None or died_early:
            self._start()

    def drop(self, name: str) -> bool:
        """Let the run leave at its next turn; False if it isn't here."""
        if name not in self.runs:
            return False
        if any(run.name == name for run in self._joining):  # the worker has not heard of it
            self._joining = [run for run in self._joining if run.name != name]
            del self.runs[name]
            self.inbox.put(_Letter(None, Finished(run=name, dropped=True)))
        else:
            self.dropping.add(name)
        return True

    def take_turn(self) -> None:
        """Let a worker that waits go on, with who joins and who leaves."""
        if not self._is_waiting or not self.runs:
            return
        turn = Turn(joining=tuple(self._joining), dropping=tuple(self.dropping))
        self._joining, self._is_waiting = [], False
        self.dropping = set()
        self._send(turn)

    def note(self, boundary: Boundary) -> Sequence[Report]:
        """A worker has come to the end of an epoch."""
        self._is_waiting, self._max_runs = not boundary.last, boundary.max_runs
        self._has_begun = True
        for report in boundary.reports:
            if isinstance(report, Finished | Failure):
                self.runs.pop(report.run, None)
                self.dropping.discard(report.run)
        if boundary.last:
            self._at_most = boundary.max_runs or self._at_most
            self.process = None
            self._restart()
        return boundary.reports

    def bury(self) -> Sequence[Report]:
        """The worker has died: its runs failed, but those it had not heard of go to another."""
        assert self.process is not None
        self.join(time.monotonic() + STOP_SECONDS)  # it may live, if it's the reader that broke
        if not self._has_begun:  # what stops one worker from beginning stops the next
            self._joining = []
        may_go_well = self._has_begun or (self.process.exitcode or 0) < 0
        reason = f"its worker on {self.orders.device} died ({_cause(self.process.exitcode)})"
        unheard = {run.name for run in self._joining}
        lost = [run for name, run in self.runs.items() if name not in unheard]
        if lost:
            log.warning("%s: %s", ", ".join(run.name for run in lost), reason)
        for run in lost:
            mark_broken(run.tracking, run.output_root, run.output_dir, reason)
        self.runs = {run.name: run for run in self._joining}
        self.process, self._is_waiting = None, False
        events: list[Report] = [
            Finished(run=run.name, dropped=True)
            if run.name in self.dropping
            else Failure(run=run.name, reason=reason, transient=may_go_well)
            for run in lost
        ]
        self.dropping = set()
        self._restart()
        return events

    def stop(self) -> None:
        """Let the process end: at once if it waits, else by a signal."""
        if self.process is None:
            return
        if self._is_waiting:
            self._send(Turn(stop=True))
        else:
            self.process.terminate()

    def join(self, until: float) -> None:
        """Wait until the process has ended, and kill it after `until`."""
        if self.process is None:
            return
        self.process.join(max(0.0, until - time.monotonic()))
        if self.process.is_alive():
            log.warning("the worker on %s did not stop and is killed", self.orders.device)
            self.process.kill()
            self.process.join()
        self._reader.join()

    def _restart(self) -> None:
        if self.runs:
            self._open()

    def _open(self) -> None:
        """Have a process at work, with the log levels of now."""
        self.start()
        if not self._has_orders:
            self._has_orders = True
            self._send(replace(self.orders, log_levels=_log_levels()))

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        process = context.Process(
            target=work, args=(theirs,), name=f"lorasweep {self.label}", daemon=True
        )
        # Ctrl-C is the driver's to answer; blocked here, it can't break a worker's start either
        resource_tracker.ensure_running()  # which would unblock it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that the reader meets the end when the worker dies
        self.process = process
        self._has_orders = self._is_waiting = self._has_begun = False
        self._reader = threading.Thread(
            target=self._listen, args=(self._connection, process), daemon=True
        )
        self._reader.start()

    def _listen(self, connection: Connection, process: SpawnProcess) -> None:
        """Show what the worker says, and pass on what it reports."""
        try:
            while True:
                try:
                    message = connection.recv()
                except (EOFError, OSError, UnpicklingError):  # it may die in the middle of a word
                    break
                if isinstance(message, Tick):
                    self.screen.show(message, self.label)
                elif isinstance(message, logging.LogRecord):
                    self._log(message)
                else:
                    self.inbox.put(_Letter(self, message, process))
        finally:  # whatever happened here: the driver waits for a letter
            self.inbox.put(_Letter(self, None, process))

    def _log(self, record: logging.LogRecord) -> None:
        if self.label:
            record.msg = f"[{self.label}] {record.msg}"
        logging.getLogger(record.name).handle(record)

    def _send(self, message: Orders | Turn) -> None:
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return  # it has died, and its reader says so


def _label(devices: Sequence[str], place: int) -> str:
    """How log lines and bars name a worker: not at all if there is one."""
    device = devices[place]
    if len(devices) == 1:
        return ""
    return device if devices.count(device) == 1 else f"{device}/{place}"


def _log_levels() -> dict[str, int]:
    """The levels that were set, by logger; '' is the root."""
    found = {
        name: logger.level
        for name, logger in logging.Logger.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and logger.level
    }
    return {"": logging.getLogger().level, **found}


def _cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exit code {exitcode}"
