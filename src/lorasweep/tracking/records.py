"""What a run keeps in its folder of its log; MLflow is brought up to date from these files.

    mlflow.json               the run as a whole (`RunRecord`): settings, tags, data set, files, end
    epochs/000003.json        an epoch (`EpochRecord`); 000000.json is the bare base model
    epochs/unfinished.json    the optimizer steps since the last epoch (`UnfinishedEpoch`)
    .tracking/published.json  what MLflow has of all this, and what it refused (`ledger.Ledger`)
    .tracking/lock            held by the process that writes or publishes them

Each file is written whole, flushed to the disk and renamed into place, so a process may die
anywhere. Times, names and the run's `uid` are chosen when a record is written: to publish it twice
changes nothing. Passwords and keys in URIs are masked before anything is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from filelock import FileLock, Timeout
from pydantic import ConfigDict, TypeAdapter, ValidationError

from lorasweep.core.atomic_write import delete_temporaries, write_atomically
from lorasweep.core.foreign_files import ForeignFileError, read_bytes
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.lora_files.checkpoint import read_metadata
from lorasweep.tracking.store import TrackingError, public_uri

RUN_FILE, EPOCHS, UNFINISHED = "mlflow.json", "epochs", "unfinished.json"
FOLDER, LEDGER = ".tracking", "published.json"
LOCK_SECONDS = 10.0  # a killed process's children may hold it for a moment

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


class InUseError(TrackingError):
    """Another process logs or publishes a run; it may be done soon."""


class DamagedRecordError(ValueError):
    """A record that can't be read."""


class JsonRecord:
    """Base of what is written as JSON; numbers may be NaN and Infinity, as Python writes them."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(ser_json_inf_nan="constants")


class StepMetrics(NamedTuple):
    """The metrics of an optimizer step."""

    step: int
    time: int
    """Milliseconds since 1970."""
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class UnfinishedEpoch(JsonRecord):
    """The optimizer steps since the last epoch, so that a long epoch shows while it runs."""

    uid: str
    steps: Sequence[StepMetrics]


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord(JsonRecord):
    """The checkpoint of an epoch."""

    name: str
    """RUN-e003"""
    file: Path
    """Below the run's folder if it is relative."""
    step: int
    hash: str | None
    """sha256 of its data: kohya's sshs_model_hash."""
    terms: Mapping[str, Sequence[float]]
    """What its scores are means of."""


@dataclass(frozen=True, kw_only=True)
class EpochRecord(JsonRecord):
    """All that an epoch brought."""

    uid: str
    epoch: int
    time: int
    """Milliseconds since 1970, of its scores and pictures."""
    steps: Sequence[StepMetrics]
    """Those since the epoch before."""
    scores: Mapping[str, float]
    pictures: Mapping[str, Path]
    """PNG files by the prompt's key."""
    checkpoint: CheckpointRecord | None
    best: Mapping[str, float] = field(default_factory=dict)
    """The run's best so far: best/SCORE and best/epoch; older versions kept none."""


@dataclass(frozen=True, kw_only=True)
class NewRun(JsonRecord):
    """What is known of a run when it starts."""

    name: str
    sweep: str | None
    """Runs that search together share it; None stands alone under its own name."""
    output_dir: Path
    """The run's own folder, where its records are kept; it may be moved later."""
    params: Mapping[str, Any]
    """The resolved config, flat: `{"adapter.rank": 8}`."""
    config_yaml: str
    overrides: Sequence[str]
    image_dir: Path
    dataset_digest: str
    tags: Mapping[str, str] = field(default_factory=dict)
    pick_by: str | None = None
    """The score whose best the run carries."""
    pick_sign: int = 1
    """-1 where larger is better."""
    setting: str | None = None
    """A digest of what it is trained with, but for the seed; older versions made none."""
    seed: int | None = None

    @property
    def sweep_or_name(self) -> str:
        """The name of the sweep that it is shown in."""
        return self.sweep or self.name


@dataclass(frozen=True, kw_only=True)
class RunEnd(JsonRecord):
    """How a run ended, or was left to be gone on with."""

    time: int
    status: RunStatus
    reason: str | None = None
    suspended: str | None = None
    """Why it stopped, if it is to go on."""


@dataclass(frozen=True, kw_only=True)
class RunRecord(JsonRecord):
    """A run as a whole."""

    uid: str
    """By which it is found in MLflow."""
    uri: str | None
    """Of the store, without secrets; None is the file under output_root."""
    experiment: str
    upload: bool
    """Copy the checkpoint files into MLflow."""
    new: NewRun
    begun: int
    """Milliseconds since 1970, like `opened`."""
    opened: int
    """When it was begun, or gone on with the last time."""
    changed: int | None = None
    """When it went on with other settings than it was begun with; `new` has the latest."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Those that were set since."""
    files: Mapping[str, str | None] = field(default_factory=dict)
    """Other files to log, below the run's folder if relative: the folder in MLflow they go to."""
    end: RunEnd | None = None
    """None while it trains."""


T = TypeVar("T")


class RunRecords:
    """The records of one run's folder."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.folder = output_dir / FOLDER
        self._epochs = output_dir / EPOCHS
        self._lock = FileLock(self.folder / "lock", thread_local=False)

    def acquire(self, seconds: float | None = None) -> None:
        """Take the records for this process. Raises InUseError if another has them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=LOCK_SECONDS if seconds is None else seconds)
        except Timeout:
            raise InUseError(
                f"{self.output_dir} is in use by another process that logs or sends this run;"
                " wait for its end, or give another folder"
            ) from None
        for folder in (self.folder, self._epochs):
            delete_temporaries(folder)

    def release(self) -> None:
        """Let other processes have them."""
        self._lock.release()

    @property
    def is_held(self) -> bool:
        """Does this process have them?"""
        return self._lock.is_locked

    @contextmanager
    def held(self, seconds: float | None = None) -> Iterator[RunRecords]:
        """The records, taken and released."""
        self.acquire(seconds)
        try:
            yield self
        finally:
            self.release()

    def run(self) -> RunRecord | None:
        """The run as a whole; None where none was begun, or its file is damaged."""
        return read_or_none(self.output_dir / RUN_FILE, RunRecord)

    def write_run(self, run: RunRecord) -> None:
        """Raises TrackingError, or DiskFullError, like all that writes."""
        write(self.output_dir / RUN_FILE, run)

    def epochs(self) -> list[int]:
        """The epochs that have a record, in order."""
        return sorted(int(p.stem) for p in self._epochs.glob("*.json") if p.stem.isdecimal())

    def epoch(self, number: int) -> EpochRecord:
        """An epoch's record. Raises DamagedRecordError."""
        return _read(self._of_epoch(number), EpochRecord)

    def known_epochs(self, uid: str) -> dict[int, EpochRecord]:
        """The run's epochs, but for those whose records are damaged."""
        found = {n: read_or_none(self._of_epoch(n), EpochRecord) for n in self.epochs()}
        return {n: record for n, record in found.items() if record and record.uid == uid}

    def write_epoch(self, record: EpochRecord) -> None:
        """Write an epoch, with all steps up to it."""
        write(self._of_epoch(record.epoch), record)
        (self._epochs / UNFINISHED).unlink(missing_ok=True)

    def unfinished(self, uid: str) -> Sequence[StepMetrics]:
        """The steps since the last epoch that are written; older ones too if a kill kept them."""
        found = read_or_none(self._epochs / UNFINISHED, UnfinishedEpoch)
        return found.steps if found is not None and found.uid == uid else []

    def write_unfinished(self, uid: str, steps: Sequence[StepMetrics]) -> None:
        """Write the steps since the last epoch."""
        write(self._epochs / UNFINISHED, UnfinishedEpoch(uid=uid, steps=steps))

    def _of_epoch(self, number: int) -> Path:
        return self._epochs / f"{number:06d}.json"


def read_epoch(output_dir: Path, epoch: int) -> EpochRecord | None:
    """The record of an epoch in a run's folder; None if there is none, or it is damaged."""
    return read_or_none(output_dir / EPOCHS / f"{epoch:06d}.json", EpochRecord)


def forget_run(output_dir: Path) -> None:
    """Delete all records of an earlier run in a folder."""
    for path in (output_dir / RUN_FILE, output_dir / FOLDER / LEDGER):
        path.unlink(missing_ok=True)
    for path in (output_dir / EPOCHS).glob("*.json"):
        path.unlink()


def hash_of(path: Path) -> str | None:
    """By which a checkpoint's data is known without its file; None for what is gone."""
    try:
        return read_metadata(path).get("sshs_model_hash")
    except (CheckpointError, OSError):
        return None


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def _read(path: Path, kind: type[T]) -> T:
    try:
        return _adapter(kind).validate_json(read_bytes(path))
    except (ValidationError, ForeignFileError, OSError):
        raise DamagedRecordError(f"{path} is damaged") from None


def read_or_none(path: Path, kind: type[T]) -> T | None:
    """A record of that kind; None if there is none, or it is damaged."""
    try:
        return _read(path, kind)
    except DamagedRecordError:
        return None


def write(path: Path, record: JsonRecord) -> None:
    """Write a record whole, or not at all. Raises TrackingError, and DiskFullError."""
    content = _without_secrets(_adapter(type(record)).dump_python(record, mode="json"))
    try:
        write_atomically(path, json.dumps(content, ensure_ascii=False).encode())
    except OSError as error:
        raise TrackingError(
            f"{path.parent} can't be written ({error.strerror or error}), so this run can't be"
            " logged; make room and start again"
        ) from error


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_secrets(one) for one in value]
    return public_uri(value) if isinstance(value, str) else value


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
