"""What a run logs, on disk until MLflow has it: `.tracking/` in the run's output folder.

    000012.json     an operation that waits, with what was logged up to and with it (`RunState`)
    000011.done     the newest one that MLflow has; older ones are deleted
    000007.refused  one that MLflow did not take
    lock            held by the process that logs or sends

Each operation is written once, whole, flushed to the disk, and then only renamed or deleted, so a
process may die anywhere: the newest file says what was logged, and what waits can be sent by
another. What was sent just before it died is sent again, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from lorasweep.core.atomic_write import write_atomically
from lorasweep.tracking.operations import Operation, Plain, RunState
from lorasweep.tracking.store import TrackingError

FOLDER = ".tracking"
WAITS, DONE, REFUSED = ".json", ".done", ".refused"
LOCK_SECONDS = 10.0  # a killed process's children may hold it for a moment


@dataclass(frozen=True)
class Entry(Plain):
    """One file of the spool."""

    run: RunState
    operation: Operation


class InUseError(TrackingError):
    """Another process logs or sends a run; it may be done soon."""


class SpoolError(ValueError):
    """A file of a spool that can't be read."""


class Spool:
    """The spool of one run's output folder. One thread puts, another reads and removes."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.folder = output_dir / FOLDER
        self.is_blocked = False
        """Nothing can be sent, for MLflow has no such run or refused to begin it."""
        self.had_trouble = False
        """The store failed in the midst of it, so that something may have arrived."""
        self._lock = FileLock(self.folder / "lock", thread_local=False)
        self._newest: int | None = None

    def acquire(self, seconds: float = LOCK_SECONDS) -> None:
        """Take the folder for this process. Raises InUseError if another has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=seconds)
        except Timeout:
            raise InUseError(
                f"{self.output_dir} is in use by another process that logs or sends this run;"
                " wait for its end, or give another folder"
            ) from None
        self._newest = max(self._numbers(WAITS, DONE, REFUSED), default=0)
        for torn in self.folder.glob(".*.json.*"):  # writes that a kill cut short
            torn.unlink()

    def can_be_acquired(self) -> bool:
        """Take the folder for this process, if no other has it."""
        try:
            self.acquire(seconds=0)
        except InUseError:
            return False
        return True

    def release(self) -> None:
        """Let other processes have the folder."""
        self._lock.release()

    @contextmanager
    def held(self, seconds: float = LOCK_SECONDS) -> Iterator[Spool]:
        """The folder, taken and released."""
        self.acquire(seconds)
        try:
            yield self
        finally:
            self.release()

    def state(self) -> RunState | None:
        """What was logged up to now; None where no run was begun."""
        for number in sorted(self._numbers(WAITS, DONE, REFUSED), reverse=True):
            for suffix in (WAITS, DONE, REFUSED):
                try:
                    return _read(self._file(number, suffix)).run
                except (FileNotFoundError, SpoolError):
                    continue
        return None

    def waiting(self) -> list[int]:
        """Numbers of the operations that wait, in order."""
        return sorted(self._numbers(WAITS))

    def refused(self) -> list[Path]:
        """The operations that MLflow did not take."""
        return [self._file(number, REFUSED) for number in sorted(self._numbers(REFUSED))]

    def put(self, run: RunState, operation: Operation) -> int:
        """Write an operation to the disk; its number. Raises TrackingError if that fails."""
        assert self._newest is not None
        content = _adapter().dump_json(Entry(run, operation))
        try:
            write_atomically(self._file(self._newest + 1, WAITS), content)
        except OSError as error:
            raise TrackingError(
                f"{self.folder} can't be written ({error.strerror or error}), so this run can't be"
                " logged; make room and start again"
            ) from error
        self._newest += 1
        return self._newest

    def read(self, number: int) -> Entry:
        """A waiting operation. Raises SpoolError for a damaged file."""
        return _read(self._file(number, WAITS))

    def note_done(self, number: int) -> None:
        """MLflow has it: it goes, but the newest of them stays, for it says what was logged."""
        with suppress(FileNotFoundError):  # forgotten meanwhile
            self._file(number, WAITS).rename(self._file(number, DONE))
        for other in self._numbers(DONE):
            if other < number:
                self._file(other, DONE).unlink(missing_ok=True)

    def refuse(self, number: int) -> Path:
        """Put an operation aside that MLflow does not take; where it is."""
        target = self._file(number, REFUSED)
        self._file(number, WAITS).rename(target)
        return target

    def retry_refused(self) -> None:
        """Let what was refused wait again, in its old place."""
        for number in self._numbers(REFUSED):
            self._file(number, REFUSED).rename(self._file(number, WAITS))

    def forget(self, after: int = 0) -> None:
        """Delete the operations with larger numbers, sent or not."""
        for suffix in (WAITS, REFUSED, DONE):
            for number in self._numbers(suffix):
                if number > after:
                    self._file(number, suffix).unlink(missing_ok=True)

    def has_done(self) -> bool:
        """Did MLflow take anything of it?"""
        return bool(self._numbers(DONE))

    @property
    def newest(self) -> int:
        """Number of the operation that was put last."""
        assert self._newest is not None
        return self._newest

    def _file(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:06d}{suffix}"

    def _numbers(self, *suffixes: str) -> set[int]:
        return {
            int(path.stem)
            for suffix in suffixes
            for path in self.folder.glob(f"*{suffix}")
            if path.stem.isdecimal()
        }


def _read(path: Path) -> Entry:
    content = path.read_bytes()
    try:
        return _adapter().validate_json(content)
    except ValidationError:
        raise SpoolError(f"{path} is damaged") from None


@cache
def _adapter() -> TypeAdapter[Entry]:
    return TypeAdapter(Entry)
