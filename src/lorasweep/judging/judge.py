"""Scores and pictures of checkpoints, made from their files on the clean base."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.adapters.pack import Pack
from lorasweep.config.config import Run
from lorasweep.core.atomic_write import write_atomically
from lorasweep.judging import contact_sheet, sampling
from lorasweep.judging.metrics.metric import Images, Scored, Scores
from lorasweep.lora_files import lora_file
from lorasweep.lora_files.checkpoint import Checkpoint
from lorasweep.models.base_model import BaseModel, is_out_of_memory

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

Pictures = Mapping[str, Path]
"""PNG files by the key that MLflow shows them under."""


class Judge:
    """Scores and draws checkpoints from their files, on the clean base."""

    def __init__(self, base: BaseModel, first: Run, images: Images, clock: Clock) -> None:
        self.base, self.clock, self.sampling = base, clock, first.sampling
        self._drawn_by_base: list[Image.Image] | None = None
        prepared = (metric.prepare(base, images) for metric in first.metrics.values())
        self.scorers = [scorer for scorer in prepared if scorer is not None]
        self.prompts = self.sampling.resolve(first.dataset.size, base.vae_scale_factor)

    def base_model(self, run: Run) -> tuple[Scores, Pictures]:
        """The bare base's own scores and pictures: epoch 0 of `run`."""
        scores = {name: value for s in self.scorers for name, value in s.baseline().items()}
        if self.sampling.every_n_epochs == 0:
            return scores, {}
        if self._drawn_by_base is None:
            with self.clock("sample"):
                (images,) = sampling.render(self.base, None, self.prompts, self.sampling)
            self._drawn_by_base = list(images)
        return scores, self._save(run, 0, self._drawn_by_base)

    def checkpoints(
        self, checkpoints: Sequence[Checkpoint], runs: Mapping[str, Run]
    ) -> list[tuple[Scored, Pictures]]:
        """Scores and pictures of each checkpoint; out of memory, of one half after the other."""
        try:
            return self._judge(checkpoints, runs)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(checkpoints) == 1:
                raise
        middle = len(checkpoints) // 2
        log.warning("out of memory with %d checkpoints: fewer are scored at once", len(checkpoints))
        halves = (checkpoints[:middle], checkpoints[middle:])
        return [judged for half in halves for judged in self.checkpoints(half, runs)]

    def _judge(
        self, checkpoints: Sequence[Checkpoint], runs: Mapping[str, Run]
    ) -> list[tuple[Scored, Pictures]]:
        with self.clock("score"):
            pack = load_pack(self.base, [one.path for one in checkpoints])
            by_scorer = [scorer.score(pack) for scorer in self.scorers]
        merged = [_merged([of_all[n] for of_all in by_scorer]) for n in range(len(checkpoints))]
        return list(zip(merged, self._draw(pack, checkpoints, runs), strict=True))

    def _draw(
        self, pack: Pack, checkpoints: Sequence[Checkpoint], runs: Mapping[str, Run]
    ) -> list[Pictures]:
        due = [self.sampling.due(one.epoch) for one in checkpoints]
        if not any(due):
            return [{} for _ in checkpoints]
        with self.clock("sample"):
            drawn = sampling.render(self.base, pack, self.prompts, self.sampling)
        return [
            self._save(runs[one.run], one.epoch, images) if is_due else {}
            for one, images, is_due in zip(checkpoints, drawn, due, strict=True)
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
            for epoch in contact_sheet.thinned(epochs)
        ]
        path = run.output_dir / "contact_sheet.png"
        contact_sheet.contact_sheet(rows, [prompt.text for prompt in self.prompts]).save(path)
        return path

    def _save(self, run: Run, epoch: int, images: Sequence[Image.Image]) -> Pictures:
        """Write an epoch's pictures, each whole; a log that names them can rely on them."""
        pictures = {}
        for number, (prompt, image) in enumerate(zip(self.prompts, images, strict=True)):
            content, path = BytesIO(), _sample_path(run, epoch, number)
            image.save(content, "PNG")
            write_atomically(path, content.getvalue())
            pictures[f"{number:02d} {prompt.text}"] = path
        return pictures


def load_pack(base: BaseModel, files: Sequence[Path]) -> Pack:
    """Written LoRA files, ready to be attached to the base. Raises ValueError for a bad one."""
    return Pack.from_files(base.parts, [lora_file.read(path).tensors for path in files])


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

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """Seconds since the clock showed `before`."""
        return {what: spent - before.get(what, 0.0) for what, spent in self.seconds.items()}


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
