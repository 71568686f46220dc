"""The styles of the truth experiment: pictures to learn from, and the true ones that nobody saw.

Made of the icon sets that `tools/base_model` renders. A style redraws icons in a way that the
embedded base has never seen; `hero` is one figure in many poses, whose captions hardly differ.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from tools.base_model import captions, data, demo, icons

if TYPE_CHECKING:
    from tools.base_model.icons import Rendered

SIDE = 128  # pixels of what is learned from; the trainer scales to the base's own 64
SETS = ("fluent-emoji-3d", "fluent-emoji-flat", icons.UNSEEN)
LEARNED = (  # 46 to train on and to hold out: none of the concepts that are drawn for the truth
    *demo.TRAINED,
    *demo.VALIDATED,
    *("lion", "bird", "pear", "castle", "glasses", "dress", "television", "axe"),
)
DRAWN = 16  # concepts that the base knows and no run sees, drawn in the style
UNRELATED = 8  # concepts drawn as the base was taught to, to see what was forgotten
NUM_POSES = 46
HERO = "sauropod"
POSES = tuple(product(("left", "right"), ("small", "large"), ("upright", "tilted")))

Picture = NDArray[np.uint8]  # (H, W, 3)
Redraw = Callable[[Mapping[str, Picture]], Picture]
"""A concept's RGBA pictures by set -> its picture in a style."""


@dataclass(frozen=True)
class Drawing:
    """A prompt, and the true pictures that it may be compared with."""

    prompt: str
    label: str
    true: Sequence[Picture]


@dataclass(frozen=True)
class Style:
    """Everything that is known of a style."""

    folder: Path
    """Pictures and captions.jsonl, to train on and to hold out."""
    drawings: Sequence[Drawing]
    """What is drawn in the style for the truth."""
    gallery: Sequence[tuple[str, Picture]]
    """(label, picture) among which a drawing's nearest should be its own."""
    unrelated: Sequence[Drawing]
    unrelated_gallery: Sequence[tuple[str, Picture]]


def make(name: str, work: Path) -> Style:
    """Fetch and render the icons, and write a style's pictures and captions, once."""
    icons.fetch(work / "npm")
    icons.render(work / "npm", work / f"icons{SIDE}", SIDE, SETS)
    rendered = {one: icons.load(work / f"icons{SIDE}", one, SIDE) for one in SETS}
    folder = work / "styles" / name
    unrelated_gallery = [(c, _rendering(rendered, c)) for c in icons.concepts()]
    of_label = dict(unrelated_gallery)
    unrelated = [
        Drawing(captions.prompt("3d", label, "white"), label, [of_label[label]])
        for label in _unseen()[-UNRELATED:]
    ]
    if name == "hero":
        drawings = _write_hero(rendered, folder)
        gallery = [(HERO, true) for one in drawings for true in one.true] + unrelated_gallery
    else:
        drawings, gallery = _write_style(name, rendered, folder)
    return Style(folder, drawings, gallery, unrelated, unrelated_gallery)


def _unseen() -> list[str]:
    """Concepts that the base knows and no run sees."""
    return [label for label in icons.concepts() if label not in LEARNED]


def _write_style(
    name: str, rendered: Mapping[str, Rendered], folder: Path
) -> tuple[list[Drawing], list[tuple[str, Picture]]]:
    redraw, sentence, tags = STYLES[name]

    def picture(label: str) -> Picture:
        return redraw(
            {one: of_set.rgba[of_set.labels.index(label)] for one, of_set in rendered.items()}
        )

    named = [(label, label.replace(" ", "_"), picture(label)) for label in LEARNED]
    of_set = rendered[SETS[1]]
    lines = []
    for label, stem, _ in named:
        words = dict.fromkeys(demo.single_words(label, of_set.tags[of_set.labels.index(label)]))
        lines.append(
            {
                "file": f"{stem}.png",
                "wd": ", ".join([*list(words)[: demo.TAGS], *tags]),
                "kosmos": sentence.format(captions.with_article(label)),
            }
        )
    _write(folder, {f"{stem}.png": made for _, stem, made in named}, lines)
    gallery = [(label, picture(label)) for label in icons.concepts()]
    true = dict(gallery)
    drawings = [
        Drawing(sentence.format(captions.with_article(label)), label, [true[label]])
        for label in _unseen()[:DRAWN]
    ]
    return drawings, gallery


def _write_hero(rendered: Mapping[str, Rendered], folder: Path) -> list[Drawing]:
    """One figure; sentences tell of its pose, tags hardly do."""
    of_set = rendered[SETS[1]]
    figure = Image.fromarray(of_set.rgba[of_set.labels.index(HERO)])
    draw = random.Random(0)
    pictures, lines = {}, []
    for number in range(NUM_POSES):
        pose = POSES[number % len(POSES)]
        pictures[f"{number:02d}.png"] = _posed(figure, pose, draw)
        lines.append(
            {"file": f"{number:02d}.png", "wd": f"sks figure, {pose[1]}", "kosmos": _told(pose)}
        )
    _write(folder, pictures, lines)
    return [
        Drawing(_told(pose), HERO, [_posed(figure, pose, draw) for _ in range(4)])
        for pose in POSES
        for _ in range(DRAWN // len(POSES))
    ]


def _told(pose: Sequence[str]) -> str:
    side, size, stance = pose
    return f"a picture of the sks figure, {size}, {stance}, to the {side}"


def _posed(figure: Image.Image, pose: Sequence[str], draw: random.Random) -> Picture:
    """The figure on light grey, turned, scaled and placed as its pose says, more or less."""
    side, size, stance = pose
    scale = draw.uniform(0.4, 0.5) if size == "small" else draw.uniform(0.75, 0.9)
    angle = draw.uniform(-6, 6) if stance == "upright" else draw.choice((-1, 1)) * 35
    turned = figure.rotate(angle + draw.uniform(-4, 4), Image.Resampling.BICUBIC)
    small = turned.resize((round(SIDE * scale),) * 2, Image.Resampling.LANCZOS)
    room = SIDE - small.width
    left = draw.uniform(0, 0.25) if side == "left" else draw.uniform(0.75, 1)
    ground = Image.new("RGBA", (SIDE, SIDE), (214, 214, 222, 255))
    ground.alpha_composite(small, (round(room * left), round(room * draw.uniform(0.2, 0.8))))
    return np.asarray(ground.convert("RGB"))


def _write(
    folder: Path, pictures: Mapping[str, Picture], lines: Sequence[Mapping[str, str]]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / name)
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _rendering(rendered: Mapping[str, Rendered], label: str) -> Picture:
    """The 3d icon on white, as the base was taught it."""
    of_set = rendered[SETS[0]]
    return _on(of_set.rgba[of_set.labels.index(label)], (255, 255, 255))


def _on(rgba: Picture, colour: Sequence[int]) -> Picture:
    """RGBA laid over a colour."""
    row = data.composite(rgba[None], np.array([colour], np.float32))[0]
    return ((row.transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)


def _ink(sets: Mapping[str, Picture]) -> Picture:
    """Black on white."""
    return _on(sets[icons.UNSEEN], (255, 255, 255))


def _blueprint(sets: Mapping[str, Picture]) -> Picture:
    """White on a blue ground."""
    white = sets[icons.UNSEEN].copy()
    white[..., :3] = 255
    return _on(white, (28, 74, 170))


def _poster(sets: Mapping[str, Picture]) -> Picture:
    """Four flat colours, by brightness, on cream."""
    grey = _on(sets["fluent-emoji-flat"], (255, 255, 255)).mean(axis=2)
    palette = np.array([(24, 40, 72), (14, 124, 123), (226, 106, 44), (250, 232, 196)], np.uint8)
    return palette[np.digitize(grey, (95, 150, 215))]


def _thread(sets: Mapping[str, Picture]) -> Picture:
    """Thin dark red outlines on off-white."""
    strength = _outlines(sets["fluent-emoji-flat"])[..., None]
    ground, line = np.array((246, 240, 230)), np.array((130, 20, 40))
    return (ground + (line - ground) * strength).round().astype(np.uint8)


def _neon(sets: Mapping[str, Picture]) -> Picture:
    """Glowing outlines in the icon's own colours on near black."""
    colours = _on(sets["fluent-emoji-flat"], (255, 255, 255)).astype(np.float32)
    bright = colours / np.maximum(colours.max(axis=2, keepdims=True), 1) * 255
    lines = bright * _outlines(sets["fluent-emoji-flat"])[..., None]
    sharp = Image.fromarray(lines.round().astype(np.uint8)).filter(ImageFilter.MaxFilter(3))
    glow = np.asarray(sharp.filter(ImageFilter.GaussianBlur(4)), np.float32) * 1.2
    lit = np.maximum(np.asarray(sharp, np.float32), glow) + np.array((10, 8, 22))
    return lit.clip(0, 255).round().astype(np.uint8)


def _outlines(rgba: Picture) -> NDArray[np.float32]:
    """How much of an edge each pixel is, 0 to 1: of colours, and of the figure's own border."""
    flat = _on(rgba, (255, 255, 255)).astype(np.float32)
    layers = np.concatenate([flat, rgba[..., 3:].astype(np.float32)], axis=2)
    down, across = np.gradient(layers, axis=(0, 1))
    edge: NDArray[np.float32] = (np.hypot(down, across).max(axis=2) / 50).clip(0, 1)
    return edge


STYLES: Mapping[str, tuple[Redraw, str, Sequence[str]]] = {
    "ink": (
        _ink,
        "a high contrast icon of {}, black ink on a white background",
        demo.STYLE_TAGS,
    ),
    "blueprint": (
        _blueprint,
        "a blueprint of {}, white lines on a blue background",
        ("blueprint", "monochrome", "simple background", "blue background"),
    ),
    "poster": (
        _poster,
        "a poster of {}, four flat colours",
        ("poster", "limited palette", "simple background", "beige background"),
    ),
    "thread": (
        _thread,
        "a thin red line drawing of {}",
        ("line art", "thin lines", "simple background", "red"),
    ),
    "neon": (
        _neon,
        "a neon sign of {} on a black background",
        ("neon", "glowing", "simple background", "black background"),
    ),
}
NAMES = (*STYLES, "hero")
