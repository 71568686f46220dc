"""One thread that writes operations in order, behind the training."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lorasweep.tracking.store import TrackingError, public_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


QUEUE_LIMIT = 64  # operations; the pictures of an epoch are one


@dataclass(frozen=True)
class Store:
    """An open store; lives on the writing thread."""

    client: MlflowClient
    experiment_id: str


class Operation(Protocol):
    """One thing to write. It is plain data, so that it can wait: in memory, or on disk."""

    def write(self, store: Store) -> None: ...


class Writer:
    """The writing thread and the operations that wait for it, in order.

    An operation leaves the queue once it is written: after a failure the queue holds exactly
    what the store lacks. A spool on disk belongs here: in `_work`, between failing and giving up.
    """

    def __init__(self, connect: Callable[[], Store]) -> None:
        self._connect = connect
        self._waiting: deque[Operation] = deque()
        self._change = threading.Condition()
        self._connected = False
        self._closing = False
        self._failure: BaseException | None = None
        # A daemon: an interpreter that exits without close() must not hang on a dead server.
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def put(self, operation: Operation) -> None:
        """Queue an operation; waits only while the queue is full."""
        with self._change:
            self._await(lambda: len(self._waiting) < QUEUE_LIMIT)
            self._waiting.append(operation)
            self._change.notify_all()

    def wait(self) -> None:
        """Wait until the store is open and everything is written."""
        self.wait_for(lambda: self._connected and not self._waiting)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; TrackingError once writing has failed."""
        with self._change:
            self._await(condition)

    def close(self) -> None:
        """Write what still waits and end the thread; TrackingError if that fails."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._thread.join()
        if self._failure is not None:
            raise _explained(self._failure)

    def _await(self, condition: Callable[[], bool]) -> None:
        self._change.wait_for(lambda: self._failure is not None or condition())
        if self._failure is not None:
            raise _explained(self._failure)

    def _work(self) -> None:
        try:
            store = self._connect()
            self._note_connected()
            while (operation := self._next()) is not None:
                operation.write(store)
                self._note_written()
        except BaseException as error:  # whatever it is, the calling thread raises it
            with self._change:
                self._failure = error
                self._change.notify_all()

    def _next(self) -> Operation | None:
        with self._change:
            self._change.wait_for(lambda: bool(self._waiting) or self._closing)
            return self._waiting[0] if self._waiting else None

    def _note_connected(self) -> None:
        with self._change:
            self._connected = True
            self._change.notify_all()

    def _note_written(self) -> None:
        with self._change:
            self._waiting.popleft()
            self._change.notify_all()


def _explained(failure: BaseException) -> TrackingError:
    if isinstance(failure, TrackingError):
        return failure
    reason = public_uri(str(failure).partition("\n")[0]) or type(failure).__name__
    error = TrackingError(f"MLflow could not be written: {reason}")
    error.__cause__ = failure
    return error
