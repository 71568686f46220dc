"""The truth experiment on a sweep of your own: any base model, a folder of unseen images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.choice_scores import PictureFeatures, Recorder, load, train_loss
from benchmarks.choice_styles import Drawing, Picture, Style
from lorasweep.judging.metrics.prior_drift import PriorDrift
from lorasweep.judging.sampling import render
from lorasweep.models.devices import resolve_device
from lorasweep.runs.session import load_base

if TYPE_CHECKING:
    from lorasweep.config.run import Run
    from lorasweep.models.base_model import BaseModel

MAX_PACK = 8
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class LocalFeatures:
    """Pictures in the space of a CLIP or DINO of transformers, in a folder on this machine."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.net: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval().to(device)
        self.processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self.device = device

    @torch.no_grad()
    def of(self, pictures: Sequence[Picture]) -> Tensor:
        """(N, D) of unit length: CLIP's image features, else the first token, DINO's class."""
        images = [Image.fromarray(one) for one in pictures]
        given = self.processor(images=images, return_tensors="pt").to(self.device)
        if hasattr(self.net, "vision_model"):
            pooled = self.net.vision_model(**given).pooler_output
            found = self.net.visual_projection(pooled)
        else:
            found = self.net(**given).last_hidden_state[:, 0]
        return nn.functional.normalize(found.cpu().float(), dim=1)


def measure(run: Run, sweep: Path, unseen: Path, features: PictureFeatures, arm: str) -> Any:
    """What `replay` reads of the checkpoints in a sweep's folder.

    `run` has the settings that all runs of the sweep share. The truth is how like each drawing of
    an unseen image's caption is to that image; of unrelated prompts, to what the base draws.
    """
    base = load_base(run, resolve_device(run.trainer.device))
    recorder = Recorder(run, _style(run, base, unseen), features, base, run.sampling, arm)
    by_epoch = defaultdict(list)
    for file in sorted(sweep.glob("*/*-[0-9]*.safetensors")):
        by_epoch[int(file.stem.rpartition("-")[2])].append(file)
    checkpoints = []
    for epoch, files in sorted(by_epoch.items()):
        for start in range(0, len(files), MAX_PACK):
            some = files[start : start + MAX_PACK]
            for file, values in zip(some, recorder.measure(load(some, base)), strict=True):
                place = {"run": int(file.parent.name), "epoch": epoch}
                checkpoints.append({**place, "train": train_loss(file.parent, epoch), **values})
    return {"base": recorder.measure(None)[0], "checkpoints": checkpoints}


def _style(run: Run, base: BaseModel, unseen: Path) -> Style:
    """Drawings of the captions beside the images: NAME.txt for NAME.png."""
    files = [one for one in sorted(unseen.iterdir()) if one.suffix.lower() in SUFFIXES]
    drawings = [Drawing(_caption(one), one.stem, [_picture(one)]) for one in files]
    drift = run.metrics["prior_drift"]
    assert isinstance(drift, PriorDrift)
    lines = tuple(f"{prompt} --d {n}" for n, prompt in enumerate(drift.prompts))  # same noise
    sampling = replace(run.sampling, prompts=lines)
    prompts = sampling.resolve(run.dataset.size, base.vae_scale_factor)
    (drawn,) = render(base, None, prompts, sampling)
    own = [np.asarray(one.convert("RGB")) for one in drawn]
    unrelated = [Drawing(line, line, [one]) for line, one in zip(lines, own, strict=True)]
    galleries = ([(one.label, one.true[0]) for one in some] for some in (drawings, unrelated))
    return Style(unseen, drawings, next(galleries), unrelated, next(galleries))


def _caption(file: Path) -> str:
    return file.with_suffix(".txt").read_text(encoding="utf-8").strip()


def _picture(file: Path) -> Picture:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))
