"""Worker processes, one a device, that train the runs of a sweep in packs and take new ones in.

Driver and workers go in step: a worker that ended an epoch waits for its next instruction, so that
what is decided on that epoch's scores counts from the next one on.
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
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pickle import UnpicklingError
from types import TracebackType
from typing import TYPE_CHECKING

from lorasweep.config.run import Run
from lorasweep.core.failures import FailureKind
from lorasweep.core.progress import Screen, Tick
from lorasweep.runs.session import Failure, Finished, Report
from lorasweep.sweeps.worker_process import EpochEnd, Instruction, WorkerOptions, work
from lorasweep.tracking.tracker import mark_broken

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

log = logging.getLogger(__name__)

STOP_SECONDS = 60.0
"""How long a worker may write what waits for MLflow before it is killed."""


class WorkerPool:
    """One worker process a device, for the life of a sweep; leaving the `with` stops them.

    A pack that has ended an epoch waits until its events were taken by `events` and the next call
    of it begins: what is dropped and submitted between the two calls counts from the next epoch.
    """

    def __init__(self, devices: Sequence[str], max_pack: int) -> None:
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._screen = Screen()
        self.devices, self.max_pack = tuple(devices), max_pack
        threads = max(1, (os.cpu_count() or 1) // len(devices)) if len(devices) > 1 else None
        self.workers = [
            Worker(
                WorkerOptions(
                    device=device,
                    max_pack=max_pack,
                    num_threads=threads if device == "cpu" else None,
                    log_levels={},
                ),
                _label(devices, index),
                self._inbox,
                self._screen,
            )
            for index, device in enumerate(devices)
        ]

    @contextmanager
    def ready(self, number: int | None) -> Iterator[None]:
        """Within, workers import what they need before there is a run for them: at most `number`.

        That takes seconds, which a driver needs to compose and check its jobs.
        """
        for worker in self.workers[:number]:
            worker.start()
        try:
            yield
        finally:
            self._stop()

    @property
    def has_room(self) -> bool:
        """Would some run start or join a pack at the next epoch?"""
        return any(worker.num_free for worker in self.workers)

    def submit(self, run: Run) -> bool:
        """Train the run from the next epoch on, on the device with the fewest runs.

        False if it can't start or join a pack anywhere yet: the driver keeps it and asks again.
        """
        fitting = [worker for worker in self.workers if worker.has_room(run)]
        if fitting:
            min(fitting, key=lambda worker: len(worker.runs)).add(run)
        return bool(fitting)

    def drop(self, name: str) -> None:
        """Let the run leave its pack at the end of the epoch; then comes its Finished."""
        for worker in self.workers:
            if name in worker.runs:
                worker.drop(name)

    def events(self) -> list[Report]:
        """Wait for what happens next, at least one event; [] with nothing to do.

        All reports of one epoch of a pack come in one list.
        """
        found: list[Report] = []
        while not found:
            for worker in self.workers:
                worker.go_on()
            if self._inbox.empty() and not any(worker.runs for worker in self.workers):
                return []
            found += self._read(self._inbox.get())
        while not self._inbox.empty():
            found += self._read(self._inbox.get())
        return found

    def __enter__(self) -> WorkerPool:
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
        for worker in self.workers:
            worker.stop()
        until = time.monotonic() + STOP_SECONDS
        for worker in self.workers:
            worker.join(until)

    def _read(self, message: _Message) -> Sequence[Report]:
        worker = message.worker
        if isinstance(message.content, Finished):  # dropped before its worker knew of it
            return [message.content]
        if message.process is not worker.process:
            return []  # from one that has been replaced
        return worker.died() if message.content is None else worker.note(message.content)


@dataclass(frozen=True)
class _Message:
    """What came from a worker; no content: its process has died."""

    worker: Worker
    content: EpochEnd | Finished | None
    process: SpawnProcess | None = None


class Worker:
    """A device, its runs, and the process that trains there, if one was needed yet."""

    def __init__(
        self,
        options: WorkerOptions,
        label: str,
        inbox: queue.SimpleQueue[_Message],
        screen: Screen,
    ) -> None:
        self.options, self.label, self.inbox, self.screen = options, label, inbox, screen
        self.runs: dict[str, Run] = {}  # that train or will from the next epoch on
        self.process: SpawnProcess | None = None
        self._joining: list[Run] = []  # of the runs those that the process has not been told of
        self._dropping: set[str] = set()  # names of runs that leave at the end of the epoch
        self._has_options = False
        self._is_waiting = False  # for its next instruction
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
        bounds = (self.options.max_pack, self._max_runs if self.runs else None, self._at_most)
        most = min(bound for bound in bounds if bound is not None)
        staying = [name for name in self.runs if name not in self._dropping]
        return max(0, most - len(staying))

    def add(self, run: Run) -> None:
        """Let the run train here; a process is started if none is there."""
        if not self.runs:
            self._max_runs = run.trainer.max_runs
        self.runs[run.name] = run
        self._joining.append(run)
        self._open()

    def start(self) -> None:
        """Let a process get ready for a run that will come; one that died before is replaced."""
        died_early = self.process and not self._has_options and not self.process.is_alive()
        if self.process is None or died_early:
            self._start()

    def drop(self, name: str) -> None:
        """Let one of its runs leave at the end of the epoch."""
        if any(run.name == name for run in self._joining):  # the process has not heard of it
            self._joining = [run for run in self._joining if run.name != name]
            del self.runs[name]
            self.inbox.put(_Message(self, Finished(run=name, dropped=True)))
        else:
            self._dropping.add(name)

    def go_on(self) -> None:
        """Tell a process that waits which runs join and which leave."""
        if not self._is_waiting or not self.runs:
            return
        instruction = Instruction(joining=tuple(self._joining), dropping=tuple(self._dropping))
        self._joining, self._dropping, self._is_waiting = [], set(), False
        self._send(instruction)

    def note(self, end: EpochEnd) -> Sequence[Report]:
        """The process has come to the end of an epoch."""
        self._is_waiting, self._max_runs = not end.last, end.max_runs
        self._has_begun = True
        for report in end.reports:
            if isinstance(report, Finished | Failure):
                self.runs.pop(report.run, None)
                self._dropping.discard(report.run)
        if end.last:
            self._at_most = end.max_runs or self._at_most
            self.process = None
            if self.runs:
                self._open()
        return end.reports

    def died(self) -> Sequence[Report]:
        """The process has died: its runs failed, but those it had not heard of go to another."""
        assert self.process is not None
        self.join(time.monotonic() + STOP_SECONDS)  # it may live, if it's the reader that broke
        if not self._has_begun:  # what stops one process from beginning stops the next
            self._joining = []
        may_go_well = self._has_begun or (self.process.exitcode or 0) < 0
        reason = f"its worker on {self.options.device} died ({_cause(self.process.exitcode)})"
        unheard = {run.name: run for run in self._joining}
        lost = [run for name, run in self.runs.items() if name not in unheard]
        if lost:
            log.warning("%s: %s", ", ".join(run.name for run in lost), reason)
        for run in lost:
            mark_broken(run.tracking, run.output_root, run.output_dir, reason)
        kind = FailureKind.RETRY if may_go_well else FailureKind.OWN
        events: list[Report] = [
            Finished(run=run.name, dropped=True)
            if run.name in self._dropping
            else Failure(run=run.name, reason=reason, kind=kind)
            for run in lost
        ]
        self.runs, self._dropping = unheard, set()
        self.process, self._is_waiting = None, False
        if self.runs:
            self._open()
        return events

    def stop(self) -> None:
        """Let the process end: at once if it waits, else by a signal."""
        if self.process is None:
            return
        if self._is_waiting:
            self._send(Instruction(stop=True))
        else:
            self.process.terminate()

    def join(self, until: float) -> None:
        """Wait until the process has ended, and kill it after `until`."""
        if self.process is None:
            return
        self.process.join(max(0.0, until - time.monotonic()))
        if self.process.is_alive():
            log.warning("the worker on %s did not stop and is killed", self.options.device)
            self.process.kill()
            self.process.join()
        self._reader.join()

    def _open(self) -> None:
        """Have a process at work, with the log levels of now."""
        self.start()
        if not self._has_options:
            self._has_options = True
            self._send(replace(self.options, log_levels=_log_levels()))

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
        self._has_options = self._is_waiting = self._has_begun = False
        self._reader = threading.Thread(
            target=self._listen, args=(self._connection, process), daemon=True
        )
        self._reader.start()

    def _listen(self, connection: Connection, process: SpawnProcess) -> None:
        """Show what the process says, and pass on what it reports."""
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
                    self.inbox.put(_Message(self, message, process))
        finally:  # whatever happened here: the driver waits for a message
            self.inbox.put(_Message(self, None, process))

    def _log(self, record: logging.LogRecord) -> None:
        if self.label:
            record.msg = f"[{self.label}] {record.msg}"
        logging.getLogger(record.name).handle(record)

    def _send(self, message: WorkerOptions | Instruction) -> None:
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return  # it has died, and its reader says so


def _label(devices: Sequence[str], index: int) -> str:
    """How log lines and bars name a worker: not at all if there is one."""
    device = devices[index]
    if len(devices) == 1:
        return ""
    return device if devices.count(device) == 1 else f"{device}/{index}"


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
