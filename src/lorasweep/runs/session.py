"""The main job: from images to scored, logged checkpoints, for the runs of one pack."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from types import TracebackType

from lorasweep.config.error_messages import one_line
from lorasweep.config.run import Run
from lorasweep.core.atomic_write import DiskFullError
from lorasweep.core.clock import Clock
from lorasweep.core.failures import FailureKind, RunError
from lorasweep.core.interrupts import Interrupts
from lorasweep.core.progress import Screen, Show
from lorasweep.core.settings import SettingsError
from lorasweep.data import kohya_folders
from lorasweep.judging.judge import Judge, load_pack
from lorasweep.judging.metrics.metric import Scores, Terms
from lorasweep.lora_files.checkpoint import Checkpoint, checkpoint_path
from lorasweep.models.base_model import BaseModel
from lorasweep.models.devices import resolve_device
from lorasweep.models.gpu_memory import memory_for
from lorasweep.runs import provenance
from lorasweep.runs.prepare import captions_used, encoded_images, new_run, write_folders
from lorasweep.runs.run_folder import RunFolder, TakenError, forget_drop
from lorasweep.tracking import Tracker, TrackingError
from lorasweep.tracking.records import InUseError
from lorasweep.tracking.store import PRUNED_TAG
from lorasweep.tracking.tracker import RunLog
from lorasweep.training import saved_states
from lorasweep.training.native_trainer import NativeTraining
from lorasweep.training.saved_states import SavedState
from lorasweep.training.training_run import Stopped, TrainedEpoch, TrainingData

__all__ = [
    "EpochReport",
    "Failure",
    "Finished",
    "Report",
    "Session",
    "Started",
    "captions_used",
    "failure_kind",
    "load_pack",
    "run_pack",
    "write_folders",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Started:
    """A run has joined a pack."""

    run: str
    device: str


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """One checkpoint of one run, scored and logged."""

    run: str
    checkpoint: Checkpoint
    scores: Scores
    terms: Terms


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that stopped before its end; its earlier checkpoints stand."""

    run: str
    reason: str
    kind: FailureKind = FailureKind.OWN

    @staticmethod
    def of_pack(
        names: Sequence[str], error: Exception, kind: FailureKind | None = None
    ) -> list[Failure]:
        """Failures of all runs of a pack that an error broke; its kind is the error's own."""
        reason = one_line(error)
        if reason is None:
            log.error("a pack failed", exc_info=error)
            reason = f"{type(error).__name__}: {error}"
        return [
            Failure(run=name, reason=reason, kind=kind or failure_kind(error)) for name in names
        ]


def failure_kind(error: BaseException) -> FailureKind:
    """The kind of failure that an error is which broke a pack or a job."""
    if isinstance(error, RunError):
        return error.kind
    if isinstance(error, DiskFullError | TrackingError):
        return FailureKind.ENVIRONMENT
    return FailureKind.SETUP if isinstance(error, ValueError) else FailureKind.OWN


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that came to its end, or was dropped before it."""

    run: str
    dropped: bool


Report = Started | EpochReport | Failure | Finished


def run_pack(runs: Sequence[Run], interrupts: Interrupts | None = None) -> Iterator[Report]:
    """Train runs together, yielding a report of every checkpoint once it is scored and logged.

    A run that was begun in its folder and broken off goes on there; the reports of the epochs that
    it has behind it come again. Raises ValueError for what the user must mend (images, captions,
    model, resolution), before any training; a run that fails alone is a Failure, the others go on.
    Runs that a sweep dropped are trained anew, to their ends.
    """
    for run in runs:
        forget_drop(run.output_dir)
    with Screen() as screen, Session(runs[0], show=screen.show, interrupts=interrupts) as session:
        for reports in session.train(runs):
            yield from reports


class Session:
    """What runs that can share a pack share: images, base model, baselines, the way to MLflow.

    It lasts from pack to pack, each an iteration of `train`. Between two of its lists of reports,
    runs may `join` and `drop` out. `max_pack` bounds the runs that train at once, and so does the
    memory of a CUDA device, measured once. `interrupts` ask for an end at the next step.
    """

    def __init__(
        self,
        first: Run,
        *,
        max_pack: int | None = None,
        load: Callable[[Run, str], BaseModel] | None = None,
        show: Show | None = None,
        interrupts: Interrupts | None = None,
    ) -> None:
        """Draw, caption and write the images of `first`, whose like will be trained."""
        self.first, self.clock, self.max_pack = first, Clock(), max_pack
        self._interrupts = interrupts or Interrupts()
        self._load, self._show = load or load_base, show
        with self.clock("prepare"):
            self.device = resolve_device(first.trainer.device)
            self._folder = write_folders(first)
        self._captions = captions_used(first, self._folder)
        self._judge: Judge | None = None
        self._runs: dict[str, _Member] = {}  # those that train
        self._waiting: list[Run] = []
        self._joined: dict[str, dict[str, float]] = {}  # the clock as it was when a run came
        self._tracker = Tracker(first.tracking, first.output_root)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what waits for MLflow; runs that an error broke off are marked there."""
        try:
            if isinstance(error, KeyboardInterrupt | DiskFullError):
                with suppress(DiskFullError):  # then MLflow learns of it when the run goes on
                    for member in self._runs.values():
                        member.log.suspend(str(error) or "stopped by a signal")
            self._tracker.__exit__(kind, error, trace)
        finally:
            for member in self._runs.values():
                member.folder.release()

    def train(self, runs: Sequence[Run]) -> Iterator[list[Report]]:
        """Train runs as one pack, and those that join it; what each epoch brought.

        Raises ValueError for what the user must mend, before any training.
        """
        for run in runs:
            self.join(run)
        if self._judge is None:
            self._prepare()
        self._training = NativeTraining(self.first.trainer, self._base, [], self._data, self._show)
        epochs = iter(self._training)
        while True:
            while started := self._admit():
                yield started
            with self.clock("train"), self._interrupts.calling(self._training.stop):
                epoch = next(epochs, None)
            if self._interrupts.asked:
                raise Stopped("stopped at the end of an epoch")
            if epoch is None:
                return
            yield self._reports(epoch)

    def join(self, run: Run) -> None:
        """Train `run` too, from the next epoch on or once there is room."""
        self._waiting.append(run)
        self._joined[run.name] = dict(self.clock.seconds)

    def drop(self, name: str) -> Finished:
        """Let a run leave after the epoch it has finished; its checkpoints stand."""
        if name in self._runs:
            self._training.drop(name)
            return self._finish(self._runs[name], dropped=True)
        self._waiting = [run for run in self._waiting if run.name != name]
        return Finished(run=name, dropped=True)

    @property
    def names(self) -> list[str]:
        """The runs that train or wait to."""
        return [*self._runs, *(run.name for run in self._waiting)]

    @property
    def max_runs(self) -> int | None:
        """Runs that can train at once, as far as that is known."""
        known = (self.max_pack, self._fitting, self._training.max_runs)
        return min((number for number in known if number is not None), default=None)

    def _prepare(self) -> None:
        with self.clock("prepare"):
            self._base = self._load(self.first, self.device)
            # a store that can't be written ends here, before any training
            self._tracker.ready(self.first.output_dir, self.first.sweep)
            images = encoded_images(self._base, self.first, self._folder)
            self._data = TrainingData(images.train, self.first.dataset)
            first = self.first
            self._judge = Judge(
                self._base,
                images,
                first.metrics.values(),
                first.sampling,
                first.dataset.size,
                self.clock,
            )
            self._fitting = self._measure()

    def _measure(self) -> int | None:
        """Runs that fit into the device's memory; what a step takes grows with K x B."""

        def step() -> None:
            for run in self._waiting:
                with suppress(ValueError):  # a run that can't start will say so itself
                    NativeTraining(self.first.trainer, self._base, [run], self._data).probe()
                    return

        number = memory_for(self.device, step)
        if number is not None:
            log.info("%s has memory for %d runs at once", self.device, number)
        return number

    def _admit(self) -> list[Report]:
        """Take in runs that wait, while there is room; what became of each."""
        room = None if self.max_runs is None else max(0, self.max_runs - len(self._runs))
        coming, self._waiting = self._waiting[:room], self._waiting[len(self._waiting[:room]) :]
        members, reports = self._open(coming)
        begun = {one.run.name: one.run.output_dir for one in members if one.folder.goes_on}
        found = saved_states.together(begun)
        fresh = [one.run.name for one in members if one.run.name not in found]
        if fresh:
            log.info("training %s", ", ".join(fresh))
        on_the_way: list[_Begun] = []
        for member in members:
            state = found.get(member.run.name)
            report = self._start(member, state)
            reports.append(report)
            if state is not None and isinstance(report, Started):
                on_the_way.append((member, state))
        return [*reports, *self._behind(on_the_way)]

    def _open(self, runs: Sequence[Run]) -> tuple[list[_Member], list[Report]]:
        """Take the folders of runs and begin their logs; what is said of those that won't train."""
        members: list[_Member] = []
        reports: list[Report] = []
        for run in runs:
            new = new_run(run, self._folder, self._captions)
            try:
                folder = RunFolder(run, new.dataset_digest)
            except ValueError as error:  # another's, or begun otherwise
                kind = FailureKind.RETRY if isinstance(error, TakenError) else FailureKind.OWN
                reports.append(Failure(run=run.name, reason=str(error), kind=kind))
                continue
            if folder.ended is not None:
                reports += self._ended_before(run, folder)
                continue
            try:
                run_log = self._tracker.open_run(new, goes_on=folder.goes_on)
            except InUseError as error:
                folder.release()
                reports.append(Failure(run=run.name, reason=str(error), kind=FailureKind.RETRY))
                continue
            run_log.log_file(run.output_dir / "manifest.json")
            members.append(_Member(run, folder, run_log, self._joined[run.name]))
        return members, reports

    def _ended_before(self, run: Run, folder: RunFolder) -> list[Report]:
        """Reports of a run that came to its end or was dropped, for a driver not told yet."""
        folder.release()
        dropped = folder.ended == "dropped"
        how = "dropped" if dropped else "trained"
        log.info("%s was %s before, in %s", run.name, how, run.output_dir)
        epochs = range(1, run.max_train_epochs + 1)
        found = [self._known(run, epoch, folder.scores(epoch)) for epoch in epochs]
        ended = Finished(run=run.name, dropped=dropped)
        return [
            Started(run=run.name, device=self.device),
            *[one for one in found if one is not None],
            ended,
        ]

    def _known(self, run: Run, epoch: int, found: tuple[Scores, Terms] | None) -> Report | None:
        if found is None:
            return None
        scores, terms = found
        one = self._checkpoint(run, epoch)
        return EpochReport(run=run.name, checkpoint=one, scores=scores, terms=terms)

    def _checkpoint(self, run: Run, epoch: int) -> Checkpoint:
        path = checkpoint_path(run.output_dir, run.name, epoch)
        step = epoch * self._training.steps_per_epoch
        return Checkpoint(path=path, run=run.name, epoch=epoch, step=step)

    def _start(self, member: _Member, state: SavedState | None) -> Started | Failure:
        """Let a run train, from its beginning or from a state."""
        assert self._judge is not None
        run, epochs = member.run, 0 if state is None else state.snapshot.num_epochs
        self._runs[run.name] = member
        try:
            if epochs < run.max_train_epochs:
                self._training.join(run, state)
                self._check_disk(run)
        except ValueError as error:  # this run's settings: the others go on
            self._training.drop(run.name)
            return self._fail(member, str(error))
        if state is not None:
            log.info("%s goes on after epoch %d", run.name, epochs)
        self._log_origin(member)
        if 0 not in member.log.logged_epochs:
            member.log.log_base(*self._judge.base_model(run.output_dir, run.name))
        return Started(run=run.name, device=self.device)

    def _check_disk(self, run: Run) -> None:
        """Raise SettingsError if what the runs will write doesn't fit, as far as can be told."""
        needed = sum(self._training.disk_needs(name) for name in self._runs)
        free = shutil.disk_usage(run.output_dir).free
        if needed > free:
            raise SettingsError(
                f"{run.name}: checkpoints and states will take about {needed / 1e9:.1f} GB with"
                f" those of the runs beside it, and {run.output_dir} has {free / 1e9:.1f} GB left;"
                " free some, or try trainer.save_dtype=fp16, fewer epochs, or another output_root"
            )

    def _behind(self, begun: Sequence[_Begun]) -> list[Report]:
        """Reports of the epochs that runs have behind them; what wasn't logged is logged now."""
        for member, state in begun:
            if state.snapshot.num_batches == 0:
                self._note_companions(member, [(name, n) for name, n, _ in state.pack], {})
                for step, values in state.snapshot.records:
                    member.log.log_step(step, values)
        last = max((state.snapshot.num_epochs for _, state in begun), default=0)
        reports: list[Report] = []
        for epoch in range(1, last + 1):
            members = [member for member, state in begun if epoch <= state.snapshot.num_epochs]
            reports += self._again(members, epoch)
        for member, state in begun:
            if state.snapshot.num_epochs == member.run.max_train_epochs:
                reports.append(self._finish(member, dropped=False))
        return reports

    def _again(self, members: Sequence[_Member], epoch: int) -> list[Report]:
        """Reports of one epoch that runs have behind them; those not logged are scored together."""
        reports: list[Report] = []
        left: list[Checkpoint] = []
        for member in members:
            known = member.folder.scores(epoch) if epoch in member.log.logged_epochs else None
            report = self._known(member.run, epoch, known)
            if report is not None:
                reports.append(report)
            elif (one := self._checkpoint(member.run, epoch)).path.is_file():
                left.append(one)
            else:
                log.warning("%s is missing and can't be scored", one.path)
        return [*reports, *self._scored(left)]

    def _fail(self, member: _Member, reason: str) -> Failure:
        del self._runs[member.run.name]
        member.log.finish("FAILED", reason)
        member.folder.end("failed")
        return Failure(run=member.run.name, reason=reason)

    def _log_origin(self, member: _Member) -> None:
        """Log what the run is made with; its images too, if they are to be kept in MLflow."""
        run = member.run
        made_with = provenance.record(run.output_dir, run.model, run.cache_dir, self.device)
        made_with.append(run.output_dir / "captions.json")
        if run.dataset.log_images:
            made_with.append(kohya_folders.pack_originals(self._folder, run.dataset.image_dir))
        for file in made_with:
            member.log.log_file(file)

    def _note_companions(
        self, member: _Member, pack: Sequence[tuple[str, int]], failures: Mapping[str, str]
    ) -> None:
        """Log with whom a run has trained an epoch, by (run, its epoch)."""
        folder, name = member.run.output_dir, member.run.name
        member.log.log_file(provenance.note_companions(folder, name, pack, failures))

    def _reports(self, epoch: TrainedEpoch) -> list[Report]:
        pack = [(one.run, one.epoch) for one in epoch.checkpoints]
        for name, _ in pack:
            self._note_companions(self._runs[name], pack, epoch.failures)
        for name, steps in epoch.steps.items():
            for step, values in steps:
                self._runs[name].log.log_step(step, values)
        reports: list[Report] = []
        for name, reason in epoch.failures.items():
            reports.append(self._fail(self._runs[name], reason))
        reports += self._scored(epoch.checkpoints)
        for one in epoch.checkpoints:
            member = self._runs[one.run]
            if one.epoch == member.run.max_train_epochs:
                reports.append(self._finish(member, dropped=False))
        return reports

    def _scored(self, checkpoints: Sequence[Checkpoint]) -> list[Report]:
        """Score and draw the checkpoints of an epoch, all at once, and log them."""
        if not checkpoints:
            return []
        assert self._judge is not None
        judged = self._judge.checkpoints(checkpoints)
        reports: list[Report] = []
        for one, (scored, pictures) in zip(checkpoints, judged, strict=True):
            member = self._runs[one.run]
            # scores that an older version kept before it logged the epoch stay as they are
            scores, terms = member.folder.scores(one.epoch) or (scored.scores, scored.terms)
            member.log.log_epoch(one, scores, pictures, terms)
            reports.append(EpochReport(run=one.run, checkpoint=one, scores=scores, terms=terms))
        _say(reports)
        return reports

    def _finish(self, member: _Member, *, dropped: bool) -> Finished:
        assert self._judge is not None
        run, run_log = member.run, member.log
        self._runs.pop(run.name, None)
        sheet = self._judge.contact_sheet(run.output_dir, run.name)
        if sheet is not None:
            run_log.log_file(sheet)
            log.info("%s: contact sheet %s", run.name, sheet)
        run_log.log_file(run.output_dir / "captions.json")
        timing = run.output_dir / "seconds.json"
        timing.write_text(json.dumps(self.clock.since(member.begun), indent=1))
        run_log.log_file(timing)
        if dropped:
            run_log.tag(PRUNED_TAG, "true")
        run_log.finish("KILLED" if dropped else "FINISHED")
        member.folder.end("dropped" if dropped else "finished")
        return Finished(run=run.name, dropped=dropped)


@dataclass(frozen=True)
class _Member:
    """A run of a session, with its log and the session's clock as it was when the run came."""

    run: Run
    folder: RunFolder
    log: RunLog
    begun: dict[str, float]


_Begun = tuple[_Member, SavedState]


def load_base(run: Run, device: str) -> BaseModel:
    """The run's base model on a device."""
    return run.model.load(device, run.trainer.precision)


def _say(reports: Sequence[Report]) -> None:
    found = [report for report in reports if isinstance(report, EpochReport)]
    found.sort(key=lambda report: report.checkpoint.epoch)  # runs that joined are behind
    for epoch, of_epoch in groupby(found, key=lambda report: report.checkpoint.epoch):
        shown = ", ".join(
            f"{report.run} {report.scores.get('val/loss_rel', math.nan):.3f}" for report in of_epoch
        )
        log.info("epoch %d, val/loss_rel: %s", epoch, shown)
