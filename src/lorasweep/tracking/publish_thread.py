"""The one thread that publishes runs beside the training, and waits while MLflow is away."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lorasweep.core.atomic_write import DiskFullError
from lorasweep.tracking.ledger import Ledger, write_ledger
from lorasweep.tracking.outage import (
    CLOSING_PAUSE,
    FIRST_PAUSE,
    LINGER_SECONDS,
    LONGEST_PAUSE,
    SILENCE,
    OutageError,
)
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
)

log = logging.getLogger(__name__)


class _AbandonedError(RuntimeError):
    """Nothing more is to be written: the folder may be another process's by now."""


class PublishThread:
    """Publishes runs whose records have changed, one after the other; nothing if offline.

    While the store is away everything waits and is tried again, with growing pauses. No call waits
    for the store, but for `ready`, `linger` and `close`, each for a bounded time.
    """

    def __init__(self, settings: Tracking, output_root: Path) -> None:
        uri = settings.resolve(output_root)
        self._settings, self._output_root = settings, output_root
        self._place, self._patience = public_uri(uri), settings.max_wait_seconds
        self.can_hang = sqlite_path(uri) is None
        self._linger = LINGER_SECONDS if self.can_hang else None
        self._due: dict[Path, RunRecords] = {}
        self._leftovers: list[RunRecords] = []
        self._change = threading.Condition()
        self._store: MlflowStore | None = None
        self._trouble: Exception | None = None
        self._is_loaded = self._is_busy = self._closing = self._hurried = self._stopped = False
        self._ended = settings.offline
        self._progress = time.monotonic()
        # A daemon: an interpreter that exits without close() must not hang on a dead server.
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        if not settings.offline:
            self._thread.start()

    def publish(self, records: RunRecords) -> None:
        """Publish a run whose records this process holds, soon; again after each change."""
        with self._change:
            if not self._ended:
                self._due[records.output_dir] = records
                self._change.notify_all()

    def publish_leftovers(self, found: Sequence[RunRecords]) -> None:
        """Publish what others have left, once there is time; each is held no longer than that."""
        with self._change:
            if not self._ended:
                self._leftovers += found
                self._change.notify_all()

    def ready(self) -> None:
        """Wait until the store is open; TrackingError if it can't be, or doesn't answer in time."""
        with self._change:
            # loading MLflow takes its time, and is not the server's fault
            self._change.wait_for(lambda: self._is_loaded or self._ended)
            self._change.wait_for(
                lambda: bool(self._store or self._trouble or self._ended),
                timeout=self._patience if self.can_hang else None,
            )
            if self._store or self._settings.offline:
                return
            trouble = self._trouble
        if isinstance(trouble, TrackingError):
            raise trouble
        reason = short_reason(trouble) if trouble else f"no answer in {self._patience:g} s"
        raise TrackingError(
            f"tracking.uri={self._place} can't be opened: {reason}; start the server, or give "
            "tracking.offline=true to send everything later"
        ) from trouble

    def linger(self) -> None:
        """Wait until everything is sent, while the store does well; within a second in all if it
        can hang."""
        if self._linger is not None and self._linger <= 0:
            return
        begun = time.monotonic()
        with self._change:
            self._change.wait_for(
                lambda: not self._has_work() or bool(self._trouble) or self._ended, self._linger
            )
        if self._linger is not None:
            self._linger -= time.monotonic() - begun

    def close(self, at_most: float | None = None) -> None:
        """Send what still waits and end the thread.

        It gives up once the store was away for its patience, or after `at_most` seconds.
        """
        begun = time.monotonic()
        with self._change:
            self._closing = True
            self._change.notify_all()
            while not self._ended:
                left = self._seconds_left(max(begun, self._progress))
                if at_most is not None:
                    left = min(left, begun + at_most - time.monotonic())
                if left <= 0:
                    break
                self._change.wait(timeout=left)
        self.abandon()

    def abandon(self) -> None:
        """Send nothing more, and wait for nothing."""
        with self._change:
            self._stopped = True
            self._change.notify_all()

    @property
    def trouble(self) -> Exception | None:
        """What keeps the store from taking anything now."""
        return self._trouble

    def _seconds_left(self, since: float) -> float:
        """Until the end gives up."""
        patience = self._patience if self._trouble else SILENCE * self._patience
        return since + patience - time.monotonic()

    def _has_work(self) -> bool:
        return bool(self._due or self._leftovers or self._is_busy)

    def _work(self) -> None:
        pause = FIRST_PAUSE
        try:
            self._load()
            while not self._is_done():
                trouble = self._open() if self._store is None else self._publish_next(self._store)
                if trouble is None:
                    pause = FIRST_PAUSE
                    continue
                self._note_trouble(trouble)
                self._rest(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        except _AbandonedError:
            pass
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

    def _is_done(self) -> bool:
        with self._change:
            return self._stopped or (self._closing and not self._has_work())

    def _open(self) -> Exception | None:
        try:
            store = open_store(self._settings, self._output_root)
        except Exception as error:  # MLflow raises what its plug-ins and drivers raise
            return error
        with self._change:
            self._store = store
            self._note_progress()
        return None

    def _publish_next(self, store: MlflowStore) -> Exception | None:
        """Publish the next run; what keeps the store from it, if anything."""
        with self._change:
            self._change.wait_for(lambda: self._has_work() or self._closing or self._stopped)
            if self._stopped or not self._has_work():
                return None
            is_own = bool(self._due)  # those of this process first
            records = self._due.pop(next(iter(self._due))) if is_own else self._leftovers.pop()
            self._is_busy = True
        try:
            if is_own:
                self._publish(records, store)
            else:
                with suppress(InUseError), records.held(seconds=0):
                    self._publish(records, store)
        except (OutageError, DiskFullError) as error:
            with self._change:
                if is_own:
                    self._due = {records.output_dir: records, **self._due}
                else:
                    self._leftovers.append(records)
            return error if isinstance(error, DiskFullError) else _cause(error)
        finally:
            with self._change:
                self._is_busy = False
                self._change.notify_all()
        with self._change:
            self._note_progress()
        return None

    def _publish(self, records: RunRecords, store: MlflowStore) -> None:
        def commit(ledger: Ledger) -> None:
            with self._change:
                if self._stopped:
                    raise _AbandonedError
                write_ledger(records.output_dir, ledger)
                self._note_progress()

        publish(records, store, commit)

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
                short_reason(trouble),
            )

    def _rest(self, seconds: float) -> None:
        with self._change:
            if self._closing and self._hurried:
                seconds = min(seconds, CLOSING_PAUSE)
            self._change.wait_for(
                lambda: self._stopped or (self._closing and not self._hurried), timeout=seconds
            )
            self._hurried = self._closing


def _cause(outage: OutageError) -> Exception:
    assert isinstance(outage.__cause__, Exception)
    return outage.__cause__
