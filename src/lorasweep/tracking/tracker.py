"""The runs of this process, as they are logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.checkpoint import Checkpoint
from lorasweep.tracking import operations
from lorasweep.tracking.operations import NewRun, Status
from lorasweep.tracking.store import (
    REASON_TAG,
    Tracking,
    TrackingError,
    client_of,
    create_store,
    same_run,
    sqlite_path,
)
from lorasweep.tracking.writer import Store, Writer

if TYPE_CHECKING:
    from PIL import Image


FLUSH_POINTS = 600  # step metrics held back at most, so that a long epoch shows while it runs


class Tracker:
    """Writes the runs of this process to MLflow, in order, on one thread behind the training.

    A call waits only while `QUEUE_LIMIT` operations wait before it. What fails to be written
    raises TrackingError at the next call, or on leaving the `with` block. Leaving it by an
    exception marks the runs that are still open as failed.
    """

    def __init__(self, settings: Tracking, output_root: Path) -> None:
        self._writer = Writer(lambda: _connect(settings, output_root))
        self._upload_all = settings.upload == "all"
        self._runs: list[RunLog] = []

    def ready(self) -> None:
        """Wait until the store is open; TrackingError if it can't be opened or written."""
        self._writer.wait()

    def open_run(self, new: NewRun, *, goes_on: bool = False) -> RunLog:
        """Start a run in MLflow; its log takes what it does from here on."""
        run = operations.RunRef(name=new.name, sweep=new.sweep or new.name)
        self._writer.put(operations.Open(run, new))
        log = RunLog(self._writer, run, upload=self._upload_all)
        self._runs.append(log)
        return log

    def close(self) -> None:
        """Write what still waits and end the thread; raises what could not be written."""
        self._writer.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if error is None:
            self.close()
            return
        try:
            self._abandon(error)
        except TrackingError as also:
            error.add_note(str(also))  # the first error is the one to show

    def _abandon(self, error: BaseException) -> None:
        stopped = isinstance(error, (KeyboardInterrupt, GeneratorExit))
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        for run in self._runs:
            run.finish("KILLED" if stopped else "FAILED", reason)
        self.close()


class RunLog:
    """The log of one run; made by `Tracker.open_run`. Nothing is logged after `finish`."""

    def __init__(self, writer: Writer, run: operations.RunRef, *, upload: bool) -> None:
        self._writer = writer
        self._run = run
        self._upload = upload
        self._points: list[operations.Point] = []
        self._finished = False

    @property
    def logged_epochs(self) -> frozenset[int]:
        return frozenset()

    def suspend(self, reason: str) -> None:
        self.finish("KILLED", reason)

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; waits until the run is opened."""
        self._writer.wait_for(self._run.id.done)
        return self._run.id.result()

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the metrics of an optimizer step; they are written with the epoch's scores."""
        self._points += operations.points(step, metrics)
        if len(self._points) >= FLUSH_POINTS:
            self._writer.put(operations.Curves(self._run, self._take_points()))

    def log_base(self, scores: Mapping[str, float], samples: Mapping[str, Image.Image]) -> None:
        """Log the bare base model, as epoch 0: pictures and scores, no checkpoint."""
        self._put_epoch(0, None, scores, samples)

    def log_epoch(
        self,
        checkpoint: Checkpoint,
        scores: Mapping[str, float],
        samples: Mapping[str, Image.Image],
        terms: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Log a checkpoint with its scores and pictures, and the steps since the one before.

        `terms` are what scores are means of, by which `pick` compares checkpoints in pairs.
        The pictures must not be changed afterwards: they are encoded on the writing thread.
        """
        self._put_epoch(checkpoint.epoch, checkpoint, scores, samples, terms)

    def log_file(self, path: Path, artifact_dir: str | None = None) -> None:
        """Add a finished file to the run's artifacts; it is read later, on the writing thread."""
        self._writer.put(operations.File(self._run, path, artifact_dir))

    def log_image(self, image: Image.Image, name: str) -> None:
        """Add one picture to the run's artifacts: `contact_sheet.png`."""
        self._writer.put(operations.Picture(self._run, image, name))

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._writer.put(operations.Tag(self._run, key, value))

    def finish(self, status: Status, reason: str | None = None) -> None:
        """End the run, once everything of it is written; a second call does nothing."""
        if self._finished:
            return
        self._finished = True
        if self._points:
            self._writer.put(operations.Curves(self._run, self._take_points()))
        self._writer.put(operations.Close(self._run, status, reason))
        self._writer.wait()

    def _put_epoch(
        self,
        epoch: int,
        checkpoint: Checkpoint | None,
        scores: Mapping[str, float],
        samples: Mapping[str, Image.Image],
        terms: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        points, scored = self._take_points(), operations.points(epoch, scores)
        self._writer.put(
            operations.Epoch(
                self._run,
                epoch,
                checkpoint,
                points,
                scored,
                dict(samples),
                self._upload,
                terms or {},
            )
        )

    def _take_points(self) -> list[operations.Point]:
        points, self._points = self._points, []
        return points


def mark_broken(
    settings: Tracking, output_root: Path, sweep: str | None, name: str, reason: str
) -> None:
    """Close a run whose process died without saying so: failed, with the reason."""
    store = _connect(settings, output_root)
    where = f"{same_run(sweep or name, name)} AND attributes.status = 'RUNNING'"
    for run in store.client.search_runs([store.experiment_id], where):
        store.client.set_tag(run.info.run_id, REASON_TAG, reason)
        store.client.set_terminated(run.info.run_id, "FAILED")


def _connect(settings: Tracking, output_root: Path) -> Store:
    uri, artifacts = settings.resolve(output_root), settings.artifacts(output_root)
    if artifacts is None or sqlite_path(uri) is not None:  # a server, or safe by itself
        experiment_id = create_store(uri, settings.experiment, artifacts)
        return Store(client_of(uri), experiment_id)
    from filelock import FileLock

    output_root.mkdir(parents=True, exist_ok=True)
    with FileLock(output_root / ".mlflow.lock"):  # two workers can't make the tables at once
        experiment_id = create_store(uri, settings.experiment, artifacts)
    return Store(client_of(uri), experiment_id)
