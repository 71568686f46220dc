"""The icon sets: fetched by name from the npm registry and rendered to RGBA."""

import functools
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent

PACKAGES = {  # pinned, so that the same seed sees the same pictures
    "sharp": "0.35.5",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/fxemoji": "1.2.2",
    "emojibase-data": "17.0.0",
}

STYLES = {  # what a caption calls a set: the set
    "3d": "fluent-emoji-3d",
    "gradient": "fluent-emoji",
    "flat": "fluent-emoji-flat",
    "noto": "noto",
    "blob": "noto-v1",
    "firefox": "fxemoji",
}
UNSEEN = "fluent-emoji-high-contrast"  # the demo's style: no stage trains on it

FXEMOJI_NAMES = {  # its own names, where no rule finds them
    "grinning face": "grin",
    "dog face": "dog",
    "tiger face": "tiger",
    "pig face": "pig",
    "panda": "pandaface",
    "evergreen tree": "christmastree",
    "pizza": "sliceofpizza",
    "house": "housebuilding",
    "sun": "sunrays",
    "snowman": "snowmanwithoutsnow",
}


@dataclass(frozen=True)
class Icon:
    """One emoji in one set, before rendering."""

    label: str
    tags: tuple[str, ...]
    picture: dict[str, str]
    """What render.mjs draws: {"svg": text} or {"file": path}."""


@dataclass(frozen=True)
class Rendered:
    """A set's pictures: labels and tags in the order of `rgba` (N, S, S, 4) uint8."""

    labels: list[str]
    tags: list[tuple[str, ...]]
    rgba: NDArray[np.uint8]


def fetch(folder: Path) -> None:
    """Install the pinned packages under `folder`, unless they are there."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"private": true}\n')
    names = [f"{name}@{version}" for name, version in PACKAGES.items()]
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", *names], cwd=folder, check=True)
    (folder / "done").touch()


def render(npm: Path, folder: Path, size: int, names: Sequence[str]) -> None:
    """Render sets at size x size into `folder`: NAME.rgba (raw) and NAME.json (labels, tags)."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not (folder / f"{name}.rgba").exists()]
    if not missing:
        return
    sets = {name: list(icons_of(npm / "node_modules", name)) for name in missing}
    for name, icons in sets.items():
        index = [{"label": icon.label, "tags": icon.tags} for icon in icons]
        (folder / f"{name}.json").write_text(json.dumps(index))
    job = [
        {"out": str((folder / f"{name}.rgba").resolve()), "icons": [i.picture for i in icons]}
        for name, icons in sets.items()
    ]
    (folder / "job.json").write_text(json.dumps({"size": size, "sets": job}))
    command = ["node", str(HERE / "render.mjs"), str((folder / "job.json").resolve())]
    subprocess.run(command, cwd=npm, check=True)


def load(folder: Path, name: str, size: int) -> Rendered:
    """Read a rendered set."""
    index = json.loads((folder / f"{name}.json").read_text())
    rgba = np.fromfile(folder / f"{name}.rgba", dtype=np.uint8).reshape(-1, size, size, 4)
    assert len(index) == len(rgba), (name, len(index), len(rgba))
    return Rendered([i["label"] for i in index], [tuple(i["tags"]) for i in index], rgba)


def concepts() -> list[str]:
    """The 64 everyday concepts, as emojibase labels them."""
    return (HERE / "concepts.txt").read_text().splitlines()


def icons_of(modules: Path, name: str) -> Iterator[Icon]:
    """The icons of a set that emojibase knows, without flags and skin tones."""
    for emoji in json.loads((modules / "emojibase-data/en/data.json").read_text()):
        if emoji.get("group", 9) == 9:  # 9: flags; none: regional indicators
            continue
        picture = find_picture(modules, name, emoji)
        if picture:
            yield Icon(emoji["label"].lower(), tuple(emoji.get("tags", ())), picture)


def find_picture(modules: Path, name: str, emoji: dict[str, str]) -> dict[str, str] | None:
    """A set's picture of an emoji, found by code point, else by name; None if it has none."""
    if name == "fluent-emoji-3d":
        folder = modules / "@lobehub/fluent-emoji-3d/assets"
        stem = emoji["hexcode"].lower()
        files = (folder / f"{s}.webp" for s in (stem, stem.replace("-fe0f", ""), f"{stem}-fe0f"))
        return next(({"file": str(f.resolve())} for f in files if f.exists()), None)
    icons = iconify(modules, name)
    for candidate in icon_names(modules, emoji):
        if candidate in icons:
            return {"svg": icons[candidate]}
    return None


def icon_names(modules: Path, emoji: dict[str, str]) -> Iterator[str]:
    """Names a set may use for an emoji, the surest first."""
    code = emoji["hexcode"].lower().replace("-fe0f", "")
    label = emoji["label"].lower()
    known = [code_names(modules, source).get(code) for source in ("fluent-emoji-flat", "noto")]
    names = [n for n in (*known, re.sub(r"[^a-z0-9]+", "-", label)) if n]
    yield from names
    yield from (n.replace("-", "") for n in names)
    if label in FXEMOJI_NAMES:
        yield FXEMOJI_NAMES[label]


@functools.cache
def iconify(modules: Path, name: str) -> dict[str, str]:
    """Icon name -> SVG of an iconify set, aliases included."""
    data = json.loads((modules / f"@iconify-json/{name}/icons.json").read_text())
    icons: dict[str, dict[str, int | str]] = dict(data["icons"])
    for alias, entry in data.get("aliases", {}).items():
        if entry["parent"] in icons and set(entry) == {"parent"}:  # else turned or mirrored
            icons[alias] = icons[entry["parent"]]
    return {key: svg_of(icon, data["width"], data["height"]) for key, icon in icons.items()}


def svg_of(icon: dict[str, int | str], width: int, height: int) -> str:
    """An iconify entry as a document of its own."""
    box = [icon.get("left", 0), icon.get("top", 0)]
    box += [icon.get("width", width), icon.get("height", height)]
    view = " ".join(str(v) for v in box)
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'{head} width="{box[2]}" height="{box[3]}" viewBox="{view}">{icon["body"]}</svg>'


@functools.cache
def code_names(modules: Path, name: str) -> dict[str, str]:
    """Code points -> icon name, of the sets that tell them."""
    codes = json.loads((modules / f"@iconify-json/{name}/chars.json").read_text())
    return {code.replace("-fe0f", ""): icon for code, icon in codes.items()}
