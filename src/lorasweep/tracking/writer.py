"""One thread that sends what waits in spools, in order, behind the training."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorasweep.tracking.operations import Delivery, Open, Operation, RunGone, RunState, Store
from lorasweep.tracking.spool import Spool, SpoolError
from lorasweep.tracking.store import TrackingError, explained, quieten_mlflow
from lorasweep.tracking.trouble import answers, is_of_store

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between tries
CLOSING_PAUSE = 2.0  # at most, once the end waits for it
TRIES = 5  # of a write that fails while the store answers otherwise
LINGER_SECONDS = 0.9  # that all calls together wait for a store that may hang
SILENCE = 4  # times the patience: the end of waiting for a call that never returns


@dataclass
class _Waiting:
    """An operation in a spool; its content is read when its turn comes."""

    spool: Spool
    number: int
    again: bool
    """It may have arrived before, at least in part."""
    failures: int = 0


class Writer:
    """The sending thread and the operations that wait for it, in order; they are on the disk.

    While the store is in trouble, everything waits and is tried again, with growing pauses. What
    the store doesn't take for the data's sake is put aside in its spool, with a warning. `connect`
    None: nothing is sent. `can_hang` bounds what `linger` waits.
    """

    def __init__(
        self, connect: Callable[[], Store] | None, *, place: str, patience: float, can_hang: bool
    ) -> None:
        self._connect, self._place, self._patience = connect, place, patience
        self.can_hang = can_hang
        self._linger = LINGER_SECONDS if can_hang else None
        self._waiting: deque[_Waiting] = deque()
        self._lent: set[Spool] = set()  # released once all of it is sent
        self._change = threading.Condition()
        self._store: Store | None = None
        self._trouble: Exception | None = None
        self._is_loaded = self._closing = self._hurried = self._stopped = False
        self._ended = connect is None
        self._progress = time.monotonic()
        # A daemon: an interpreter that exits without close() must not hang on a dead server.
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        if connect is not None:
            self._thread.start()

    def put(self, spool: Spool, run: RunState, operation: Operation) -> None:
        """Write an operation to its spool, to be sent. Raises TrackingError if the disk is full."""
        number = spool.put(run, operation)
        self._queue([_Waiting(spool, number, again=False)])

    def replay(self, spool: Spool, *, lent: bool = False) -> None:
        """Send what an earlier process left in a spool; one that is `lent` is released then."""
        if lent:
            self._lent.add(spool)
        self._queue([_Waiting(spool, number, again=True) for number in spool.waiting()])
        with self._change:
            self._give_back(spool)

    def keep(self, spool: Spool) -> bool:
        """Don't release a spool that was lent; False if it was not, or is released already."""
        with self._change:
            is_held = spool in self._lent
            self._lent.discard(spool)
            return is_held

    def drop(self, spool: Spool) -> None:
        """Send nothing more of a spool; it stays on the disk."""
        with self._change:
            self._waiting = deque(one for one in self._waiting if one.spool is not spool)

    def ready(self) -> None:
        """Wait until the store is open; TrackingError if it can't be, or doesn't answer in time."""
        with self._change:
            # loading MLflow takes its time, and is not the server's fault
            self._change.wait_for(lambda: self._is_loaded or self._ended)
            self._change.wait_for(
                lambda: bool(self._store or self._trouble or self._ended),
                timeout=self._patience if self.can_hang else None,
            )
            if self._store or self._connect is None:
                return
            trouble = self._trouble
        if isinstance(trouble, TrackingError):
            raise trouble
        reason = explained(trouble) if trouble else f"no answer in {self._patience:g} s"
        raise TrackingError(
            f"tracking.uri={self._place} can't be opened: {reason}; start the server, or give "
            "tracking.offline=true to send everything later"
        ) from trouble

    def run_id(self, uid: str) -> str:
        """MLflow's id of a run; waits until it is begun there. TrackingError where it can't be."""
        with self._change:
            self._change.wait_for(
                lambda: self._knows(uid) or self._trouble or self._ended or not self._waiting
            )
            if self._store is None or uid not in self._store.run_ids:
                raise TrackingError("MLflow's id of the run is not known: the run is not sent yet")
            return self._store.run_ids[uid]

    def linger(self) -> None:
        """Wait until everything is sent, while the store does well; within a second in all if it
        can hang."""
        if self._linger is not None and self._linger <= 0:
            return
        begun = time.monotonic()
        with self._change:
            self._change.wait_for(
                lambda: not self._waiting or bool(self._trouble) or self._ended, self._linger
            )
        if self._linger is not None:
            self._linger -= time.monotonic() - begun

    def close(self, at_most: float | None = None) -> bool:
        """Send what still waits and end the thread; False if something is left.

        It gives up once the store was in trouble for its patience, or after `at_most` seconds.
        """
        begun = time.monotonic()
        with self._change:
            self._closing = True
            self._change.notify_all()
            while not self._ended:
                left = self._left(max(begun, self._progress))
                if at_most is not None:
                    left = min(left, begun + at_most - time.monotonic())
                if left <= 0:
                    break
                self._change.wait(timeout=left)
            self._stopped = True
            self._change.notify_all()
            return not self._waiting

    def abandon(self) -> None:
        """Send nothing more, and wait for nothing."""
        with self._change:
            self._stopped = True
            self._change.notify_all()

    @property
    def trouble(self) -> Exception | None:
        """What keeps the store from taking anything now."""
        return self._trouble

    def _left(self, since: float) -> float:
        """Seconds until the end gives up."""
        patience = self._patience if self._trouble else SILENCE * self._patience
        return since + patience - time.monotonic()

    def _knows(self, uid: str) -> bool:
        return self._store is not None and uid in self._store.run_ids

    def _queue(self, found: list[_Waiting]) -> None:
        if self._connect is None:
            return
        with self._change:
            self._waiting += [one for one in found if not one.spool.is_blocked]
            self._change.notify_all()

    def _work(self) -> None:
        pause = FIRST_PAUSE
        try:
            self._load()
            while not self._is_done():
                trouble = self._step()
                if trouble is None:
                    pause = FIRST_PAUSE
                    continue
                self._note_trouble(trouble)
                self._rest(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        except Exception as error:  # the spools' disk fails, say; what waits is safe there
            log.exception("what is logged is no longer sent to MLflow")
            self._note_trouble(error)
        finally:
            with self._change:
                self._ended = True
                self._change.notify_all()

    def _load(self) -> None:
        """Import MLflow: on this thread alone, for two that do so can lock each other out."""
        quieten_mlflow()
        import mlflow  # noqa: F401

        with self._change:
            self._is_loaded = True
            self._change.notify_all()

    def _is_done(self) -> bool:
        with self._change:
            return self._stopped or (self._closing and not self._waiting)

    def _step(self) -> Exception | None:
        """Open the store, or send the next operation; what keeps the store from it, if anything."""
        if self._store is None:
            return self._open()
        with self._change:
            self._change.wait_for(lambda: bool(self._waiting) or self._closing or self._stopped)
            if self._stopped or not self._waiting:
                return None
            first = self._waiting[0]
        try:
            self._send(self._store, first)
        except Exception as error:  # MLflow raises what its plug-ins and drivers raise
            return self._failed(self._store, first, error)
        return None

    def _open(self) -> Exception | None:
        assert self._connect is not None
        try:
            store = self._connect()
        except Exception as error:  # likewise
            return error
        with self._change:
            self._store = store
            self._note_progress()
        return None

    def _send(self, store: Store, first: _Waiting) -> None:
        entry = first.spool.read(first.number)
        again = first.again or first.spool.had_trouble
        entry.operation.write(Delivery(store, entry.run, first.spool.output_dir, again))
        with self._change:
            if self._stopped:  # the spool may be another process's by now
                return
            first.spool.note_done(first.number)
            self._remove(first)

    def _failed(self, store: Store, first: _Waiting, error: Exception) -> Exception | None:
        """What to do about it: try again after a pause (the error) or at once, or go on (None)."""
        first.again = first.spool.had_trouble = True
        of_store = is_of_store(error)
        if of_store and not answers(store):
            return error
        first.failures += 1
        if first.failures < TRIES and of_store:
            return error
        if first.failures > 1 or isinstance(error, RunGone):
            self._refuse(first, error)
        return None

    def _refuse(self, first: _Waiting, error: Exception) -> None:
        """Put it aside; where the run itself is missing, what comes after it waits on the disk."""
        spool = first.spool
        with self._change:
            if self._stopped:
                return
            if isinstance(error, RunGone):
                where: Path = spool.folder
            else:
                opens = _opens(spool, first.number)
                where = spool.refuse(first.number)
                if not opens:
                    self._remove(first)
                    _warn(where, error)
                    return
            spool.is_blocked = True
            self._waiting = deque(one for one in self._waiting if one.spool is not spool)
            self._give_back(spool)
            self._note_progress()
        _warn(where, error)

    def _remove(self, first: _Waiting) -> None:
        if self._waiting and self._waiting[0] is first:
            self._waiting.popleft()
        self._give_back(first.spool)
        self._note_progress()

    def _give_back(self, spool: Spool) -> None:
        if spool in self._lent and not any(one.spool is spool for one in self._waiting):
            self._lent.discard(spool)
            spool.release()

    def _note_progress(self) -> None:
        if self._trouble is not None:
            log.info("MLflow at %s answers again; what waited is sent", self._place)
        self._trouble, self._progress = None, time.monotonic()
        self._change.notify_all()

    def _note_trouble(self, trouble: Exception) -> None:
        with self._change:
            is_new = self._trouble is None
            self._trouble = trouble
            self._change.notify_all()
        if is_new and self._store is not None and not self._stopped:
            log.warning(
                "MLflow at %s can't be written (%s); work goes on, and what is logged waits on the"
                " disk until it answers",
                self._place,
                explained(trouble),
            )

    def _rest(self, seconds: float) -> None:
        with self._change:
            if self._closing and self._hurried:
                seconds = min(seconds, CLOSING_PAUSE)
            self._change.wait_for(
                lambda: self._stopped or (self._closing and not self._hurried), timeout=seconds
            )
            self._hurried = self._closing


def _opens(spool: Spool, number: int) -> bool:
    """Does the operation begin its run?"""
    try:
        return isinstance(spool.read(number).operation, Open)
    except SpoolError:
        return False


def _warn(where: Path, error: Exception) -> None:
    log.warning(
        "MLflow refused what was to be logged (%s); it is kept in %s, and `lorasweep sync` tries"
        " it again",
        explained(error),
        where,
    )
