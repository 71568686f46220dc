"""The images and captions that a run was trained on, found again and laid out to train on."""

from __future__ import annotations

import glob
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import BadZipFile, ZipFile

from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.text import listed
from lorasweep.data import image_files
from lorasweep.data.dataset import ImageFile
from lorasweep.reproduce.logged_files import read_captions
from lorasweep.reproduce.original_run import ReproduceError

IMAGES, CAPTIONS = "images", "captions.jsonl"
"""Names in the folder of a run that is made again."""
MAX_IMAGE = 1 << 28
"""Bytes of an image in an archive; more is refused unread."""

CaptionTexts = Mapping[str, Mapping[str, str]]
"""Image by its name in the manifest -> arm -> caption."""


@dataclass(frozen=True, kw_only=True)
class FoundImages:
    """Where the images of a manifest are."""

    images: tuple[ImageFile, ...]
    """In the manifest's order, each at the path where it was found or put."""
    how: Mapping[str, int]
    """How many were found `by name`, `under other names`, `in the log`."""

    def __str__(self) -> str:
        return ", ".join(f"{number} {how}" for how, number in self.how.items())


@dataclass(frozen=True, kw_only=True)
class LoggedCaptions:
    """The captions that a run was trained on."""

    texts: CaptionTexts
    edited: Sequence[str] = ()
    """Names of images with a caption that was edited by hand after it was made."""
    removed: Sequence[str] = ()
    """Files that were taken out of the folders by hand, as train/1_wd/fox.png."""
    added: Sequence[str] = ()
    """Files that were put into them by hand; their bytes are not in the log."""


def find_images(
    manifest: Mapping[str, Any],
    image_dir: Path,
    archive: Path | None,
    spare: Path,
    *,
    by_content: bool = True,
) -> FoundImages:
    """The manifest's images: below `image_dir` by name, else by content, else in the archive.

    What comes out of the archive is written below `spare`. All files of a folder are looked
    through `by_content` if a person gave it: a log may name the root of the disk. Raises
    ReproduceError that names what is missing.
    """
    found: dict[str, ImageFile] = {}
    how: Counter[str] = Counter()
    searches = {
        "by name": _by_name,
        "under other names": _by_content if by_content else lambda _wanted, _folder: iter(()),
        "in the log": lambda wanted, _: _in_archive(wanted, archive, spare),
    }
    for search, paths in searches.items():
        wanted = [image for image in manifest["images"] if image["file"] not in found]
        for image, path in paths(wanted, image_dir) if wanted else ():
            size = image["width"], image["height"]
            found[image["file"]] = ImageFile(path, image["file"], image["sha256"], *size)
            how[search] += 1
    if missing := [image for image in manifest["images"] if image["file"] not in found]:
        names = listed([f"{image['file']} (sha256 {image['sha256'][:12]}…)" for image in missing])
        raise ReproduceError(
            f"{len(missing)} of its {len(manifest['images'])} images are not in {image_dir}, under"
            f" any name: {names}; give the folder that has them as dataset.image_dir=FOLDER. Runs"
            " trained with dataset.log_images=true keep theirs in MLflow"
        )
    return FoundImages(images=tuple(found[one["file"]] for one in manifest["images"]), how=how)


def logged_captions(
    manifest: Mapping[str, Any], used: str | None, where: str = "captions.json"
) -> LoggedCaptions:
    """The captions as the trainer read them (`used`, captions.json), edited ones too.

    Without `used` (the run was broken off early) they are those that were made. Raises
    ForeignFileError, which names it `where`, for a text of another shape.
    """
    texts = {image["file"]: dict(image["captions"]) for image in manifest["images"]}
    if used is None:
        return LoggedCaptions(texts=texts)
    written = {
        f"{image['split']}/{arm['repeats']}_{name}/{PurePosixPath(image['copy']).name}": (
            image["file"],
            name,
        )
        for image in manifest["images"]
        for name, arm in manifest["arms"].items()
    }
    present = {
        f"{split}/{folder}/{file}": text
        for split, arms in read_captions(used, where).items()
        for folder, captions in arms.items()
        for file, text in captions.items()
    }
    edited = {}
    for copy in sorted(set(written) & set(present)):
        file, arm = written[copy]
        if texts[file][arm] != present[copy]:
            texts[file][arm] = present[copy]
            edited[file] = True
    return LoggedCaptions(
        texts=texts,
        edited=tuple(edited),
        removed=sorted(set(written) - set(present)),
        added=sorted(set(present) - set(written)),
    )


def lay_out(found: FoundImages, folder: Path) -> Path:
    """Copy the images by their names into `folder`/images, which is returned.

    A folder of nothing but a run's images draws the same again.
    """
    image_dir = folder / IMAGES
    for image in found.images:
        path = image_dir / image.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if image.path != path:
            write_atomically(path, image.path.read_bytes())
    return image_dir


def write_captions(texts: CaptionTexts, folder: Path) -> Path:
    """Write `folder`/captions.jsonl: a line an image, with each arm's caption under its name."""
    jsonl = folder / CAPTIONS
    lines = (json.dumps({"file": name, **of}, ensure_ascii=False) for name, of in texts.items())
    write_atomically(jsonl, "".join(f"{line}\n" for line in lines).encode())
    return jsonl


def take_out(data: Path, removed: Sequence[str]) -> None:
    """Delete from kohya's folders what was deleted there by hand before the run was trained."""
    for file in removed:
        path = data / file
        path.unlink(missing_ok=True)
        for caption in path.parent.glob(f"{glob.escape(path.stem)}.*"):
            caption.unlink()


_Found = Iterator[tuple[Mapping[str, Any], Path]]


def _by_name(wanted: Sequence[Mapping[str, Any]], image_dir: Path) -> _Found:
    for image in wanted:
        path = image_dir / image["file"]
        if _hash(path) == image["sha256"]:
            yield image, path


def _by_content(wanted: Sequence[Mapping[str, Any]], image_dir: Path) -> _Found:
    files = sorted(image_dir.rglob("*"))
    hashes = {_hash(one): one for one in files if one.suffix.lower() in image_files.SUFFIXES}
    for image in wanted:
        if image["sha256"] in hashes:
            yield image, hashes[image["sha256"]]


def _in_archive(wanted: Sequence[Mapping[str, Any]], archive: Path | None, spare: Path) -> _Found:
    if archive is None:
        return
    try:
        packed = ZipFile(archive)
    except (BadZipFile, OSError, ValueError):
        return
    with packed:
        for image in wanted:
            data = _unpacked(packed, image["sha256"])
            if hashlib.sha256(data).hexdigest() == image["sha256"]:
                path = spare / image["file"]
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, data)
                yield image, path


def _unpacked(packed: ZipFile, name: str) -> bytes:
    """A file of an archive that anybody may have made; nothing where it is too large or damaged."""
    try:
        info = packed.getinfo(name)
        return packed.read(info) if info.file_size <= MAX_IMAGE else b""
    except (KeyError, BadZipFile, OSError, EOFError, ValueError, zlib.error):
        return b""
    except (NotImplementedError, RuntimeError):  # packed in another way, or with a password
        return b""


def _hash(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
