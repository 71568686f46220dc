"""Scores and pictures of checkpoints, made from their files on the clean base."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.adapters.pack import Pack
from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.clock import Clock
from lorasweep.core.text import shown
from lorasweep.judging import contact_sheet
from lorasweep.judging.metrics.metric import Images, Metric, Scored, Scores
from lorasweep.judging.sampling import Sampling, render
from lorasweep.lora_files import read_lora_file
from lorasweep.lora_files.checkpoint import Checkpoint
from lorasweep.models.base_model import BaseModel
from lorasweep.models.gpu_memory import halved

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

Pictures = Mapping[str, Path]
"""PNG files by the key that MLflow shows them under."""


class Judge:
    """Scores and draws checkpoints from their files, on the clean base."""

    def __init__(
        self,
        base: BaseModel,
        images: Images,
        metrics: Iterable[Metric],
        sampling: Sampling,
        size: tuple[int, int],
        clock: Clock,
    ) -> None:
        """`size` is the training's width and height in pixels, that of prompts which give none."""
        self.base, self.sampling, self.clock = base, sampling, clock
        self.prompts = sampling.resolve(size, base.vae_scale_factor)
        if sampling.every_n_epochs > 0:  # a comma in an override may have made two of one
            lines = " | ".join(shown(line) for line in sampling.prompts)
            log.info("pictures of %d prompts: %s", len(self.prompts), lines)
            base.noise_schedule.sampler(sampling.scheduler)  # it is refused now or never
        texts = [text for one in self.prompts for text in (one.text, one.negative)]
        if cut := base.too_long(texts):
            log.warning(
                "sampling.prompts: %s is longer than the %d tokens that the text encoder reads;"
                " what comes after them is not drawn",
                *(shown(cut[0], 60), base.max_tokens),
            )
        prepared = (metric.prepare(base, images) for metric in metrics)
        self.scorers = [scorer for scorer in prepared if scorer is not None]
        self._drawn_by_base: list[Image.Image] | None = None

    def base_model(self, output_dir: Path, run: str) -> tuple[Scores, Pictures]:
        """The bare base's own scores and pictures: epoch 0 of a run."""
        scores = {name: value for s in self.scorers for name, value in s.baseline().items()}
        if self.sampling.every_n_epochs == 0:
            return scores, {}
        if self._drawn_by_base is None:
            with self.clock("sample"):
                (self._drawn_by_base,) = render(self.base, None, self.prompts, self.sampling)
        return scores, self._saved(output_dir, run, 0, self._drawn_by_base)

    def checkpoints(self, checkpoints: Sequence[Checkpoint]) -> list[tuple[Scored, Pictures]]:
        """Scores and pictures of each checkpoint; out of memory, of one half after the other."""
        try:
            return self._at_once(checkpoints)
        except RuntimeError as error:
            halves = halved(checkpoints, error)
        log.warning("out of memory with %d checkpoints: fewer are scored at once", len(checkpoints))
        return [judged for half in halves for judged in self.checkpoints(half)]

    def contact_sheet(self, output_dir: Path, run: str) -> Path | None:
        """A run's pictures in one: epochs down, prompts across, the bare base first."""
        from PIL import Image

        found = (output_dir / "samples").glob("*")
        epochs = sorted({int(path.stem.split("_")[-2][1:]) for path in found})
        if not epochs:
            return None
        rows = [
            (
                "base" if epoch == 0 else f"epoch {epoch}",
                [
                    Image.open(_sample_path(output_dir, run, epoch, number))
                    for number in range(len(self.prompts))
                ],
            )
            for epoch in contact_sheet.thinned(epochs)
        ]
        sheet = contact_sheet.contact_sheet(rows, [prompt.text for prompt in self.prompts])
        path = output_dir / contact_sheet.FILE_NAME
        write_atomically(path, _png(sheet))  # the old one may be a link to another sweep's
        return path

    def _at_once(self, checkpoints: Sequence[Checkpoint]) -> list[tuple[Scored, Pictures]]:
        with self.clock("score"):
            pack = load_pack(self.base, [one.path for one in checkpoints])
            by_scorer = [scorer.score(pack) for scorer in self.scorers]
        merged = [_merged([of_all[n] for of_all in by_scorer]) for n in range(len(checkpoints))]
        return list(zip(merged, self._draw(pack, checkpoints), strict=True))

    def _draw(self, pack: Pack, checkpoints: Sequence[Checkpoint]) -> list[Pictures]:
        due = [self.sampling.due(one.epoch) for one in checkpoints]
        if not any(due):
            return [{} for _ in checkpoints]
        with self.clock("sample"):
            drawn = render(self.base, pack, self.prompts, self.sampling)
        return [
            self._saved(one.path.parent, one.run, one.epoch, images) if is_due else {}
            for one, images, is_due in zip(checkpoints, drawn, due, strict=True)
        ]

    def _saved(
        self, output_dir: Path, run: str, epoch: int, images: Sequence[Image.Image]
    ) -> Pictures:
        """Write an epoch's pictures, each whole; a log that names them can rely on them."""
        pictures = {}
        for number, (prompt, image) in enumerate(zip(self.prompts, images, strict=True)):
            path = _sample_path(output_dir, run, epoch, number)
            write_atomically(path, _png(image))
            pictures[f"{number:02d} {prompt.text}"] = path
        return pictures


def _png(image: Image.Image) -> bytes:
    content = BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def load_pack(base: BaseModel, files: Sequence[Path]) -> Pack:
    """Written LoRA files, ready to be attached to the base. Raises ValueError for a bad one."""
    base.wake_text_encoders()
    return Pack.from_files(base.parts, [read_lora_file.read(path, base).tensors for path in files])


def _merged(parts: Sequence[Scored]) -> Scored:
    """What all metrics say of one checkpoint."""
    return Scored(
        scores={name: value for part in parts for name, value in part.scores.items()},
        terms={name: values for part in parts for name, values in part.terms.items()},
    )


def _sample_path(output_dir: Path, run: str, epoch: int, number: int) -> Path:
    """kohya's naming: NAME_e000001_00.png."""
    return output_dir / "samples" / f"{run}_e{epoch:06d}_{number:02d}.png"
