"""The main job: from images to scored, logged checkpoints, for the runs of one pack."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType

from filelock import FileLock

from lorasweep import captions, dataset, folders, latents, provenance
from lorasweep.checkpoint import Checkpoint
from lorasweep.config import Run
from lorasweep.judge import Clock, Judge, load_pack
from lorasweep.metrics import Images, Scores, Terms
from lorasweep.models import BaseModel, memory_for, resolve_device
from lorasweep.progress import Screen, Show
from lorasweep.tracking import PRUNED_TAG, TRIAL_TAG, NewRun, RunLog, Tracker
from lorasweep.trainers import Epoch, Training, TrainingData, TrainingRun

__all__ = [
    "EpochReport",
    "Failure",
    "Finished",
    "Report",
    "RunError",
    "Session",
    "Started",
    "captions_used",
    "load_pack",
    "run_pack",
    "training_run",
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
    transient: bool = False
    """Might it go well another time? A killed worker and memory shared with others are so."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that came to its end, or was dropped before it."""

    run: str
    dropped: bool


Report = Started | EpochReport | Failure | Finished


class RunError(RuntimeError):
    """A run of a sweep failed; the message is its reason."""


def run_pack(runs: Sequence[Run]) -> Iterator[Report]:
    """Train runs together, yielding a report of every checkpoint once it is scored and logged.

    Raises ValueError for what the user must mend (images, captions, model, resolution), before any
    training; a run that fails alone is a Failure, the others go on.
    """
    with Screen() as screen, Session(runs[0], show=screen.show) as session:
        for reports in session.train(runs):
            yield from reports


class Session:
    """What runs that can share a pack share: images, base model, baselines, the way to MLflow.

    It lasts from pack to pack, each an iteration of `train`. Between two of its lists of reports,
    runs may `join` and `drop` out. `max_pack` bounds the runs that train at once, and so does the
    memory of a CUDA device, measured once.
    """

    def __init__(
        self,
        first: Run,
        *,
        max_pack: int | None = None,
        load: Callable[[Run, str], BaseModel] | None = None,
        show: Show | None = None,
    ) -> None:
        """Draw, caption and write the images of `first`, whose like will be trained."""
        self.first, self.clock, self.max_pack = first, Clock(), max_pack
        self._load, self._show = load or load_base, show
        with self.clock("prepare"):
            self.device = resolve_device(first.trainer.device)
            self._folder = write_folders(first)
        self._captions = captions_used(first, self._folder)
        self._judge: Judge | None = None
        self._runs: dict[str, _Member] = {}  # those that train
        self._waiting: list[_Member] = []
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
        self._tracker.__exit__(kind, error, trace)

    def train(self, runs: Sequence[Run]) -> Iterator[list[Report]]:
        """Train runs as one pack, and those that join it; what each epoch brought.

        Raises ValueError for what the user must mend, before any training.
        """
        for run in runs:
            self.join(run)
        if self._judge is None:
            self._prepare()
        trainer = self.first.trainer
        self._training: Training = trainer.start(self._base, [], self._data, self._show)
        epochs = iter(self._training)
        while True:
            while started := self._admit():
                yield started
            with self.clock("train"):
                epoch = next(epochs, None)
            if epoch is None:
                return
            yield self._reports(epoch)

    def join(self, run: Run) -> None:
        """Train `run` too, from the next epoch on or once there is room."""
        new = _new_run(run, self._folder, self._captions)
        self._waiting.append(_Member(run, self._tracker.open_run(new), dict(self.clock.seconds)))

    def drop(self, name: str) -> Finished:
        """Let a run leave after the epoch it has finished; its checkpoints stand."""
        waiting = [member for member in self._waiting if member.run.name == name]
        if not waiting:
            self._training.drop(name)
        self._waiting = [member for member in self._waiting if member not in waiting]
        return self._finish(waiting[0] if waiting else self._runs[name], dropped=True)

    @property
    def names(self) -> list[str]:
        """The runs that train or wait to."""
        return [*self._runs, *(member.run.name for member in self._waiting)]

    @property
    def max_runs(self) -> int | None:
        """Runs that can train at once, as far as that is known."""
        known = (self.max_pack, self._fitting, self._training.max_runs)
        return min((number for number in known if number is not None), default=None)

    def _prepare(self) -> None:
        with self.clock("prepare"):
            self._base = self._load(self.first, self.device)
            self._tracker.ready()  # a store that can't be written ends here, before any training
            images = _images(self._base, self.first, self._folder)
            self._data = TrainingData(images.train, self.first.dataset)
            self._judge = Judge(self._base, self.first, images, self.clock)
            self._fitting = self._measure()

    def _measure(self) -> int | None:
        """Runs that fit into the device's memory; what a step takes grows with K x B."""
        first = training_run(self._waiting[0].run)

        def step() -> None:
            self.first.trainer.start(self._base, [first], self._data).probe()

        number = memory_for(self.device, step)
        if number is not None:
            log.info("%s has memory for %d runs at once", self.device, number)
        return number

    def _admit(self) -> list[Report]:
        """Take in who waits, while there is room; what became of each."""
        reports: list[Report] = []
        while self._waiting and (self.max_runs is None or len(self._runs) < self.max_runs):
            reports.append(self._start(self._waiting.pop(0)))
        started = [report.run for report in reports if isinstance(report, Started)]
        if started:
            log.info("training %s", ", ".join(started))
        return reports

    def _start(self, member: _Member) -> Report:
        assert self._judge is not None
        name = member.run.name
        try:
            self._training.join(training_run(member.run))
        except ValueError as error:  # this run's settings: the others go on
            member.log.finish("FAILED", str(error))
            return Failure(run=name, reason=str(error))
        self._runs[name] = member
        self._log_origin(member)
        member.log.log_base(*self._judge.base_model(member.run))
        return Started(run=name, device=self.device)

    def _log_origin(self, member: _Member) -> None:
        """Log what the run is made with; its images too, if they are to be kept in MLflow."""
        run = member.run
        made_with = provenance.record(run.output_dir, run.model, run.cache_dir, self.device)
        made_with.append(run.output_dir / "captions.json")
        if run.dataset.log_images:
            made_with.append(folders.pack_originals(self._folder, run.dataset.image_dir))
        for file in made_with:
            member.log.log_file(file)

    def _note_companions(self, epoch: Epoch) -> None:
        """Log with whom each run has trained this epoch."""
        members = [(one.run, one.epoch) for one in epoch.checkpoints]
        for name, _ in members:
            run = self._runs[name]
            run.log.log_file(
                provenance.note_companions(run.run.output_dir, name, members, epoch.failures)
            )

    def _reports(self, epoch: Epoch) -> list[Report]:
        self._note_companions(epoch)
        for name, steps in epoch.steps.items():
            for step, values in steps:
                self._runs[name].log.log_step(step, values)
        reports: list[Report] = []
        for name, reason in epoch.failures.items():
            self._runs.pop(name).log.finish("FAILED", reason)
            reports.append(Failure(run=name, reason=reason))
        reports += self._scored(epoch.checkpoints)
        for one in epoch.checkpoints:
            member = self._runs[one.run]
            if one.epoch == member.run.trainer.max_train_epochs:
                reports.append(self._finish(member, dropped=False))
        return reports

    def _scored(self, checkpoints: Sequence[Checkpoint]) -> list[Report]:
        """Score and draw the checkpoints of an epoch, all at once, and log them."""
        if not checkpoints:
            return []
        assert self._judge is not None
        runs = {name: member.run for name, member in self._runs.items()}
        reports: list[Report] = []
        for one, (scored, samples) in zip(
            checkpoints, self._judge.checkpoints(checkpoints, runs), strict=True
        ):
            self._runs[one.run].log.log_epoch(one, scored.scores, samples, scored.terms)
            report = EpochReport(
                run=one.run, checkpoint=one, scores=scored.scores, terms=scored.terms
            )
            reports.append(report)
        _say(reports)
        return reports

    def _finish(self, member: _Member, *, dropped: bool) -> Finished:
        assert self._judge is not None
        run, run_log = member.run, member.log
        self._runs.pop(run.name, None)
        sheet = self._judge.contact_sheet(run)
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
        return Finished(run=run.name, dropped=dropped)


@dataclass(frozen=True)
class _Member:
    """A run of a session, with its log and the session's clock as it was when the run came."""

    run: Run
    log: RunLog
    begun: dict[str, float]


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


def write_folders(run: Run) -> Path:
    """Draw, caption and write the images into kohya's folders; the same inputs share one place."""
    images = dataset.select(run.dataset)
    texts = {
        arm: folders.ArmCaptions(
            repeats=captioner.repeats,
            captions=tuple(
                captions.caption_images(captioner, images.images, run.cache_dir, arm=arm)
            ),
            captioner=captioner.identity(),
        )
        for arm, captioner in run.captions.items()
    }
    inputs = repr((images.digest, texts, run.dataset.caption_extension)).encode()
    name = f"{run.dataset.image_dir.resolve().name}-{hashlib.sha256(inputs).hexdigest()[:8]}"
    root = run.output_root / "datasets" / name
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f".{name}.lock")):
        return folders.write(images, texts, root, run.dataset.caption_extension)


def captions_used(run: Run, data: Path) -> str:
    """The folders' captions as they are now, edited ones too, as JSON: split, folder, file."""
    found = {
        split: {
            f"{arm.repeats}_{arm.name}": {item.path.name: item.caption for item in arm.items}
            for arm in folders.read(data / split, run.dataset.caption_extension)
        }
        for split in ("train", "holdout")
        if (data / split).is_dir()
    }
    return json.dumps(found, indent=1, ensure_ascii=False)


def _new_run(run: Run, data: Path, texts: str) -> NewRun:
    manifest = data / "manifest.json"
    used = run.output_dir / "captions.json"
    used.parent.mkdir(parents=True, exist_ok=True)
    used.write_text(texts)
    return NewRun(
        name=run.name,
        sweep=run.sweep,
        params=run.params,
        config_yaml=run.config_yaml,
        overrides=run.overrides,
        manifest=manifest,
        image_dir=run.dataset.image_dir,
        dataset_digest=hashlib.sha256(manifest.read_bytes() + texts.encode()).hexdigest(),
        tags={
            "lorasweep.output_dir": str(run.output_dir),
            "lorasweep.folders": str(data),
            **({} if run.number is None else {TRIAL_TAG: str(run.number)}),
            **run.tags,
        },
    )


def training_run(run: Run) -> TrainingRun:
    return TrainingRun(
        name=run.name,
        seed=run.seed,
        output_dir=run.output_dir,
        max_train_epochs=run.trainer.max_train_epochs,
        noise_offset=run.trainer.noise_offset,
        min_snr_gamma=run.trainer.min_snr_gamma,
        adapter=run.adapter,
        optimizer=run.optimizer,
        lr_scheduler=run.lr_scheduler,
    )


def _images(base: BaseModel, run: Run, data: Path) -> Images:
    def split(name: str) -> list[latents.Item]:
        folder = data / name
        arms = folders.read(folder, run.dataset.caption_extension) if folder.is_dir() else []
        return latents.encode(base, arms, run.dataset, run.cache_dir)

    return Images(train=split("train"), holdout=split("holdout"))
