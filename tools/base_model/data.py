"""Pictures from renderings: composited on colours for the UNet, augmented for the VAE."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tools.base_model import icons

Pictures = NDArray[np.float32]  # (B, 3, S, S), -1 to 1

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (220, 40, 40),
    "orange": (255, 150, 30),
    "yellow": (250, 220, 60),
    "green": (40, 150, 70),
    "blue": (40, 100, 220),
    "purple": (120, 60, 180),
    "pink": (255, 150, 190),
    "brown": (130, 80, 40),
    "cyan": (80, 210, 220),
}

LINE_ART_SHARE = 0.25  # of the VAE's pictures: greys, thresholds and edges of the coloured sets
CONCEPT_SHARE = 0.4  # of the VAE's pictures: the concepts that the UNet will draw


def composite(rgba: NDArray[np.uint8], colours: NDArray[np.float32]) -> Pictures:
    """Lay (B, S, S, 4) renderings over one (B, 3) colour each, 0-255."""
    rgb = rgba[..., :3].astype(np.float32)
    alpha = rgba[..., 3:].astype(np.float32) / 255
    picture = rgb * alpha + colours[:, None, None, :] * (1 - alpha)
    return np.ascontiguousarray((picture / 127.5 - 1).transpose(0, 3, 1, 2))


def on_colour(rgba: NDArray[np.uint8], colour: str) -> Pictures:
    """Lay renderings over a colour of COLOURS."""
    rows = np.tile(np.array(COLOURS[colour], np.float32), (len(rgba), 1))
    return composite(rgba, rows)


class VaePictures:
    """What the VAE learns from: every coloured set, on any background, and line art made of it."""

    def __init__(self, folder: Path, size: int) -> None:
        sets = [icons.load(folder, name, size) for name in icons.STYLES.values()]
        wanted = set(icons.concepts())
        self.rgba = np.concatenate([s.rgba for s in sets])
        labels = [label for s in sets for label in s.labels]
        self.concepts = np.array([i for i, label in enumerate(labels) if label in wanted])

    def batch(self, rng: np.random.Generator, size: int) -> Pictures:
        """Draw (size, 3, S, S) pictures."""
        anything = rng.integers(len(self.rgba), size=size)
        concept = rng.choice(self.concepts, size=size)
        chosen = self.rgba[np.where(rng.random(size) < CONCEPT_SHARE, concept, anything)]
        picture = composite(chosen, backgrounds(rng, size))
        for i in range(size):
            if rng.random() < LINE_ART_SHARE:
                picture[i] = line_art(rng, picture[i])
            if rng.random() < 0.5:
                picture[i] = picture[i, :, :, ::-1]
            if rng.random() < 0.5:
                picture[i] = shifted(rng, picture[i])
        return picture


def backgrounds(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """(size, 3) colours: a third white, a third of COLOURS, a third anything."""
    named = np.array(list(COLOURS.values()), np.float32)[rng.integers(len(COLOURS), size=size)]
    free = rng.uniform(0, 255, (size, 3)).astype(np.float32)
    kind = rng.integers(3, size=(size, 1))
    white = np.full_like(free, 255)
    return np.where(kind == 0, white, np.where(kind == 1, named, free))


def line_art(rng: np.random.Generator, picture: Pictures) -> Pictures:
    """One (3, S, S) picture as grey, as a soft threshold or as its edges, sometimes inverted."""
    grey = picture.mean(axis=0)
    kind = rng.integers(3)
    if kind == 1:
        grey = np.clip((grey - rng.uniform(-0.5, 0.7)) * rng.uniform(4, 12), -1, 1)
    elif kind == 2:
        dy, dx = np.gradient(grey)
        grey = np.clip(1 - np.hypot(dx, dy) * rng.uniform(4, 12), -1, 1)
    if rng.random() < 0.3:
        grey = -grey
    return np.broadcast_to(grey, picture.shape).astype(np.float32)


def shifted(rng: np.random.Generator, picture: Pictures) -> Pictures:
    """One picture moved by up to an eighth of its size, its border repeated."""
    size = picture.shape[-1]
    pad = size // 8
    wide = np.pad(picture, ((0, 0), (pad, pad), (pad, pad)), mode="edge")
    y, x = rng.integers(2 * pad + 1, size=2)
    return wide[:, y : y + size, x : x + size]


def psnr(pictures: Pictures, reference: Pictures) -> float:
    """Peak signal-to-noise ratio in dB of pictures in -1 to 1."""
    error = float(np.mean((np.clip(pictures, -1, 1) - reference) ** 2))
    return float(10 * np.log10(4 / error))


def style_pictures(folder: Path, size: int, names: Sequence[str]) -> NDArray[np.uint8]:
    """The RGBA renderings of the concepts in the named sets, for checks."""
    sets = [icons.load(folder, name, size) for name in names]
    wanted = set(icons.concepts())
    keep = [s.rgba[[i for i, label in enumerate(s.labels) if label in wanted]] for s in sets]
    return np.concatenate(keep)
