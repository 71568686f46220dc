"""kohya's folders: `{repeats}_{arm}/` with images and one caption file beside each.

They are the contract between the data and the trainers, and may be looked at and edited by hand.
Nothing else in the project knows the format:

    root/images/              one prepared copy of every image
    root/train/10_wd/         hard links to the copies, and a caption file beside each
    root/holdout/10_wd/       the same for the images held out
    root/reg/1_woman/         the same for regularisation images, if there are any
    root/masks/train/         masks of the images of train/, by their names; likewise of holdout/
    root/manifest.json        what was written and what from
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from lorasweep.core.atomic_write import room_for, write_atomically
from lorasweep.core.foreign_files import ForeignFileError, inside, parse_shaped, read_bytes
from lorasweep.core.settings import SettingsError
from lorasweep.core.text import listed
from lorasweep.data.dataset import ImageFile, ImageSet
from lorasweep.data.image_files import open_image, open_with_alpha, plain_format
from lorasweep.data.subsets import MAX_REPEATS

logger = logging.getLogger(__name__)

MANIFEST, ORIGINALS, MASKS = "manifest.json", "originals.zip", "masks"
_VERSION = (
    1  # part of what a folder is written from: count up when the same inputs give other files
)
_SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp", "BMP": ".bmp"}
_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})  # those that kohya reads


class FoldersError(SettingsError):
    """A folder that can't be written or read as asked; the message says what to do."""


@dataclass(frozen=True)
class ArmCaptions:
    """The captions of one arm, and how they were made."""

    repeats: int
    captions: tuple[str | None, ...]
    """One for each image of `ImageSet.by_split`, in that order; None where the arm lacks it."""
    captioner: str
    """Identity of what made them: model, revision, settings."""
    has_lines: bool = field(default=False, repr=False)
    """May a caption have several lines, of which one is drawn at each step?"""
    keeps_alpha: bool = field(default=False, repr=False)
    """Is the images' alpha a mask? Else they lie on white."""


@dataclass(frozen=True)
class CaptionedImage:
    """An image and its caption, as a trainer reads them."""

    path: Path
    caption: str
    mask: Path | None = None


@dataclass(frozen=True)
class Arm:
    """One `{repeats}_{name}` folder."""

    name: str
    repeats: int
    items: tuple[CaptionedImage, ...]


@dataclass(frozen=True)
class _ManifestArm:
    repeats: int
    captioner: str


@dataclass(frozen=True)
class _ManifestImage:
    file: str
    copy: str
    sha256: str
    split: str
    captions: dict[str, str]


@dataclass(frozen=True)
class _Manifest:
    """The shape of a manifest.json, as far as it is read here."""

    inputs: str
    caption_extension: str
    arms: dict[str, _ManifestArm]
    images: list[_ManifestImage]


def write(
    image_set: ImageSet,
    captions: Mapping[str, ArmCaptions],
    root: Path,
    caption_extension: str = ".txt",
    masks: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the folders and the manifest below `root`, whole or not at all; return `root`.

    `masks` are mask files by the names of their images.

    - Nothing at `root`, or an empty folder: it is written.
    - The manifest there names the same inputs: it is kept, with whatever was edited since.
    - It names other inputs: it is written anew if no caption was edited and no image or caption
      added or removed since. Otherwise, or without a manifest, FoldersError says what to do.
    """
    _check_names(captions, image_set)
    masks = masks or {}
    inputs = _inputs(image_set, captions, caption_extension, masks)
    if _is_written_from(inputs, root):
        return root
    _refuse_to_overwrite(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with (
        room_for("the images and captions", root.parent),
        TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as scratch,
    ):
        tree = Path(scratch) / "new"
        _write_tree(tree, image_set, captions, caption_extension, masks, inputs)
        _put_in_place(tree, root, inputs, replaced=Path(scratch) / "old")
    return root


def read(
    split_dir: Path,
    caption_extension: str = ".txt",
    has_lines: Callable[[str], bool] = lambda _arm: False,
) -> list[Arm]:
    """Read `{repeats}_{name}` folders as kohya does, sorted by folder name.

    The caption is the first line of the file beside the image, stripped, or all of them in an arm
    that `has_lines`; without a file it is the arm's name, kohya's class token. Images in
    subfolders are not seen. Other folders, empty ones, missing captions and further lines are
    warned about. An empty list means no images.
    """
    if not split_dir.is_dir():
        raise FoldersError(f"{split_dir}: there is no such folder; write the folders first")
    arms = (_read_arm(path, caption_extension, has_lines) for path in sorted(split_dir.iterdir()))
    return [arm for arm in arms if arm is not None]


def pack_originals(root: Path, image_dir: Path, folders: Mapping[str, Path]) -> Path:
    """One archive with the images that `root` was written from, by the sha256 of their bytes.

    They lie below `image_dir`, or in the one of `folders` with which their names begin. An image
    that was changed or removed since is left out, with a warning.
    """
    path = root / ORIGINALS
    if path.is_file():
        return path
    manifest = _read_manifest(root)
    if manifest is None:
        raise FoldersError(f"{root / MANIFEST} is not as it was written; delete {root}")
    content, gone = BytesIO(), []
    with ZipFile(content, "w", ZIP_STORED) as archive:  # images don't shrink
        for image in manifest["images"]:
            folder, _, rest = image["file"].partition("/")
            places = [(image_dir.expanduser(), image["file"])]
            places += [(folders[folder], rest)] if folder in folders else []
            for place, name in places:
                data = _original(place, name)
                if hashlib.sha256(data).hexdigest() == image["sha256"]:
                    archive.writestr(ZipInfo(image["sha256"]), data)
                    break
            else:
                gone.append(image["file"])
    if gone:
        logger.warning("dataset.log_images: changed or gone meanwhile: %s", listed(gone))
    write_atomically(path, content.getvalue())
    return path


def _original(image_dir: Path, name: str) -> bytes:
    """What is left of an image, which the manifest can't look for elsewhere."""
    try:
        return inside(image_dir, name).read_bytes()
    except (ForeignFileError, OSError):
        return b""


def clean_caption(text: str) -> str:
    """One line: runs of white space become one space, control characters go."""
    line = " ".join(text.split())
    unwanted = {"Cc", "Cs"}  # control characters, and halves of pairs that UTF-8 can't hold
    return "".join(
        char for char in line if unicodedata.category(char) not in unwanted and char != "\ufeff"
    ).strip()


def _cleaned(text: str | None, made: ArmCaptions) -> str | None:
    if text is None or not made.has_lines:
        return None if text is None else clean_caption(text)
    return "\n".join(filter(None, map(clean_caption, text.split("\n"))))


def _check_names(captions: Mapping[str, ArmCaptions], image_set: ImageSet) -> None:
    for arm, made in captions.items():
        if not re.fullmatch(r"\w[\w.-]*", arm) or len(arm) > 100:
            raise FoldersError(
                f"captions.{arm}: the arm's name becomes a folder's; "
                "use letters, digits, '_', '-' and '.'"
            )
        assert made.repeats >= 1
        assert len(made.captions) == len(image_set.by_split)


def _inputs(
    image_set: ImageSet,
    captions: Mapping[str, ArmCaptions],
    caption_extension: str,
    masks: Mapping[str, bytes],
) -> str:
    """Digest of all that decides what is written."""
    arms = {
        arm: [made.repeats, made.captioner, [_cleaned(text, made) for text in made.captions]]
        for arm, made in captions.items()
    }
    parts: list[object] = [_VERSION, image_set.digest, caption_extension, arms]
    if masks:
        parts.append({name: hashlib.sha256(data).hexdigest() for name, data in masks.items()})
    if alpha := [arm for arm, made in captions.items() if made.keeps_alpha]:
        parts.append(["alpha", *alpha])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _is_written_from(inputs: str, root: Path) -> bool:
    manifest = _read_manifest(root)
    return manifest is not None and manifest["inputs"] == inputs


def _read_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is none of ours."""
    path = root / MANIFEST
    try:
        manifest: dict[str, Any] = parse_shaped(read_bytes(path), path, _Manifest)
    except (FileNotFoundError, NotADirectoryError, ForeignFileError):
        return None
    arms = {arm for image in manifest["images"] for arm in image["captions"]}
    return manifest if arms <= set(manifest["arms"]) else None


def _refuse_to_overwrite(root: Path) -> None:
    manifest = _read_manifest(root)
    if manifest is None:
        if root.exists() and not (root.is_dir() and not any(root.iterdir())):
            raise FoldersError(f"{root} was not written by lorasweep; give another folder")
        return
    if edited := _edited(root, manifest):
        raise FoldersError(
            f"{root} was edited since it was written, and would now be written anew from other "
            f"images or captions; move it away to keep it, or delete it ({listed(edited)})"
        )


def _edited(root: Path, manifest: dict[str, Any]) -> list[str]:
    """Images and captions that were added, removed or rewritten; other files are not ours."""
    written = _files(manifest)
    present = {
        path.relative_to(root).as_posix()
        for split in ("train", "holdout", "reg")
        for path in (root / split).rglob("*")
        if path.suffix.lower() in _IMAGE_SUFFIXES
        or path.name.endswith(manifest["caption_extension"])
    }
    edited = set(written) ^ present
    for file in set(written) & present:
        content = written[file]
        if isinstance(content, bytes) and (root / file).read_bytes() != content:
            edited.add(file)
    return sorted(edited)


def _files(manifest: dict[str, Any]) -> dict[str, str | bytes]:
    """What the arms hold: each image with the copy that it is, each caption file with its bytes.

    All paths are below root.
    """
    files: dict[str, str | bytes] = {}
    for image in manifest["images"]:
        copy = Path(image["copy"])
        for arm, text in image["captions"].items():
            folder = f"{image['split']}/{manifest['arms'][arm]['repeats']}_{arm}"
            files[f"{folder}/{copy.name}"] = image["copy"]
            # kohya aborts on a caption file of zero bytes; one newline is an empty caption
            caption = f"{folder}/{copy.stem}{manifest['caption_extension']}"
            files[caption] = f"{text}\n".encode()
    return files


def _write_tree(
    tree: Path,
    image_set: ImageSet,
    captions: Mapping[str, ArmCaptions],
    caption_extension: str,
    masks: Mapping[str, bytes],
    inputs: str,
) -> None:
    for folder in ("images", "train", "holdout"):
        (tree / folder).mkdir(parents=True)
    entries = []
    stems = _stems([image for _, image in image_set.by_split])
    for index, ((split, image), stem) in enumerate(zip(image_set.by_split, stems, strict=True)):
        of_arms = [made for made in captions.values() if made.captions[index] is not None]
        suffix, data = _prepared(image, keep_alpha=any(made.keeps_alpha for made in of_arms))
        copy = f"images/{stem}{suffix}"
        (tree / copy).write_bytes(data)
        texts = {
            arm: text
            for arm, made in captions.items()
            if (text := _cleaned(made.captions[index], made)) is not None
        }
        entries.append(_entry(image, copy, split, texts))
        if image.name in masks and split != "reg":
            mask = tree / MASKS / split / f"{stem}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            open_image(BytesIO(masks[image.name])).getchannel("R").save(mask)
    manifest = {
        "version": _VERSION,
        "inputs": inputs,
        "digest": image_set.digest,
        "caption_extension": caption_extension,
        "arms": {
            arm: {"repeats": made.repeats, "captioner": made.captioner}
            for arm, made in captions.items()
        },
        "images": entries,
    }
    for file, content in _files(manifest).items():
        path = tree / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            _link(tree / content, path)
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    (tree / MANIFEST).write_text(f"{text}\n", encoding="utf-8")


def _entry(image: ImageFile, copy: str, split: str, texts: dict[str, str]) -> dict[str, Any]:
    return {
        # a name that is not UTF-8 can't stand in JSON as it is
        "file": image.name.encode(errors="backslashreplace").decode(),
        "copy": copy,
        "sha256": image.sha256,
        "width": image.width,
        "height": image.height,
        "split": split,
        "captions": texts,
    }


def _prepared(image: ImageFile, *, keep_alpha: bool) -> tuple[str, bytes]:
    """Suffix and bytes of the copy: the file's own where it is plain, else a PNG."""
    data = image.path.read_bytes()
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise FoldersError(f"{image.path} changed while it was being used; start again")
    suffix = _SUFFIXES.get(plain_format(BytesIO(data)) or "")
    if suffix is not None:
        return suffix, data
    png = BytesIO()
    if keep_alpha:
        pixels, alpha = open_with_alpha(BytesIO(data))
        pixels.putalpha(alpha)
    else:
        pixels = open_image(BytesIO(data))
    pixels.save(png, "PNG")
    return ".png", png.getvalue()


def _stems(images: Sequence[ImageFile]) -> list[str]:
    """A file name without suffix for each image, unique also where case doesn't count."""
    stems = [_safe_stem(image.name) for image in images]
    counts = Counter(stem.casefold() for stem in stems)
    return [
        stem if counts[stem.casefold()] == 1 else f"{stem}-{image.sha256[:16]}"
        for stem, image in zip(stems, images, strict=True)
    ]


def _safe_stem(name: str) -> str:
    """A relative path as one name: `cats/my cat.png` gives `cats_my_cat`."""
    flat = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", name.rpartition(".")[0]))
    short = flat.encode()[:150].decode(errors="ignore")  # file systems allow 255 bytes
    return short.strip("._-") or "image"


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _put_in_place(tree: Path, root: Path, inputs: str, replaced: Path) -> None:
    if _is_written_from(inputs, root):
        return  # by another process, meanwhile; it may be in use already
    try:
        if root.exists():
            root.rename(replaced)
        tree.rename(root)
    except OSError:
        if not _is_written_from(inputs, root):
            raise


def _read_arm(folder: Path, caption_extension: str, has_lines: Callable[[str], bool]) -> Arm | None:
    if not folder.is_dir():
        return None
    match = re.fullmatch(r"0*([1-9]\d*)_(.+)", folder.name)
    if match is None:
        logger.warning("%s: ignored, it is not named like 10_name", folder)
        return None
    images = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    if not images:
        logger.warning("%s: ignored, there are no images in it", folder)
        return None
    repeats, name = int(match[1][:9]), match[2]
    if repeats > MAX_REPEATS:
        raise FoldersError(f"{folder}: repeats are at most {MAX_REPEATS}; rename the folder")
    items = _read_items(folder, images, name, caption_extension, has_lines=has_lines(name))
    return Arm(name, repeats, items)


def _read_items(
    folder: Path, images: list[Path], name: str, caption_extension: str, *, has_lines: bool
) -> tuple[CaptionedImage, ...]:
    lines = {path: _caption_lines(path.with_suffix(caption_extension)) for path in images}
    if missing := [path.name for path, found in lines.items() if found is None]:
        logger.warning(
            "%s: no %s file for %s; their caption is the folder's name, %r",
            folder,
            caption_extension,
            listed(missing),
            name,
        )
    longer = [path.name for path, found in lines.items() if found and len(found) > 1]
    if longer and not has_lines:
        logger.warning("%s: only the first line is read of %s", folder, listed(longer))
    return tuple(
        CaptionedImage(
            path, name if found is None else _text(found, has_lines=has_lines), _mask_beside(path)
        )
        for path, found in lines.items()
    )


def _mask_beside(image: Path) -> Path | None:
    split = image.parents[1]
    path = split.parent / MASKS / split.name / f"{image.stem}.png"
    return path if path.is_file() else None


def _text(lines: list[str], *, has_lines: bool) -> str:
    return "\n".join(filter(None, lines)) if has_lines else lines[0]


def _caption_lines(path: Path) -> list[str] | None:
    """The lines of a caption file, stripped; None without a file, [""] for an empty caption."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise FoldersError(f"{path} is not UTF-8 text ({error.reason}); save it as such") from None
    if not text:
        raise FoldersError(f"{path} is empty; kohya wants one newline for an empty caption")
    first, *rest = (line.strip() for line in text.split("\n"))
    return [first, *filter(None, rest)]
