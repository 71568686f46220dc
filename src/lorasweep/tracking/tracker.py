"""The runs of this process, as they are logged."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.lora_files.checkpoint import Checkpoint
from lorasweep.tracking import operations, pictures
from lorasweep.tracking.connect import writer_for
from lorasweep.tracking.opening import NewRun, open_operation
from lorasweep.tracking.operations import RunState, Status
from lorasweep.tracking.spool import Spool
from lorasweep.tracking.store import Tracking, TrackingError, public_uri
from lorasweep.tracking.sync import left_by_ended, was_reached
from lorasweep.tracking.writer import Writer

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

FLUSH_POINTS = 600  # step metrics held back at most, so that a long epoch shows while it runs


class Tracker:
    """Writes the runs of this process to the disk, and from there to MLflow, behind the training.

    No call waits for a server for long. What MLflow can't take now waits in each run's `.tracking/`
    and is sent when it answers again, on leaving the `with` block, or by `lorasweep sync`. Leaving
    it by an exception marks the runs that are still open as failed.
    """

    def __init__(self, settings: Tracking, output_root: Path) -> None:
        self._settings, self._output_root = settings, output_root
        self._writer = writer_for(settings, output_root)
        self._spools: dict[Path, Spool] = {}
        self._adopted: dict[Path, Spool] = {}
        self._runs: list[RunLog] = []

    def ready(self) -> None:
        """Wait until the store is open; TrackingError if it can't be opened or written.

        The runs that were opened are then as they were before. A store that took a run of the same
        sweep before may be away: that is said, and what is logged waits for it.
        """
        try:
            self._writer.ready()
        except TrackingError as error:
            if any(was_reached(run.state, run.output_dir) for run in self._runs):
                log.warning("%s; work goes on, and what is logged waits on the disk", error)
                return
            self._writer.abandon()
            for run in self._runs:
                run.undo()
            raise

    def open_run(self, new: NewRun, *, goes_on: bool = False) -> RunLog:
        """Start a run in MLflow; its log takes what it does from here on.

        `goes_on` continues the one that `new.output_dir` began, if any. Otherwise an earlier
        attempt at this run of the sweep is deleted. Raises InUseError if another process has the
        folder, TrackingError if it can't be written.
        """
        spool, is_ours = self._spool(new.output_dir)
        begun = spool.state() if goes_on else None
        if begun is not None and (begun.name, begun.sweep) == (new.name, new.sweep or new.name):
            state = replace(begun, is_open=True)
            begins_after = spool.newest
            if not is_ours:
                self._writer.replay(spool)
        else:
            if not is_ours:
                spool.forget()
            state = self._new_state(new)
            begins_after = spool.newest
        run = RunLog(
            self._writer, spool, state, upload=self._settings.upload == "all", after=begins_after
        )
        run.put(open_operation(new, goes_on=goes_on))
        self._runs.append(run)
        if len(self._runs) == 1:
            self._adopt(run)
        return run

    def close(self) -> None:
        """Send what still waits, as long as the store takes it, and end the thread."""
        try:
            if not self._writer.close() and (left := self._left()):
                log.warning("%s", left)
        finally:
            for spool in [
                *self._spools.values(),
                *filter(self._writer.keep, self._adopted.values()),
            ]:
                spool.release()

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
        try:
            for run in self._runs:
                run.finish("KILLED" if stopped else "FAILED", reason)
        finally:
            self.close()

    def _spool(self, output_dir: Path) -> tuple[Spool, bool]:
        """The folder's spool, and whether a run of this process used it before."""
        key = output_dir.resolve()
        known = self._spools.get(key)
        if known is not None:
            if any(run.uses(known) for run in self._runs):
                raise TrackingError(
                    f"{output_dir}: two runs can't have one folder; give each its own"
                )
            return known, True
        adopted = self._adopted.pop(key, None)
        if adopted is not None and self._writer.keep(adopted):
            self._spools[key] = adopted
            return adopted, True
        spool = Spool(key)
        spool.acquire()
        self._spools[key] = spool
        return spool, False

    def _adopt(self, run: RunLog) -> None:
        """Send what runs of the sweep that have ended left when their process was killed.

        Each is held no longer than that takes: another worker may be about to go on with the run.
        """
        for spool in left_by_ended(run.state, run.output_dir):
            if spool.output_dir not in self._spools and spool.can_be_acquired():
                self._adopted[spool.output_dir] = spool
                self._writer.replay(spool, lent=True)

    def _new_state(self, new: NewRun) -> RunState:
        uri = self._settings.uri
        return RunState(
            uid=uuid.uuid4().hex,
            name=new.name,
            sweep=new.sweep or new.name,
            uri=None if uri is None else public_uri(uri),
            experiment=self._settings.experiment,
        )

    def _left(self) -> str | None:
        """What is said of what could not be sent, if there is any."""
        spools = [*self._spools.values(), *self._adopted.values()]
        counts = [len(spool.waiting()) for spool in spools]
        number, runs = sum(counts), sum(1 for count in counts if count)
        uri = public_uri(self._settings.resolve(self._output_root))
        return (
            None
            if not number
            else (
                f"MLflow at {uri} did not take everything: {number} writes of {runs}"
                f" run{'s' if runs != 1 else ''} wait on the disk; send them by `lorasweep sync`"
            )
        )


class RunLog:
    """The log of one run; made by `Tracker.open_run`. Nothing is logged after `finish`.

    What an earlier process has logged is silently not logged again.
    """

    def __init__(
        self, writer: Writer, spool: Spool, state: RunState, *, upload: bool, after: int
    ) -> None:
        self._writer, self._spool, self._state = writer, spool, state
        self._upload, self._after = upload, after
        self._points: list[operations.Point] = []
        self._steps = dict(state.steps)
        self._finished = False
        self._logged = frozenset(state.epochs)

    @property
    def state(self) -> RunState:
        """What is logged up to now."""
        return self._state

    @property
    def output_dir(self) -> Path:
        """The run's own folder."""
        return self._spool.output_dir

    @property
    def logged_epochs(self) -> frozenset[int]:
        """Epochs (0 is the bare base) that earlier processes have logged."""
        return self._logged

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; waits until it is begun there. TrackingError if it can't be."""
        return self._writer.run_id(self._state.uid)

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the metrics of an optimizer step; they are written with the epoch's scores."""
        for point in operations.points(step, metrics):
            if point.step > self._steps.get(point.key, -1):
                self._steps[point.key] = point.step
                self._points.append(point)
        if len(self._points) >= FLUSH_POINTS:
            self._flush()

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
        """
        kept = replace(checkpoint, path=self._kept(checkpoint.path))
        model = operations.Model(checkpoint=kept, terms=dict(terms or {}), upload=self._upload)
        self._put_epoch(checkpoint.epoch, model, scores, samples)

    def log_file(self, path: Path, artifact_dir: str | None = None) -> None:
        """Add a finished file to the run's artifacts; it is read later, on the writing thread."""
        self.put(operations.File(path=self._kept(path), artifact_dir=artifact_dir))

    def log_image(self, image: Image.Image, name: str) -> None:
        """Add one picture to the run's artifacts: `contact_sheet.png`."""
        self.put(operations.Picture(png=pictures.png(image), name=name))

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self.put(operations.Tag(key=key, value=public_uri(value)))

    def finish(self, status: Status, reason: str | None = None) -> None:
        """End the run; a second call does nothing. Waits for MLflow only while it does well."""
        told = None if reason is None else public_uri(reason)
        self._end(operations.Close(time=operations.now(), status=status, reason=told))

    def suspend(self, reason: str) -> None:
        """End the run for now: another process will go on with it (`goes_on`)."""
        told = public_uri(reason)
        self._end(operations.Close(time=operations.now(), status="KILLED", suspended=told))

    def put(self, operation: operations.Operation, state: RunState | None = None) -> None:
        """Write an operation to the disk, to be sent. Raises TrackingError if the disk is full."""
        self._writer.put(self._spool, state or self._state, operation)
        self._state = state or self._state

    def undo(self) -> None:
        """Take back what this log has written to the disk; nothing of it was sent."""
        self._finished = True
        self._spool.forget(after=self._after)

    def uses(self, spool: Spool) -> bool:
        """Is it the log of a run that goes on in this folder?"""
        return spool is self._spool and not self._finished

    def _end(self, close: operations.Close) -> None:
        if self._finished:
            return
        self._finished = True
        self._flush()
        self.put(close, replace(self._state, is_open=False))
        self._writer.linger()

    def _put_epoch(
        self,
        epoch: int,
        model: operations.Model | None,
        scores: Mapping[str, float],
        samples: Mapping[str, Image.Image],
    ) -> None:
        if epoch in self._state.epochs:
            return
        time = operations.now()
        drawn = [
            operations.Sample(pictures.stem(f"samples/{key}", epoch, time), pictures.png(image))
            for key, image in samples.items()
        ]
        scored = operations.points(epoch, scores)
        logged = operations.Epoch(
            epoch=epoch, points=self._points, scores=scored, samples=drawn, model=model
        )
        self._put_points(logged, epochs=(*self._state.epochs, epoch))

    def _flush(self) -> None:
        if self._points:
            self._put_points(operations.Curves(points=self._points), epochs=self._state.epochs)

    def _put_points(self, operation: operations.Operation, epochs: tuple[int, ...]) -> None:
        """Write an operation that has all points up to now."""
        self.put(operation, replace(self._state, epochs=epochs, steps=dict(self._steps)))
        self._points = []

    def _kept(self, path: Path) -> Path:
        """Relative to the run's folder where it lies in there, for folders move."""
        full = path.resolve()
        inside = full.is_relative_to(self._spool.output_dir)
        return full.relative_to(self._spool.output_dir) if inside else full


def mark_broken(
    settings: Tracking, output_root: Path, output_dir: Path, reason: str, at_most: float = 2.0
) -> None:
    """Close a run whose process died without saying so: failed, with the reason.

    Sends what the process left, too; a store that doesn't answer gets it later.
    """
    spool = Spool(output_dir.resolve())
    if not spool.folder.is_dir():
        return
    with spool.held():
        state = spool.state()
        if state is None:
            return
        if state.is_open:
            close = operations.Close(
                time=operations.now(), status="FAILED", reason=public_uri(reason)
            )
            spool.put(replace(state, is_open=False), close)
        writer = writer_for(settings, output_root)
        writer.replay(spool)
        writer.close(at_most if writer.can_hang else None)
