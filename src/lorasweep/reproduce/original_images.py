"""The images and captions that a run was trained on, found again and laid out to train on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import BadZipFile, ZipFile

from lorasweep.core.atomic_write import write_atomically
from lorasweep.data import image_files
from lorasweep.data.dataset import ImageFile, listed
from lorasweep.reproduce.recipe import ReproduceError

MAX_IMAGE = 1 << 30
"""Bytes of an image in an archive; more is refused unread."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where the images of a manifest are."""

    by_name: int
    by_content: int
    """Under another name."""
    in_log: int
    images: tuple[ImageFile, ...]
    """In the manifest's order, each at the place where it was found or put."""

    def __str__(self) -> str:
        parts = {
            "by name": self.by_name,
            "under other names": self.by_content,
            "in the log": self.in_log,
        }
        return ", ".join(f"{number} {how}" for how, number in parts.items() if number)


@dataclass(frozen=True, kw_only=True)
class Captions:
    """The captions that a run was trained on."""

    texts: Mapping[str, Mapping[str, str]]
    """Image by its name in the manifest -> arm -> caption."""
    edited: Sequence[str]
    """Names of images with a caption that was edited by hand after it was made."""
    removed: Sequence[str]
    """Files that were taken out of the folders by hand, as train/1_wd/fox.png."""
    added: Sequence[str]
    """Files that were put into them by hand; their bytes are not in the log."""


def find(manifest: Mapping[str, Any], image_dir: Path, archive: Path | None, spare: Path) -> Found:
    """The manifest's images: below `image_dir` by name, else by content, else in the archive.

    What comes out of the archive is written below `spare`. Raises ReproduceError that names
    what is missing.
    """
    wanted: list[dict[str, Any]] = list(manifest["images"])
    places = {image["file"]: _by_name(image, image_dir) for image in wanted}
    lacking = [image for image in wanted if places[image["file"]] is None]
    num_by_name = len(wanted) - len(lacking)
    by_content = _by_content(image_dir) if lacking else {}
    for image in lacking:
        places[image["file"]] = by_content.get(image["sha256"])
    lacking = [image for image in lacking if places[image["file"]] is None]
    num_in_log = 0
    for image in lacking if archive is not None else []:
        assert archive is not None
        places[image["file"]] = _from_archive(archive, image, spare)
        num_in_log += places[image["file"]] is not None
    if missing := [image for image in wanted if places[image["file"]] is None]:
        raise ReproduceError(_told(missing, len(wanted), image_dir))
    return Found(
        by_name=num_by_name,
        by_content=len(wanted) - num_by_name - num_in_log,
        in_log=num_in_log,
        images=tuple(_image(image, places[image["file"]]) for image in wanted),
    )


def captions(manifest: Mapping[str, Any], used: str | None) -> Captions:
    """The captions as the trainer read them (`used`, captions.json), edited ones too.

    Without `used` (the run was broken off early) they are those that were made.
    """
    made = {image["file"]: dict(image["captions"]) for image in manifest["images"]}
    if used is None:
        return Captions(texts=made, edited=(), removed=(), added=())
    read: dict[str, dict[str, dict[str, str]]] = json.loads(used)
    by_place = {
        f"{image['split']}/{arm['repeats']}_{name}/{PurePosixPath(image['copy']).name}": (
            image["file"],
            name,
        )
        for image in manifest["images"]
        for name, arm in manifest["arms"].items()
    }
    present = {
        f"{split}/{folder}/{file}": text
        for split, arms in read.items()
        for folder, texts in arms.items()
        for file, text in texts.items()
    }
    edited = []
    for place in sorted(set(by_place) & set(present)):
        file, arm = by_place[place]
        if made[file][arm] != present[place]:
            made[file][arm] = present[place]
            edited.append(file)
    return Captions(
        texts=made,
        edited=tuple(dict.fromkeys(edited)),
        removed=sorted(set(by_place) - set(present)),
        added=sorted(set(present) - set(by_place)),
    )


def lay_out(
    found: Found, texts: Mapping[str, Mapping[str, str]], folder: Path
) -> tuple[Path, Path]:
    """Copy the images below `folder`/images, by their names; that, and a JSONL of the captions.

    A folder of nothing but a run's images draws the same again.
    """
    image_dir, jsonl = folder / "images", folder / "captions.jsonl"
    for image in found.images:
        path = image_dir / image.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if image.path != path:
            write_atomically(path, image.path.read_bytes())
    write_captions(texts, jsonl)
    return image_dir, jsonl


def write_captions(texts: Mapping[str, Mapping[str, str]], jsonl: Path) -> None:
    """One line an image, with the caption of each arm under the arm's name."""
    lines = (json.dumps({"file": name, **of}, ensure_ascii=False) for name, of in texts.items())
    write_atomically(jsonl, "".join(f"{line}\n" for line in lines).encode())


def _told(missing: Sequence[Mapping[str, Any]], total: int, image_dir: Path) -> str:
    names = listed([f"{image['file']} (sha256 {image['sha256'][:12]}…)" for image in missing])
    return (
        f"{len(missing)} of its {total} images are not in {image_dir}, under any name: {names};"
        " give the folder that has them as dataset.image_dir=FOLDER. Runs trained with"
        " dataset.log_images=true keep theirs in MLflow"
    )


def _by_name(image: Mapping[str, Any], image_dir: Path) -> Path | None:
    path = image_dir / _safe(image["file"])
    return path if _hash(path) == image["sha256"] else None


def _by_content(image_dir: Path) -> dict[str, Path]:
    """All images below the folder, by the sha256 of their bytes."""
    files = (
        path for path in sorted(image_dir.rglob("*")) if path.suffix.lower() in image_files.SUFFIXES
    )
    hashes = ((_hash(path), path) for path in files)
    return {digest: path for digest, path in hashes if digest is not None}


def _from_archive(archive: Path, image: Mapping[str, Any], spare: Path) -> Path | None:
    path = spare / _safe(image["file"])
    try:
        with ZipFile(archive) as packed:
            info = packed.getinfo(image["sha256"])
            data = packed.read(info) if info.file_size <= MAX_IMAGE else b""
    except (KeyError, BadZipFile, OSError):
        return None
    if hashlib.sha256(data).hexdigest() != image["sha256"]:
        return None
    write_atomically(path, data)
    return path


def _hash(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _safe(name: str) -> str:
    """A manifest's name, which must stay below the folder it is put into."""
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or PurePosixPath(name).is_absolute():
        raise ReproduceError(f"its manifest names {name!r}, which leads out of the images' folder")
    return name


def _image(image: Mapping[str, Any], place: Path | None) -> ImageFile:
    assert place is not None
    return ImageFile(place, image["file"], image["sha256"], image["width"], image["height"])
