"""The runs of this process, as they are logged: to their folders, and published from there."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorasweep.lora_files.checkpoint import Checkpoint
from lorasweep.tracking import older_folders
from lorasweep.tracking.ledger import STEPS, read_ledger, retry_refused, unsent_items, write_ledger
from lorasweep.tracking.publish_thread import PublishThread
from lorasweep.tracking.records import (
    FOLDER,
    CheckpointRecord,
    EpochRecord,
    InUseError,
    NewRun,
    RunEnd,
    RunRecord,
    RunRecords,
    RunStatus,
    StepMetrics,
    forget_run,
    hash_of,
    now,
)
from lorasweep.tracking.store import BEST, TRAINED_AS_TAG, Tracking, TrackingError, public_uri

log = logging.getLogger(__name__)

BROKEN_SECONDS = 2.0  # that a sweep waits for a server which may hang, when a worker has died
FLUSH_VALUES = 600  # step metrics held back at most, so that a long epoch shows while it runs


class Tracker:
    """Writes the runs of this process into their folders, and publishes them behind the training.

    Only `ready` and `close` wait for a server, and not for long. What MLflow can't take now waits
    in each run's folder and is published when it answers again, on leaving the `with` block, or by
    `lorasweep sync`. Leaving it by an exception marks the runs that are still open as failed.
    """

    def __init__(self, settings: Tracking, output_root: Path) -> None:
        self._settings, self._output_root = settings, output_root
        self._thread = PublishThread(settings, output_root)
        self._records: dict[Path, RunRecords] = {}
        self._runs: list[RunLog] = []

    def ready(self, output_dir: Path, sweep: str | None) -> None:
        """Wait until the store is open; TrackingError if it can't be opened or written.

        A store that took the run of `output_dir`, or another of its sweep, before may be away: that
        is said, and what is logged waits for it.
        """
        try:
            self._thread.ready()
        except TrackingError as error:
            place = (self._settings.public_uri, self._settings.experiment)
            if not any(
                read_ledger(records.output_dir, run).of_store(*place).sent
                for records, run in _runs_of_sweep(output_dir.resolve(), sweep)
            ):
                self._thread.abandon()
                raise
            log.warning("%s; work goes on, and what is logged waits on the disk", error)

    def open_run(self, new: NewRun, *, goes_on: bool = False) -> RunLog:
        """Start a run in MLflow; its log takes what it does from here on.

        `goes_on` continues the one that `new.output_dir` began, if any. Otherwise an earlier
        attempt at this run of the sweep is deleted. Raises InUseError if another process has the
        folder, TrackingError if it can't be written.
        """
        records = self._held_records(new.output_dir)
        begun = records.run() if goes_on else None
        place, told = self._place(), _told(new)
        if begun is not None and (begun.new.name, begun.new.sweep) == (new.name, new.sweep):
            # what was told when it began stays, but an older version didn't keep that
            run = replace(begun, **place, new=begun.new if begun.new.params else told, end=None)
            if run.new.config_yaml != told.config_yaml:  # with more epochs, say
                latest = {key: getattr(told, key) for key in ("params", "config_yaml", "overrides")}
                run = replace(run, new=replace(run.new, **latest), changed=now())
            ledger = read_ledger(records.output_dir, run)
            if ledger.refused:  # it is tried again
                write_ledger(records.output_dir, replace(ledger, refused={}))
        else:
            forget_run(records.output_dir)
            run = RunRecord(**place, uid=uuid.uuid4().hex, new=told, begun=now())
        records.write_run(run)
        run_log = RunLog(self._thread, records, run)
        self._thread.publish(records)
        self._runs.append(run_log)
        if len(self._runs) == 1:
            self._publish_leftovers(run, records.output_dir)
        return run_log

    def copy_run(
        self, source: Path, new: NewRun, renamed: Callable[[Path], Path], trained_as: str
    ) -> None:
        """Log in `new.output_dir` what the run of another folder has logged, as a run of its own.

        `renamed` are its files, below its folder. It isn't sent: a run that goes on is opened
        next, and `publish_left` sends one that has ended. Raises InUseError and TrackingError.
        """
        theirs, ours = RunRecords(source.resolve()), RunRecords(new.output_dir.resolve())
        run = theirs.run()
        if run is None:
            raise TrackingError(f"{source} has no log of its run")
        with ours.held():
            forget_run(ours.output_dir)
            uid = uuid.uuid4().hex
            for epoch, record in sorted(theirs.known_epochs(run.uid).items()):
                checkpoint = record.checkpoint
                if checkpoint is not None:
                    path = renamed(checkpoint.file)
                    name = Checkpoint(
                        path=path, run=new.name, epoch=epoch, step=checkpoint.step
                    ).name
                    checkpoint = replace(checkpoint, name=name, file=path)
                pictures = {key: renamed(path) for key, path in record.pictures.items()}
                ours.write_epoch(replace(record, uid=uid, checkpoint=checkpoint, pictures=pictures))
            files = {str(renamed(Path(one))): place for one, place in run.files.items()}
            files = {one: of for one, of in files.items() if (ours.output_dir / one).is_file()}
            tags = {**run.tags, TRAINED_AS_TAG: trained_as}
            told: dict[str, Any] = {"new": _told(new), "uid": uid, "files": files, "tags": tags}
            ours.write_run(replace(run, **self._place(), **told, changed=None))

    def publish_left(self, output_dir: Path) -> None:
        """Publish what a run that ended before has left: its process was killed, say."""
        records = RunRecords(output_dir.resolve())
        if any(unsent_items(records)):
            with suppress(InUseError), records.held(seconds=0):
                retry_refused(records, self._settings.public_uri, self._settings.experiment)
            self._thread.publish(records)

    def _publish_leftovers(self, run: RunRecord, output_dir: Path) -> None:
        """Publish what other runs of the sweep have left that have ended, but were killed, say."""
        for records, other in _runs_of_sweep(output_dir, run.new.sweep):
            same_store = (other.uri, other.experiment) == (run.uri, run.experiment)
            is_left = other.end is not None and bool(unsent_items(records)[0])
            if records.output_dir != output_dir and same_store and is_left:
                self._thread.publish(records)

    def close(self) -> None:
        """Publish what still waits, as long as the store takes it, and end the thread."""
        try:
            self._thread.close()
            if not self._settings.offline and (left := self._left()):
                log.warning("%s", left)
        finally:
            for records in self._records.values():
                records.release()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        try:
            if error is not None:
                self._finish_all(error)
        finally:
            self.close()

    def _finish_all(self, error: BaseException) -> None:
        stopped = isinstance(error, (KeyboardInterrupt, GeneratorExit))
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        try:
            for run in self._runs:
                run.finish("KILLED" if stopped else "FAILED", reason)
        except TrackingError as also:
            error.add_note(str(also))  # the first error is the one to show

    def _held_records(self, output_dir: Path) -> RunRecords:
        """The folder's records; a run of this process may have used them before."""
        key = output_dir.resolve()
        if any(run.output_dir == key and not run.is_finished for run in self._runs):
            raise TrackingError(f"{output_dir}: two runs can't have one folder; give each its own")
        if key not in self._records:
            records = RunRecords(key)
            records.acquire()
            older_folders.convert(records)
            self._records[key] = records
        return self._records[key]

    def _place(self) -> dict[str, Any]:
        """Where a run is logged, and since when."""
        return {
            "uri": self._settings.public_uri,
            "experiment": self._settings.experiment,
            "upload": self._settings.upload == "all",
            "opened": now(),
        }

    def _left(self) -> str | None:
        """What is said of what could not be sent, if there is any."""
        counts = [len(unsent_items(records)[0]) for records in self._records.values()]
        runs = sum(1 for count in counts if count)
        if not runs:
            return None
        uri = public_uri(self._settings.resolve(self._output_root))
        return (
            f"MLflow at {uri} did not take everything: {sum(counts)} writes of {runs}"
            f" run{'s' if runs != 1 else ''} wait on the disk; send them by `lorasweep sync`"
        )


def _told(new: NewRun) -> NewRun:
    """What is kept of a new run: as text, and with its images' whole path."""
    params = {key: str(value) for key, value in new.params.items()}
    return replace(new, params=params, image_dir=new.image_dir.resolve())


def _runs_of_sweep(output_dir: Path, sweep: str | None) -> Iterator[tuple[RunRecords, RunRecord]]:
    """The run of an output folder, and those of its sweep in the folders beside it."""
    for path in sorted(output_dir.parent.glob(f"*/{FOLDER}")):
        records = RunRecords(path.parent)
        run = records.run()
        if run is not None and (records.output_dir == output_dir or run.new.sweep == sweep):
            yield records, run


class RunLog:
    """The log of one run; made by `Tracker.open_run`. Nothing is logged after `finish`.

    What an earlier process has logged is silently not logged again.
    """

    def __init__(self, thread: PublishThread, records: RunRecords, run: RunRecord) -> None:
        self._thread, self._records, self._run = thread, records, run
        known = records.known_epochs(run.uid)
        sent = read_ledger(records.output_dir, run).sent  # an older version kept no records
        self._known = {*known, *(int(item[6:]) for item in sent if item.startswith("epoch "))}
        self._logged = frozenset(self._known)
        self._ranked = {n: self._rank_of(one.scores) for n, one in known.items() if one.checkpoint}
        logged = [step.step for record in known.values() for step in record.steps]
        self._steps = [s for s in records.unfinished(run.uid) if s.step > max(logged, default=-1)]
        written = [*logged, *(step.step for step in self._steps)]
        self._last_step = max([int(sent.get(STEPS, -1)), *written])
        self._num_held = 0  # values that are not on the disk
        self.is_finished = False

    @property
    def output_dir(self) -> Path:
        """The run's own folder."""
        return self._records.output_dir

    @property
    def logged_epochs(self) -> frozenset[int]:
        """Epochs (0 is the bare base) that earlier processes have logged."""
        return self._logged

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the metrics of an optimizer step; they are written with the epoch's scores."""
        if step <= self._last_step:
            return
        values = {key: float(value) for key, value in metrics.items()}
        self._steps.append(StepMetrics(step, now(), values))
        self._last_step = step
        self._num_held += len(values)
        if self._num_held >= FLUSH_VALUES:
            self._flush()

    def log_base(self, scores: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """Log the bare base model, as epoch 0: pictures and scores, no checkpoint."""
        self._write_epoch(0, None, scores, pictures)

    def log_epoch(
        self,
        checkpoint: Checkpoint,
        scores: Mapping[str, float],
        pictures: Mapping[str, Path],
        terms: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Log a checkpoint with its scores and pictures, and the steps since the one before.

        `pictures` are PNG files by their prompts. `terms` are what scores are means of, by which
        `pick` compares checkpoints in pairs.
        """
        record = CheckpointRecord(
            name=checkpoint.name,
            file=self._relative(checkpoint.path),
            step=checkpoint.step,
            hash=hash_of(checkpoint.path),
            terms=dict(terms or {}),
        )
        self._write_epoch(checkpoint.epoch, record, scores, pictures)

    def log_file(self, path: Path, artifact_dir: str | None = None) -> None:
        """Add a finished file to the run's artifacts; again if it has changed since."""
        files = {**self._run.files, str(self._relative(path)): artifact_dir}
        self._write_run(replace(self._run, files=files))

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._write_run(replace(self._run, tags={**self._run.tags, key: value}))

    def finish(self, status: RunStatus, reason: str | None = None) -> None:
        """End the run; a second call does nothing."""
        self._end(RunEnd(time=now(), status=status, reason=reason))

    def suspend(self, reason: str) -> None:
        """End the run for now: another process will go on with it (`goes_on`)."""
        self._end(RunEnd(time=now(), status="KILLED", suspended=reason))

    def _end(self, end: RunEnd) -> None:
        if self.is_finished:
            return
        self.is_finished = True
        self._flush()
        self._write_run(replace(self._run, end=end))

    def _write_run(self, run: RunRecord) -> None:
        if run != self._run:
            self._records.write_run(run)
            self._run = run
        self._thread.publish(self._records)

    def _write_epoch(
        self,
        epoch: int,
        checkpoint: CheckpointRecord | None,
        scores: Mapping[str, float],
        pictures: Mapping[str, Path],
    ) -> None:
        if epoch in self._known:
            return
        if checkpoint is not None:
            self._ranked[epoch] = self._rank_of(scores)
        record = EpochRecord(
            uid=self._run.uid,
            epoch=epoch,
            time=now(),
            steps=self._steps,
            scores={key: float(value) for key, value in scores.items()},
            pictures={key: self._relative(path) for key, path in pictures.items()},
            checkpoint=checkpoint,
            best=self._best(epoch),
        )
        self._records.write_epoch(record)
        self._known.add(epoch)
        self._steps, self._num_held = [], 0
        self._thread.publish(self._records)

    def _rank_of(self, scores: Mapping[str, float]) -> float:
        """Smaller is better; infinite where there is no score to pick by."""
        score = scores.get(self._run.new.pick_by or "", math.nan)
        return self._run.new.pick_sign * score if math.isfinite(score) else math.inf

    def _best(self, last: int) -> dict[str, float]:
        """The best checkpoint up to an epoch; tables show a metric's last value."""
        found = {n: rank for n, rank in self._ranked.items() if n <= last and rank < math.inf}
        if not found:
            return {}
        epoch = min(found, key=lambda n: (found[n], n))
        score = self._run.new.pick_sign * found[epoch]
        return {f"{BEST}{self._run.new.pick_by}": score, f"{BEST}epoch": epoch}

    def _flush(self) -> None:
        if self._num_held:
            self._records.write_unfinished(self._run.uid, self._steps)
            self._num_held = 0
            self._thread.publish(self._records)

    def _relative(self, path: Path) -> Path:
        """To the run's folder where it lies in there, for folders move."""
        full = path.resolve()
        inside = full.is_relative_to(self.output_dir)
        return full.relative_to(self.output_dir) if inside else full


def mark_broken(settings: Tracking, output_root: Path, output_dir: Path, reason: str) -> None:
    """Close a run whose process died without saying so: failed, with the reason.

    Publishes what the process left, too; a store that doesn't answer gets it later.
    """
    records = RunRecords(output_dir.resolve())
    if not (records.output_dir / FOLDER).is_dir():
        return
    with records.held():
        older_folders.convert(records)
        run = records.run()
        if run is None:
            return
        if run.end is None:
            end = RunEnd(time=now(), status="FAILED", reason=reason)
            records.write_run(replace(run, end=end))
        thread = PublishThread(settings, output_root)
        thread.publish(records)
        thread.close(at_most=BROKEN_SECONDS)
