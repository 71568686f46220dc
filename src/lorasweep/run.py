"""The main job: from images to scored, logged checkpoints, for the runs of one pack."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from lorasweep import captions, dataset, folders, latents, lora_file, report, sampling
from lorasweep.adapters.pack import Pack
from lorasweep.checkpoint import Checkpoint
from lorasweep.config import Run
from lorasweep.metrics import Images, Scored, Scores, Terms
from lorasweep.models import BaseModel, is_out_of_memory, resolve_device
from lorasweep.tracking import NewRun, RunLog, Tracker
from lorasweep.trainers import Epoch, Training, TrainingData, TrainingRun

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

Samples = Mapping[str, "Image.Image"]
"""Pictures by the key that MLflow shows them under."""


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


class RunError(RuntimeError):
    """A run of a sweep failed; the message is its reason."""


@dataclass
class Clock:
    """Seconds of wall time by what they were spent on."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - begun


def run_pack(runs: Sequence[Run]) -> Iterator[EpochReport | Failure]:
    """Train runs together, yielding a report of every checkpoint once it is scored and logged.

    Raises ValueError for what the user must mend (images, captions, model, resolution), before any
    training; a run that fails alone is a Failure, the others go on.
    """
    first, clock = runs[0], Clock()
    with clock("prepare"):
        device = resolve_device(first.trainer.device)
        data = write_folders(first)
    with Tracker(first.tracking, first.output_root) as tracker:
        texts = captions_used(first, data)
        logs = {run.name: tracker.open_run(_new_run(run, data, texts)) for run in runs}
        with clock("prepare"):
            base = first.model.load(device, first.trainer.precision)
            tracker.ready()  # a store that can't be written ends here, before any training
            images = _images(base, first, data)
            judge = _Judge(base, runs, images, clock)
            training = first.trainer.start(
                base,
                [training_run(run) for run in runs],
                TrainingData(images.train, first.dataset),
            )
        scores, samples = judge.base_model()
        for run in runs:
            logs[run.name].log_base(scores, samples)
        for epoch in _timed(training, clock):
            for name, steps in epoch.steps.items():
                for step, values in steps:
                    logs[name].log_step(step, values)
            for name, reason in epoch.failures.items():
                logs[name].finish("FAILED", reason)
                yield Failure(run=name, reason=reason)
            yield from _judged(judge, epoch.checkpoints, logs)
        for run in runs:
            _finish(run, logs[run.name], judge.contact_sheet(run), clock)


def _timed(training: Training, clock: Clock) -> Iterator[Epoch]:
    epochs = iter(training)
    while True:
        with clock("train"):
            epoch = next(epochs, None)
        if epoch is None:
            return
        yield epoch


def _judged(
    judge: _Judge, checkpoints: Sequence[Checkpoint], logs: Mapping[str, RunLog]
) -> Iterator[EpochReport]:
    """Score and draw the checkpoints of an epoch, all at once, and log them."""
    if not checkpoints:
        return
    judged = judge.checkpoints(checkpoints)
    for one, (scored, samples) in zip(checkpoints, judged, strict=True):
        logs[one.run].log_epoch(one, scored.scores, samples, scored.terms)
    shown = ", ".join(
        f"{one.run} {scored.scores.get('val/loss_rel', math.nan):.3f}"
        for one, (scored, _) in zip(checkpoints, judged, strict=True)
    )
    log.info("epoch %d, val/loss_rel: %s", checkpoints[0].epoch, shown)
    for one, (scored, _) in zip(checkpoints, judged, strict=True):
        yield EpochReport(run=one.run, checkpoint=one, scores=scored.scores, terms=scored.terms)


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


def load_pack(base: BaseModel, files: Sequence[Path]) -> Pack:
    """Written LoRA files, ready to be attached to the base. Raises ValueError for a bad one."""
    return Pack.from_files(base.parts, [lora_file.read(path).tensors for path in files])


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
        tags={"lorasweep.output_dir": str(run.output_dir), "lorasweep.folders": str(data)},
    )


def _images(base: BaseModel, run: Run, data: Path) -> Images:
    def split(name: str) -> list[latents.Item]:
        folder = data / name
        arms = folders.read(folder, run.dataset.caption_extension) if folder.is_dir() else []
        return latents.encode(base, arms, run.dataset, run.cache_dir)

    return Images(train=split("train"), holdout=split("holdout"))


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


class _Judge:
    """Scores and draws checkpoints from their files, on the clean base."""

    def __init__(self, base: BaseModel, runs: Sequence[Run], images: Images, clock: Clock) -> None:
        first = runs[0]
        self.base, self.clock, self.sampling = base, clock, first.sampling
        self.runs = {run.name: run for run in runs}
        prepared = (metric.prepare(base, images) for metric in first.metrics.values())
        self.scorers = [scorer for scorer in prepared if scorer is not None]
        self.prompts = self.sampling.resolve(first.dataset.size, base.vae_scale_factor)

    def base_model(self) -> tuple[Scores, Samples]:
        """The bare base's own scores and pictures: epoch 0 of every run."""
        scores = {name: value for s in self.scorers for name, value in s.baseline().items()}
        if self.sampling.every_n_epochs == 0:
            return scores, {}
        with self.clock("sample"):
            (images,) = sampling.render(self.base, None, self.prompts, self.sampling)
        for run in self.runs.values():
            self._save(run, 0, images)
        return scores, self._named(images)

    def checkpoints(self, checkpoints: Sequence[Checkpoint]) -> list[tuple[Scored, Samples]]:
        """Scores and pictures of each checkpoint; out of memory, of one half after the other."""
        try:
            return self._judge(checkpoints)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(checkpoints) == 1:
                raise
        middle = len(checkpoints) // 2
        log.warning("out of memory with %d checkpoints: fewer are scored at once", len(checkpoints))
        return self.checkpoints(checkpoints[:middle]) + self.checkpoints(checkpoints[middle:])

    def _judge(self, checkpoints: Sequence[Checkpoint]) -> list[tuple[Scored, Samples]]:
        with self.clock("score"):
            pack = load_pack(self.base, [one.path for one in checkpoints])
            by_scorer = [scorer.score(pack) for scorer in self.scorers]
        merged = [_merged([of_all[n] for of_all in by_scorer]) for n in range(len(checkpoints))]
        return list(zip(merged, self._draw(pack, checkpoints), strict=True))

    def _draw(self, pack: Pack, checkpoints: Sequence[Checkpoint]) -> list[Samples]:
        due = [self.sampling.due(one.epoch) for one in checkpoints]
        if not any(due):
            return [{} for _ in checkpoints]
        with self.clock("sample"):
            drawn = sampling.render(self.base, pack, self.prompts, self.sampling)
        for one, images, is_due in zip(checkpoints, drawn, due, strict=True):
            if is_due:
                self._save(self.runs[one.run], one.epoch, images)
        return [
            self._named(images) if is_due else {} for images, is_due in zip(drawn, due, strict=True)
        ]

    def contact_sheet(self, run: Run) -> Path | None:
        """The run's pictures in one: epochs down, prompts across, the bare base first."""
        from PIL import Image

        epochs = sorted({int(path.stem.split("_")[-2][1:]) for path in _sample_dir(run).glob("*")})
        if not epochs:
            return None
        rows = [
            (
                "base" if epoch == 0 else f"epoch {epoch}",
                [Image.open(_sample_path(run, epoch, n)) for n in range(len(self.prompts))],
            )
            for epoch in report.thinned(epochs)
        ]
        path = run.output_dir / "contact_sheet.png"
        report.contact_sheet(rows, [prompt.text for prompt in self.prompts]).save(path)
        return path

    def _named(self, images: Sequence[Image.Image]) -> Samples:
        keys = [f"{number:02d} {prompt.text}" for number, prompt in enumerate(self.prompts)]
        return dict(zip(keys, images, strict=True))

    def _save(self, run: Run, epoch: int, images: Sequence[Image.Image]) -> None:
        _sample_dir(run).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            image.save(_sample_path(run, epoch, number))


def _merged(parts: Sequence[Scored]) -> Scored:
    """What all metrics say of one checkpoint."""
    return Scored(
        scores={name: value for part in parts for name, value in part.scores.items()},
        terms={name: values for part in parts for name, values in part.terms.items()},
    )


def _sample_dir(run: Run) -> Path:
    return run.output_dir / "samples"


def _sample_path(run: Run, epoch: int, number: int) -> Path:
    """kohya's naming: NAME_e000001_00.png."""
    return _sample_dir(run) / f"{run.name}_e{epoch:06d}_{number:02d}.png"


def _finish(run: Run, run_log: RunLog, sheet: Path | None, clock: Clock) -> None:
    if sheet is not None:
        run_log.log_file(sheet)
        log.info("%s: contact sheet %s", run.name, sheet)
    run_log.log_file(run.output_dir / "captions.json")
    timing = run.output_dir / "seconds.json"
    timing.write_text(json.dumps(clock.seconds, indent=1))
    run_log.log_file(timing)
    run_log.finish("FINISHED")
