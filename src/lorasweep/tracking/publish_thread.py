"""The one thread that publishes runs beside the training, and waits while MLflow is away."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from lorasweep.core.atomic_write import DiskFullError
from lorasweep.tracking.ledger import write_ledger
from lorasweep.tracking.moved_store import follow_move
from lorasweep.tracking.outage import OutageError, asked_pause
from lorasweep.tracking.publish import publish
from lorasweep.tracking.records import InUseError, RunRecords
from lorasweep.tracking.store import (
    MlflowStore,
    Tracking,
    TrackingError,
    open_store,
    public_uri,
    quieten_mlflow,
    short_reason,
    sqlite_path,
    unreachable,
)

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between tries
CLOSING_PAUSE = 2.0  # at most, once the end waits for it
SILENCE = 4  # times the patience: the end of waiting for a call that never returns


class PublishThread:
    """Publishes runs whose records have changed, one after the other; nothing if offline.

    While the store is away everything waits and is tried again, with growing pauses. No call waits
    for the store, but for `ready` and `close`, each for a bounded time.
    """

    def __init__(self, settings: Tracking, output_root: Path) -> None:
        uri = settings.resolve(output_root)
        self._settings, self._output_root = settings, output_root
        self._place, self._patience = public_uri(uri), settings.max_wait_seconds
        self._can_hang = sqlite_path(uri) is None
        self._due: dict[Path, RunRecords] = {}
        self._change = threading.Condition()
        self._store: MlflowStore | None = None
        self._trouble: BaseException | None = None  # what keeps the store from taking anything now
        self._is_loaded = self._closing = self._stopped = False
        self._ended = settings.offline
        self._progress = time.monotonic()
        # A daemon: an interpreter that exits without close() must not hang on a dead server.
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        if not settings.offline:
            self._thread.start()

    def publish(self, records: RunRecords) -> None:
        """Publish a run soon; again after each change.

        A run whose records this process doesn't hold comes after those that it does, and is held no
        longer than sending it takes, if no other process has it.
        """
        with self._change:
            if not self._ended:
                self._due[records.output_dir] = records
                self._change.notify_all()

    def ready(self) -> None:
        """Wait until the store is open; TrackingError if it can't be, or doesn't answer in time."""
        with self._change:
            # loading MLflow takes its time, and is not the server's fault
            self._change.wait_for(lambda: self._is_loaded or self._ended)
            self._change.wait_for(
                lambda: bool(self._store or self._trouble or self._ended),
                timeout=self._patience if self._can_hang else None,
            )
            if self._store or self._settings.offline:
                return
            trouble = self._trouble
        if isinstance(trouble, TrackingError):
            raise trouble
        late = TimeoutError(f"no answer in {self._patience:g} s")
        raise unreachable(self._place, trouble or late) from trouble

    def close(self, at_most: float = math.inf) -> None:
        """Send what still waits and end the thread.

        It gives up once the store was away for its patience; after `at_most` seconds in all if it
        can hang.
        """
        begun = time.monotonic()
        with self._change:
            self._closing = True
            self._stopped |= self._store is None and not self._due  # nothing to open it for
            self._change.notify_all()
            while not self._ended:
                patience = self._patience if self._trouble else SILENCE * self._patience
                until = max(begun, self._progress) + patience
                if self._can_hang:
                    until = min(until, begun + at_most)
                if not self._change.wait(timeout=until - time.monotonic()):
                    break
        self.abandon()

    def abandon(self) -> None:
        """Send nothing more, and wait for nothing."""
        with self._change:
            self._stopped = True
            self._change.notify_all()

    def _work(self) -> None:
        try:
            self._load()
            self._retry(self._open)
            while (records := self._next_due()) is not None:
                self._retry(partial(self._publish, records))
        except Exception as error:  # the folders' disk fails, say; what waits is safe there
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

    def _retry(self, action: Callable[[], None]) -> None:
        """Do it, again and again while the store is away, until nothing more is to be sent."""
        pause = FIRST_PAUSE
        while not self._stopped:
            asked = 0.0
            try:
                action()
                return
            except OutageError as outage:
                asked = outage.pause
                self._note_trouble(outage.__cause__ or outage)
            except DiskFullError as error:
                self._note_trouble(error)
            self._rest(pause, asked)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _open(self) -> None:
        try:
            follow_move(self._settings, self._output_root)
            store = open_store(self._settings, self._output_root)
        except Exception as error:  # MLflow raises what its plug-ins and drivers raise
            address = self._settings.resolve(self._output_root)
            raise OutageError(asked_pause(error, address) or 0.0) from error
        with self._change:
            self._store = store
            self._note_progress()

    def _next_due(self) -> RunRecords | None:
        """The next run to publish, those of this process first; None at the end."""
        with self._change:
            self._change.wait_for(lambda: bool(self._due) or self._closing or self._stopped)
            if self._stopped or not self._due:
                return None
            first = min(self._due.values(), key=lambda records: not records.is_held)
            return self._due.pop(first.output_dir)

    def _publish(self, records: RunRecords) -> None:
        if records.is_held:
            self._send(records)
            return
        with suppress(InUseError), records.held(seconds=0):
            self._send(records)

    def _send(self, records: RunRecords) -> None:
        assert self._store is not None
        for ledger in publish(records, self._store):
            with self._change:
                if self._stopped:  # the folder may be another process's by now
                    return
                write_ledger(records.output_dir, ledger)
                self._note_progress()

    def _note_progress(self) -> None:
        if self._trouble is not None:
            log.info("MLflow at %s answers again", self._place)
        self._trouble, self._progress = None, time.monotonic()
        self._change.notify_all()

    def _note_trouble(self, trouble: BaseException) -> None:
        with self._change:
            is_new = self._trouble is None
            self._trouble = trouble
            self._change.notify_all()
        if is_new and self._store is not None and not self._stopped:
            log.warning(
                "MLflow at %s can't be written (%s); work goes on, and what is logged waits on the"
                " disk until it answers",
                self._place,
                short_reason(trouble),
            )

    def _rest(self, seconds: float, asked: float) -> None:
        """Between two tries; the end, when it comes, wants one at once, unless a server asked."""
        with self._change:
            if asked:
                self._change.wait_for(lambda: self._stopped, timeout=max(seconds, asked))
                return
            was_closing = self._closing
            self._change.wait_for(
                lambda: self._stopped or self._closing != was_closing,
                timeout=min(seconds, CLOSING_PAUSE) if was_closing else seconds,
            )
