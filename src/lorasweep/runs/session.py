"""The main job: from images to scored, logged checkpoints, for the runs of one pack."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import groupby
from types import TracebackType

from lorasweep.config.error_messages import one_line
from lorasweep.config.run import Run
from lorasweep.core.atomic_write import DiskError, write_atomically
from lorasweep.core.clock import Clock
from lorasweep.core.failures import FailureKind, RunError
from lorasweep.core.interrupts import Interrupts
from lorasweep.core.progress import Screen, Show
from lorasweep.core.settings import SettingsError
from lorasweep.core.text import size_of
from lorasweep.data import kohya_folders
from lorasweep.data.subsets import subsets
from lorasweep.judging.judge import Judge
from lorasweep.judging.metrics.metric import Scores, Terms
from lorasweep.judging.pick_rule import LOSS, SCORE
from lorasweep.lora_files.base_weights import merge_base_weights
from lorasweep.lora_files.checkpoint import Checkpoint, checkpoint_path
from lorasweep.models.base_model import BaseModel
from lorasweep.models.devices import resolve_device
from lorasweep.models.gpu_memory import memory_for
from lorasweep.runs import provenance
from lorasweep.runs.prepare import captions_used, encoded_images, new_run, write_folders
from lorasweep.runs.run_folder import (
    RunFolder,
    TakenError,
    forget_drop,
    read_scores,
    scored_checkpoints,
)
from lorasweep.runs.trained_before import take_trained
from lorasweep.runs.training_plan import plan
from lorasweep.tracking import Tracker, TrackingError
from lorasweep.tracking.records import InUseError
from lorasweep.tracking.store import PRUNED_TAG
from lorasweep.tracking.tracker import RunLog
from lorasweep.training import saved_states, sd_scripts_trainer
from lorasweep.training.native_trainer import NativeTraining
from lorasweep.training.saved_states import SavedState
from lorasweep.training.sd_scripts_trainer import SdScriptsTraining
from lorasweep.training.training_captions import warn_of_cut_captions
from lorasweep.training.training_run import SdScriptsTrainer, Stopped, TrainedEpoch, TrainingData

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
    if isinstance(error, DiskError | TrackingError):
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
    Runs that a sweep dropped are trained again from the start, to their ends.
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
        """Draw, caption and write the images of `first`; what can share its pack trains here."""
        self.first, self.clock, self.max_pack = first, Clock(), max_pack
        self._interrupts = interrupts or Interrupts()
        self._load, self._show = load or load_base, show
        with self.clock("prepare"):
            self.device = resolve_device(first.trainer.device)
            with ExitStack() as if_refused:
                if first.tracking.is_remote:  # does it answer? Captions may take hours
                    self._open_tracker().ready(first.output_dir, first.sweep)
                    if_refused.callback(self._tracker.close)
                self._folder = write_folders(first)
                if_refused.pop_all()
        self._captions = captions_used(first, self._folder)
        self._is_prepared = False
        self._runs: dict[str, _OpenRun] = {}  # those that train
        self._waiting: dict[str, tuple[Run, dict[str, float]]] = {}  # and the clock as they came
        self._taken: list[str] = []  # of those that came in last, what earlier sweeps have trained
        if not first.tracking.is_remote:  # a file is made once the images are known to be good
            self._open_tracker()

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
            if isinstance(error, KeyboardInterrupt | DiskError):
                with suppress(DiskError):  # then MLflow learns of it when the run goes on
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
        if not self._is_prepared:
            self._prepare()
        self._training = self._new_training()
        epochs = iter(self._training)
        while True:
            while started := self._admit():  # those that wait, while there is room
                yield started
            with self.clock("train"), self._interrupts.calling(self._training.stop):
                epoch = next(epochs, None)  # its checkpoints and states are written
            if self._interrupts.asked:
                raise Stopped("stopped at the end of an epoch")
            if epoch is None:
                return
            yield self._judge_epoch(epoch)  # scored, drawn and logged

    def join(self, run: Run) -> None:
        """Train `run` too, from the next epoch on or once there is room."""
        self._waiting[run.name] = (run, dict(self.clock.seconds))

    def drop(self, name: str) -> Finished:
        """Let a run leave after the epoch it has finished; its checkpoints stand."""
        if name in self._runs:
            self._training.drop(name)
            return self._finish(self._runs[name], dropped=True)
        self._waiting.pop(name, None)
        return Finished(run=name, dropped=True)

    @property
    def names(self) -> list[str]:
        """The runs that train or wait to."""
        return [*self._runs, *self._waiting]

    @property
    def max_runs(self) -> int | None:
        """Runs that can train at once, as far as that is known."""
        known = (self.max_pack, self._fitting, self._training.max_runs)
        return min((number for number in known if number is not None), default=None)

    def _new_training(self) -> NativeTraining | SdScriptsTraining:
        trainer, rest = self.first.trainer, (self._data, self._show, self._log_step)
        if isinstance(trainer, SdScriptsTrainer):
            return SdScriptsTraining(trainer, self._base, [], *rest)
        return NativeTraining(trainer, self._base, [], *rest)

    def _open_tracker(self) -> Tracker:
        self._tracker = Tracker(self.first.tracking, self.first.output_root)
        return self._tracker

    def _prepare(self) -> None:
        """Load the base model, encode the images, and score the bare base."""
        first = self.first
        with self.clock("prepare"):
            log.info("loading %s on %s", first.model.path, self.device)
            self._base = self._load(first, self.device)
            if not first.tracking.is_remote:  # a store that can't be written ends it here
                self._tracker.ready(first.output_dir, first.sweep)
            images = encoded_images(self._base, first, self._folder)
            warn_of_cut_captions(self._base, [*images.trained, *images.holdout])
            for line in plan(first, images):
                log.info(line)
            self._data = TrainingData(images.trained, first.dataset)
            self._judge = Judge(
                self._base,
                images,
                first.metrics.values(),
                first.sampling,
                first.dataset.size,
                self.clock,
            )
            self._fitting = self._measure()
        self._is_prepared = True

    def _measure(self) -> int | None:
        """Runs that fit into the device's memory; what a step takes grows with K x B."""
        trainer = self.first.trainer
        if isinstance(trainer, SdScriptsTrainer):
            return None

        def step() -> None:
            for run, _ in self._waiting.values():
                with suppress(ValueError):  # a run that can't start will say so itself
                    NativeTraining(trainer, self._base, [run], self._data).probe()
                    return

        number = memory_for(self.device, step)
        if number is not None:
            log.info("%s has memory for %d runs at once", self.device, number)
        return number

    def _admit(self) -> list[Report]:
        """Take in runs that wait, while there is room; what became of each."""
        room = None if self.max_runs is None else max(0, self.max_runs - len(self._runs))
        reports: list[Report] = []
        opened: list[_OpenRun] = []
        self._taken.clear()
        names = list(self._waiting)[:room]
        for name in names:
            found = self._open(*self._waiting.pop(name))
            if isinstance(found, _OpenRun):
                opened.append(found)
            else:
                reports += found
        if self._taken:
            said = "%d of %d runs are trained already: %s"
            log.info(said, len(self._taken), len(names), ", ".join(self._taken))
        begun = [one for one in opened if one.folder.found == "unfinished"]
        broken_off = [one for one in begun if not one.folder.had_ended]
        states = saved_states.together({one.run.name: one.run.output_dir for one in broken_off})
        for one in begun:
            if one.folder.had_ended:  # each from its own end
                states |= saved_states.together({one.run.name: one.run.output_dir})
        if fresh := [one.run.name for one in opened if one.run.name not in states]:
            log.info("training %s", ", ".join(fresh))
        reports += [self._start(one, states.get(one.run.name)) for one in opened]
        resumed = [(self._runs[name], states[name]) for name in self._runs if name in states]
        return [*reports, *self._epochs_behind(resumed)]

    def _open(self, run: Run, begun: dict[str, float]) -> _OpenRun | list[Report]:
        """Take a run's folder and begin its log; or what is said of a run that won't train."""
        new = new_run(run, self._folder, self._captions)
        try:
            taken = take_trained(run, new, self._tracker)
            folder = RunFolder(run, new.dataset_digest)
        except (ValueError, InUseError) as error:  # another's, or begun otherwise
            is_taken = isinstance(error, TakenError | InUseError)
            kind = FailureKind.RETRY if is_taken else FailureKind.OWN
            return [Failure(run=run.name, reason=str(error), kind=kind)]
        if taken is not None:
            self._taken.append(taken)
        if folder.found in ("finished", "dropped"):
            return self._ended_before(run, folder, is_said=taken is not None)
        try:
            run_log = self._tracker.open_run(new, goes_on=folder.found == "unfinished")
        except InUseError as error:
            folder.release()
            return [Failure(run=run.name, reason=str(error), kind=FailureKind.RETRY)]
        run_log.log_file(run.output_dir / "manifest.json")
        return _OpenRun(run, folder, run_log, begun)

    def _ended_before(self, run: Run, folder: RunFolder, *, is_said: bool) -> list[Report]:
        """Reports of a run that came to its end or was dropped, for a driver not told yet."""
        folder.release()
        self._tracker.publish_left(run.output_dir)
        dropped = folder.found == "dropped"
        how = "dropped" if dropped else "trained"
        if not is_said:
            log.info("%s was %s before, in %s", run.name, how, run.output_dir)
        epochs = [
            EpochReport(
                run=run.name,
                checkpoint=self._checkpoint(run, one.epoch),
                scores=one.scores,
                terms=one.terms,
            )
            for one in scored_checkpoints(run)
        ]
        ended = Finished(run=run.name, dropped=dropped)
        return [Started(run=run.name, device=self.device), *epochs, ended]

    def _start(self, member: _OpenRun, state: SavedState | None) -> Started | Failure:
        """Let a run train, from its beginning or from a state."""
        run, epochs = member.run, 0 if state is None else state.snapshot.num_epochs
        self._runs[run.name] = member
        try:
            if epochs < self._num_epochs(run):
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
                f"{run.name}: checkpoints and states will take about {size_of(needed)} with"
                f" those of the runs beside it, and {run.output_dir} has {size_of(free)} left;"
                " free some, or try trainer.save_dtype=fp16, fewer epochs, or another output_root"
            )

    def _epochs_behind(self, resumed: Sequence[tuple[_OpenRun, SavedState]]) -> list[Report]:
        """Reports of the epochs that runs have behind them; what wasn't logged is logged now.

        Checkpoints of one epoch are scored together, as they would have been, also with those of
        them that were logged before the end: how many are scored at once changes the rounding.
        """
        for member, state in resumed:
            if state.snapshot.num_batches == 0:
                self._note_companions(member, [(name, n) for name, n, _ in state.pack], {})
            for step, values in state.snapshot.records:
                member.log.log_step(step, values)
        last = max((state.snapshot.num_epochs for _, state in resumed), default=0)
        reports: list[Report] = []
        for epoch in range(1, last + 1):
            files: list[Checkpoint] = []
            of_epoch: dict[str, EpochReport] = {}
            for member, state in resumed:
                if epoch > state.snapshot.num_epochs:
                    continue
                name, one = member.run.name, self._checkpoint(member.run, epoch)
                known = read_scores(member.run.output_dir, epoch)
                if known is not None and epoch in member.log.logged_epochs:
                    scores, terms = known
                    of_epoch[name] = EpochReport(
                        run=name, checkpoint=one, scores=scores, terms=terms
                    )
                if one.path.is_file():
                    files.append(one)
                elif name not in of_epoch:
                    log.warning("%s is missing and can't be scored", one.path)
            if any(one.run not in of_epoch for one in files):
                of_epoch |= {report.run: report for report in self._judge_checkpoints(files)}
            reports += of_epoch.values()
        ended = [m for m, state in resumed if state.snapshot.num_epochs == self._num_epochs(m.run)]
        return [*reports, *(self._finish(member, dropped=False) for member in ended)]

    def _log_origin(self, member: _OpenRun) -> None:
        """Log what the run is made with; its images too, if they are to be kept in MLflow."""
        run = member.run
        made_with = provenance.record(
            run.output_dir, run.model, run.cache_dir, self.device, run.network_weights
        )
        made_with.append(run.output_dir / "captions.json")
        if run.dataset.log_images:
            folders = {one.name: one.image_dir for one in subsets(run.dataset)}
            image_dir = run.dataset.image_dir
            made_with.append(kohya_folders.pack_originals(self._folder, image_dir, folders))
        for file in made_with:
            member.log.log_file(file)

    def _note_companions(
        self, member: _OpenRun, pack: Sequence[tuple[str, int]], failures: Mapping[str, str]
    ) -> None:
        """Log with whom a run has trained an epoch, by (run, its epoch)."""
        folder, name = member.run.output_dir, member.run.name
        member.log.log_file(provenance.note_companions(folder, name, pack, failures))

    def _log_step(self, run: str, step: int, values: Mapping[str, float]) -> None:
        self._runs[run].log.log_step(step, values)

    def _judge_epoch(self, epoch: TrainedEpoch) -> list[Report]:
        """Log an epoch and score its checkpoints; runs that failed or are done leave."""
        pack = [(one.run, one.epoch) for one in epoch.checkpoints]
        for name, _ in pack:
            self._note_companions(self._runs[name], pack, epoch.failures)
        reports: list[Report] = []
        for name, reason in epoch.failures.items():
            reports.append(self._fail(self._runs[name], reason))
        reports += self._judge_checkpoints(epoch.checkpoints)
        for one in epoch.checkpoints:
            member = self._runs[one.run]
            if one.epoch == self._num_epochs(member.run):
                reports.append(self._finish(member, dropped=False))
        return reports

    def _judge_checkpoints(self, checkpoints: Sequence[Checkpoint]) -> list[EpochReport]:
        """Score and draw the checkpoints of an epoch, all at once, and log them."""
        if not checkpoints:
            return []
        judged = self._judge.checkpoints(checkpoints)
        reports: list[EpochReport] = []
        for one, (scored, pictures) in zip(checkpoints, judged, strict=True):
            member = self._runs[one.run]
            # scores that were logged, or that an older version kept before it did, stay
            kept = read_scores(member.run.output_dir, one.epoch)
            scores, terms = kept or (scored.scores, scored.terms)
            member.log.log_epoch(one, scores, pictures, terms)
            reports.append(EpochReport(run=one.run, checkpoint=one, scores=scores, terms=terms))
        _say(reports)
        return reports

    def _fail(self, member: _OpenRun, reason: str) -> Failure:
        del self._runs[member.run.name]
        for path, place in sd_scripts_trainer.files_of(member.run.output_dir).items():
            member.log.log_file(path, place)
        member.log.finish("FAILED", reason)
        member.folder.end("failed")
        return Failure(run=member.run.name, reason=reason)

    def _finish(self, member: _OpenRun, *, dropped: bool) -> Finished:
        run, run_log = member.run, member.log
        self._runs.pop(run.name, None)
        sheet = self._judge.contact_sheet(run.output_dir, run.name)
        if sheet is not None:
            run_log.log_file(sheet)
            log.info("%s: contact sheet %s", run.name, sheet)
        run_log.log_file(run.output_dir / "captions.json")
        for path, place in sd_scripts_trainer.files_of(run.output_dir).items():
            run_log.log_file(path, place)
        timing = run.output_dir / "seconds.json"
        seconds = json.dumps(self.clock.since(member.begun), indent=1)
        write_atomically(timing, seconds.encode())
        run_log.log_file(timing)
        if dropped:
            run_log.tag(PRUNED_TAG, "true")
        run_log.finish("KILLED" if dropped else "FINISHED")
        member.folder.end("dropped" if dropped else "finished")
        return Finished(run=run.name, dropped=dropped)

    def _num_epochs(self, run: Run) -> int:
        return run.num_epochs(self._training.steps_per_epoch)

    def _checkpoint(self, run: Run, epoch: int) -> Checkpoint:
        path = checkpoint_path(run.output_dir, run.name, epoch)
        steps_per_epoch = self._training.steps_per_epoch
        step = min(epoch * steps_per_epoch, run.num_steps(steps_per_epoch))
        return Checkpoint(path=path, run=run.name, epoch=epoch, step=step)


@dataclass(frozen=True)
class _OpenRun:
    """A run whose folder is taken and whose log is open, and the clock as it was when it came."""

    run: Run
    folder: RunFolder
    log: RunLog
    begun: dict[str, float]


def load_base(run: Run, device: str) -> BaseModel:
    """The run's base model on a device, with what is to be merged into it."""
    base = run.model.load(device, run.trainer.precision)
    merge_base_weights(base)
    return base


def _say(reports: Sequence[Report]) -> None:
    found = [report for report in reports if isinstance(report, EpochReport)]
    found.sort(key=lambda report: report.checkpoint.epoch)  # runs that joined are behind
    for epoch, of_epoch in groupby(found, key=lambda report: report.checkpoint.epoch):
        reports_of = list(of_epoch)
        by = SCORE if any(SCORE in one.scores for one in reports_of) else LOSS
        scored = [f"{one.run} {one.scores[by]:.3f}" for one in reports_of if by in one.scores]
        if scored:
            log.info("epoch %d, %s: %s", epoch, by, ", ".join(scored))
        else:  # without held-out images or this metric there is none
            log.info("epoch %d: %s", epoch, ", ".join(one.run for one in reports_of))
