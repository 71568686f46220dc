"""A worker process: trains packs on one device, and does what its driver says after each epoch."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from logging.handlers import QueueHandler
from multiprocessing import parent_process
from typing import TYPE_CHECKING, Any

from lorasweep.config.error_messages import one_line
from lorasweep.config.run import Run
from lorasweep.core.failures import FailureKind
from lorasweep.core.interrupts import Interrupts
from lorasweep.core.progress import Tick
from lorasweep.models.base_model import BaseModel
from lorasweep.models.gpu_memory import is_out_of_memory
from lorasweep.models.load_model import import_libraries
from lorasweep.runs.session import Failure, Finished, Report, Session, load_base

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """What a worker is told first."""

    device: str
    max_pack: int
    num_threads: int | None
    """Threads of torch, where several workers share the CPU."""
    log_levels: Mapping[str, int]
    """The driver's, by logger."""


@dataclass(frozen=True, kw_only=True)
class EpochEnd:
    """A worker has ended an epoch, or a pack; it waits for its next Instruction."""

    reports: Sequence[Report] = ()
    max_runs: int | None = None
    """Runs that can train at once here, as far as that is known."""
    last: bool = False
    """The worker ends: what broke may have broken its device's state too."""


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """What the driver answers an EpochEnd with."""

    joining: Sequence[Run] = ()
    dropping: Sequence[str] = ()
    stop: bool = False


Message = EpochEnd | Tick | logging.LogRecord


def work(connection: Connection) -> None:
    """The worker's life, until its driver says stop, stops it by a signal, or dies.

    Its options come first; the driver starts it before there is a run for it.
    """
    # Ctrl-C reaches the whole terminal: the driver answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_driver, daemon=True).start()
    with suppress(Exception):  # the code that needs them says what is wrong
        import_libraries()
    options: WorkerOptions = connection.recv()
    _set_threads(options)
    outbox = _Outbox(connection)
    _log_to(outbox, options.log_levels)
    with Interrupts(signal.SIGTERM, second_ends=False) as interrupts:
        worker = WorkerProcess(connection, outbox, options, interrupts)
        try:
            worker.serve()
        except KeyboardInterrupt as stop:
            worker.close(stop)
        else:
            worker.close(None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is written; to take the libraries down takes a second or two


class _Outbox:
    """The way to the driver, for all threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def put_nowait(self, message: Message) -> None:
        """Send; without a driver nobody listens, and the worker is about to end."""
        with self._lock:
            try:
                self._connection.send(message)
            except (BrokenPipeError, ConnectionResetError):
                return


class WorkerProcess:
    """Sessions, one for each kind of run, over the base model that was loaded last."""

    def __init__(
        self,
        connection: Connection,
        outbox: _Outbox,
        options: WorkerOptions,
        interrupts: Interrupts,
    ) -> None:
        self._connection, self._outbox, self._options = connection, outbox, options
        self._interrupts = interrupts
        self._sessions: list[Session] = []
        self._names: list[str] = []  # runs of the pack that have not ended yet
        self._base: tuple[object, BaseModel] | None = None

    def serve(self) -> None:
        """Train pack after pack, until one breaks the device's state."""
        end = EpochEnd()
        runs: Sequence[Run] = ()
        while not end.last:
            runs = runs or self._next(end).joining
            end, runs = self._train(runs) if runs else (EpochEnd(), ())
        self._outbox.put_nowait(end)

    def close(self, error: BaseException | None) -> None:
        """Write what waits for MLflow; runs that still train are marked there."""
        for session in self._sessions:
            session.__exit__(type(error) if error else None, error, None)
        self._sessions = []

    def _next(self, end: EpochEnd) -> Instruction:
        """Report the end of an epoch and wait for the next instruction."""
        self._outbox.put_nowait(end)
        ended = {r.run for r in end.reports if isinstance(r, Finished | Failure)}
        self._names = [name for name in self._names if name not in ended]
        instruction: Instruction = self._connection.recv()
        if instruction.stop:
            raise KeyboardInterrupt
        return instruction

    def _train(self, runs: Sequence[Run]) -> tuple[EpochEnd, Sequence[Run]]:
        """Train a pack and runs that join it: its end, and runs of another kind that come next."""
        self._names = [run.name for run in runs]
        session = None
        try:
            session = self._session(runs[0])
            for reports in session.train([self._here(run) for run in runs]):
                others = self._join_and_drop(session, reports)
                if others:  # this pack has just ended, which the driver knows
                    return EpochEnd(), others
            return EpochEnd(), ()
        except Exception as error:  # whatever broke this pack, the sweep goes on
            return self._broken(session, error), ()

    def _join_and_drop(self, session: Session, reports: Sequence[Report]) -> Sequence[Run]:
        """Do as the driver says at the end of an epoch; runs that can't share this pack."""
        instruction = self._next(EpochEnd(reports=reports, max_runs=session.max_runs))
        joining = instruction.joining
        if joining and not session.first.can_share_pack(self._here(joining[0])):
            return joining
        for run in joining:
            self._names.append(run.name)
            session.join(self._here(run))
        dropped = [session.drop(name) for name in instruction.dropping if name in session.names]
        if dropped:  # the driver may have others for their places
            return self._join_and_drop(session, dropped)
        return ()

    def _broken(self, session: Session | None, error: Exception) -> EpochEnd:
        if session is not None:
            self._sessions.remove(session)
            session.__exit__(type(error), error, None)
        shared = (
            isinstance(error, RuntimeError) and is_out_of_memory(error) and len(self._names) > 1
        )
        failures = Failure.of_pack(self._names, error, FailureKind.RETRY if shared else None)
        fewer = len(self._names) // 2 if shared else None
        return EpochEnd(reports=failures, max_runs=fewer, last=one_line(error) is None)

    def _session(self, run: Run) -> Session:
        """The session of runs that share a pack with this one, kept or new, with its base model."""
        run = self._here(run)
        for session in self._sessions:
            if session.first.can_share_pack(run):
                return session
        session = Session(
            run,
            max_pack=self._options.max_pack,
            load=self._load,
            show=self._outbox.put_nowait,
            interrupts=self._interrupts,
        )
        self._sessions.append(session)
        return session

    def _load(self, run: Run, device: str) -> BaseModel:
        key = (run.model, run.trainer.precision, run.trainer.gradient_checkpointing)
        if self._base is None or self._base[0] != key:
            self._base = None  # two don't fit everywhere
            for session in self._sessions[:-1]:
                session.__exit__(None, None, None)
            self._sessions = self._sessions[-1:]
            self._base = (key, load_base(run, device))
        return self._base[1]

    def _here(self, run: Run) -> Run:
        return replace(run, trainer=replace(run.trainer, device=self._options.device))


class _LogHandler(QueueHandler):
    """Sends log lines to the driver, formatted, for it to show and to write."""

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.put_nowait(record)


def _log_to(outbox: Any, levels: Mapping[str, int]) -> None:
    root = logging.getLogger()
    root.handlers = [_LogHandler(outbox)]
    for name, level in levels.items():
        logging.getLogger(name or None).setLevel(level)


def _die_with_driver() -> None:
    """End at once when the driver is gone: another may take the sweep up, and we'd disturb it."""
    driver = parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)


def _set_threads(options: WorkerOptions) -> None:
    import torch

    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    if options.device.startswith("cuda"):
        torch.cuda.set_device(options.device)
