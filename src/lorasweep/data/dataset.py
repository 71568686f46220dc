"""The images: find them in a folder, refuse the bad ones, draw some, hold some out."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PlainValidator, PositiveInt

from lorasweep.core.settings import SettingsError
from lorasweep.core.text import listed, shown
from lorasweep.data import image_files
from lorasweep.data.subset_settings import SubsetSettings
from lorasweep.data.subsets import CONFIGS, Subset, entries, subsets

logger = logging.getLogger(__name__)

_MAX_SIDE = 8192  # pixels: a typing error above it, which would take all memory before it failed
_REPEATS = re.compile(r"[1-9]\d{0,2}_.+")  # of a folder: 20_woman; 2024_holiday is a year


class BadImagesError(SettingsError):
    """Images that can't be trained on; the message lists them, one a line, with the reason."""


def _resolution(value: object) -> int | tuple[int, int]:
    """512, [512, 768] or kohya's "512,768"; anything else is refused in one line."""
    try:
        match value:
            case bool():
                raise ValueError
            case str():
                sides = tuple(int(side) for side in value.split(","))
            case int():
                sides = (value,)
            case [int(width), int(height)]:
                sides = (width, height)
            case _:
                raise ValueError
        if len(sides) > 2 or min(sides) < 1 or max(sides) > _MAX_SIDE:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"dataset.resolution={value}: must be a number of pixels or [width, height], at most"
            f" {_MAX_SIDE} a side"
        ) from None
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _num_images(value: object) -> int | Literal["all"]:
    """30, or all; anything else is refused in one line."""
    if value == "all":
        return "all"
    if isinstance(value, int) and value > 0:
        return value
    raise ValueError(f"dataset.num_images={value}: must be a number of images, or all")


Side = Annotated[int, Field(gt=0, le=_MAX_SIDE)]
NumImages = Annotated[int | Literal["all"], PlainValidator(_num_images)]
Resolution = Annotated[int | tuple[int, int], PlainValidator(_resolution)]


@dataclass(frozen=True, kw_only=True)
class Dataset(SubsetSettings):
    """Which images are used, and kohya's options for reading them (the trainer applies those)."""

    is_kohyas: ClassVar[bool] = False
    """Is it of kohya's folders, with the captions that are in them?"""

    image_dir: Path
    num_images: NumImages
    num_holdout: NonNegativeInt
    seed: int
    min_size: PositiveInt
    """Pixels of the shorter side; a smaller image is bad."""
    max_pixels: PositiveInt
    """Width times height; a larger image is bad, and is not decoded to find that out."""
    skip_bad: bool
    log_images: bool
    caption_extension: str
    allow_other_extension: bool

    resolution: Resolution
    enable_bucket: bool
    min_bucket_reso: Side
    max_bucket_reso: Side
    bucket_reso_steps: Side
    bucket_no_upscale: bool
    reg_data_dir: Path | None = None  # runs of older versions have none of these
    prior_loss_weight: NonNegativeFloat = 1.0
    conditioning_data_dir: Path | None = None

    def __post_init__(self) -> None:
        self._check_extension()
        self._check_no_effect()
        self._check_sizes()

    @property
    def wanted(self) -> int | None:
        """How many images are drawn, held out ones too; None for every one."""
        return None if self.num_images == "all" else self.num_images + self.num_holdout

    @property
    def size(self) -> tuple[int, int]:
        """Training width and height in pixels."""
        resolution = self.resolution
        return (resolution, resolution) if isinstance(resolution, int) else resolution

    def _check_extension(self) -> None:
        extension = self.caption_extension
        key = f"dataset.caption_extension={extension}"
        if not extension.startswith(".") or len(extension) < 2 or set(extension) & set("/\\\0"):
            raise SettingsError(f"{key}: must be a file extension such as .txt")
        if extension.lower() in image_files.SUFFIXES:
            raise SettingsError(f"{key}: that is an image's extension; set it to .txt")
        if extension != ".txt" and not self.allow_other_extension:
            raise SettingsError(
                f"{key}: set it to .txt, otherwise caption files named .txt are ignored; "
                "if yours are named so, add dataset.allow_other_extension=true"
            )

    def _check_no_effect(self) -> None:
        kept = {"keep_tokens": 0, "keep_tokens_separator": "null"}
        if not self.moves_tags and not self.is_kohyas:  # whose folders may have their own settings
            for key, off in kept.items():
                if getattr(self, key):
                    raise SettingsError(
                        f"dataset.{key}={getattr(self, key)} has no effect without"
                        " dataset.shuffle_caption=true or dataset.caption_tag_dropout_rate; set it"
                        f" to {off}"
                    )
        if self.bucket_no_upscale and not self.enable_bucket:
            raise SettingsError(
                "dataset.bucket_no_upscale=true has no effect without dataset.enable_bucket=true; "
                "set it to false"
            )

        if self.alpha_mask and self.conditioning_data_dir is not None:
            raise SettingsError(
                "dataset.alpha_mask=true has no effect with dataset.conditioning_data_dir, whose"
                " masks count; set one of them off"
            )

    def _check_sizes(self) -> None:
        if self.max_pixels > image_files.MAX_PIXELS:
            raise SettingsError(
                f"dataset.max_pixels={self.max_pixels}: must be at most {image_files.MAX_PIXELS}"
            )
        if not self.enable_bucket:
            return
        step = self.bucket_reso_steps  # as kohya: the least side is rounded down, the greatest up
        if self.min_bucket_reso < step:
            raise SettingsError(
                f"dataset.min_bucket_reso={self.min_bucket_reso}: must be at least"
                f" dataset.bucket_reso_steps={step}; raise it or lower the steps"
            )
        if self.min_bucket_reso // step * step > min(self.size):
            raise SettingsError(
                f"dataset.min_bucket_reso={self.min_bucket_reso}: must be at most the shorter side "
                f"of dataset.resolution, {min(self.size)}"
            )
        if -(-self.max_bucket_reso // step) * step < max(self.size):
            raise SettingsError(
                f"dataset.max_bucket_reso={self.max_bucket_reso}: must be at least the longer side "
                f"of dataset.resolution, {max(self.size)}"
            )


@dataclass(frozen=True, kw_only=True)
class KohyaDataset(Dataset):
    """kohya's folders as they are: `image_dir` holds them, or is sd-scripts' dataset config."""

    is_kohyas: ClassVar[bool] = True


@dataclass(frozen=True)
class ImageFile:
    """One image as it lies on disk."""

    path: Path
    name: str
    """Path relative to `image_dir`, with forward slashes; of kohya's folders ARM/FILE."""
    sha256: str
    """Of the file's bytes, in hex."""
    width: int
    """Pixels, after EXIF orientation; so is the height."""
    height: int


@dataclass(frozen=True)
class ImageSet:
    """The images of a run: to train on, held out for scoring, of regularisation; each by name."""

    train: tuple[ImageFile, ...]
    holdout: tuple[ImageFile, ...]
    num_usable: int = 0
    """Of how many they were drawn; duplicates and what is known to be bad don't count."""
    reg: tuple[ImageFile, ...] = ()
    """All of them: none is held out."""

    def summary(self, settings: Dataset) -> str:
        """One line for a person: what of the folder is used."""
        used = f"{len(self.train)} of {self.num_usable} images are trained on"
        held = f"{len(self.holdout)} held out for scoring"
        if self.reg:
            held += f", {len(self.reg)} regularisation images"
        left = self.num_usable - len(self.images)
        if not left:
            return f"{used}, {held}"
        return (
            f"{used}, drawn by seed {settings.seed}, {held}, {left} unused;"
            " dataset.num_images=all takes every one"
        )

    @property
    def images(self) -> tuple[ImageFile, ...]:
        """Those that get captions, the training images first."""
        return self.train + self.holdout

    @property
    def by_split(self) -> tuple[tuple[str, ImageFile], ...]:
        """Every image with its split: those of `images`, then those of regularisation."""
        splits = {"train": self.train, "holdout": self.holdout, "reg": self.reg}
        return tuple((split, image) for split, images in splits.items() for image in images)

    @property
    def digest(self) -> str:
        """SHA-256 over names, contents and split; independent of where the folder lies."""
        lines = [f"{split} {image.sha256} {image.name}\n" for split, image in self.by_split]
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def select(settings: Dataset) -> ImageSet:
    """Draw `num_images` to train on and `num_holdout` more from the folder's usable images.

    With `all` every image is used; of those at most `num_holdout`, and a fifth, are held out.

    The draw depends on `seed` and the images' relative names only. The holdout is drawn first:
    runs that differ in `num_images` are scored on the same images.

    Every file's header is checked, though only the drawn images are decoded: the header is cheap
    and says what is unreadable, huge or tiny in the whole folder, so one error lists it all and
    another seed doesn't bring up the next. Decoding finds truncated files but takes its time.

    Raises SettingsError for a missing or empty folder and BadImagesError for bad images, which
    `skip_bad` turns into a warning; the next images are then drawn in their place.
    """
    folders = subsets(settings, warn=True)
    files = _named_files(settings, folders)
    reg_files = _files_of([one for one in folders if one.is_reg])
    problems = {
        name: _header_problem(path, settings) for name, path in {**files, **reg_files}.items()
    }
    bad = {name: problem for name, problem in problems.items() if problem is not None}
    sound = {name: path for name, path in files.items() if name not in bad}
    different = _without_duplicates(sound, settings)
    drawn, undecodable = _draw(different, settings.seed, settings.wanted)
    reg, reg_undecodable = _draw(
        {name: path for name, path in reg_files.items() if name not in bad}, settings.seed
    )
    bad |= undecodable | reg_undecodable
    _report_bad(bad, settings, num_usable=len(drawn))
    found = _split(drawn, settings, len(different) - len(undecodable))
    found = replace(found, reg=tuple(sorted(reg, key=lambda image: image.name)))
    logger.info("dataset: %s", found.summary(settings))
    return found


def find(settings: Dataset) -> tuple[Path, ...]:
    """All image files below `image_dir`, sorted by their relative names, or in kohya's folders.

    Hidden files and folders and files of other types are left out. Links are followed as long as
    they stay inside the folder; the others are left out with a warning, and so are masks
    (`X_mask.png` or `X-masklabel.png` beside an image X) and pictures of types that aren't read.
    """
    return tuple(_named_files(settings, subsets(settings)).values())


def _named_files(settings: Dataset, folders: Sequence[Subset]) -> dict[str, Path]:
    """What `find` finds, by the names that draws depend on."""
    if settings.is_kohyas:
        return _files_of([one for one in folders if not one.is_reg])
    root = _root(settings)
    given = (settings.conditioning_data_dir, settings.reg_data_dir)
    others = {one.expanduser().resolve() for one in given if one is not None}
    files = _pictures((one for one in _walk(root) if others.isdisjoint(one.parents)), root)
    _warn_of_repeats(files)
    if not files:
        raise SettingsError(
            f"dataset.image_dir={settings.image_dir}: no images in it; give a folder that holds "
            "PNG, JPEG, WebP, BMP, GIF, TIFF or AVIF files"
        )
    named = {path.relative_to(root).as_posix(): path for path in files}
    return dict(sorted(named.items()))


def images_in(subset: Subset) -> list[Path]:
    """The image files in a kohya folder, but not in folders below it, sorted by name; as `find`."""
    visible = (path for path in entries(subset.image_dir) if not path.name.startswith("."))
    return _pictures(visible, subset.root)


def _files_of(folders: Sequence[Subset]) -> dict[str, Path]:
    files = {f"{one.name}/{path.name}": path for one in folders for path in images_in(one)}
    if folders and not files:
        raise SettingsError(
            f"{listed(str(one.image_dir) for one in folders)}: no images in it; give a folder that"
            " holds PNG, JPEG, WebP, BMP, GIF, TIFF or AVIF files"
        )
    return files


def _pictures(paths: Iterable[Path], root: Path) -> list[Path]:
    """Those of the files that are taken as images; of the others is warned."""
    files, links_out, unread = [], [], []
    for path in paths:
        is_folder = path.is_dir()  # a link to one: its images are found where they are
        if not is_folder and path.suffix.lower() in image_files.UNREAD_SUFFIXES:
            unread.append(path.relative_to(root).as_posix())
        if not is_folder and path.suffix.lower() not in image_files.SUFFIXES:
            continue
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
            links_out.append(path.relative_to(root).as_posix())
        elif not is_folder:
            files.append(path)
    if links_out:
        logger.warning(
            "dataset.image_dir: ignored %d links that lead out of the folder (%s); "
            "copy what they point to into it",
            len(links_out),
            listed(links_out),
        )
    masks = _masks([*files, *(root / name for name in unread)])
    files = [path for path in files if path not in masks]
    if masks:
        logger.warning(
            "dataset.image_dir: %d masks beside their images are not taken as pictures (%s); "
            "rename what is a picture",
            len(masks),
            listed(sorted(path.relative_to(root).as_posix() for path in masks)),
        )
    if unread:
        logger.warning(
            "dataset.image_dir: %d pictures of types that are not read are passed over (%s); "
            "convert them to PNG or JPEG",
            len(unread),
            listed(sorted(unread)),
        )
    return files


def _masks(paths: Sequence[Path]) -> set[Path]:
    """Those named as other trainers name the mask of the image beside them."""
    images = {path.with_suffix("") for path in paths}
    return {
        path
        for path in paths
        for end in ("-masklabel", "_mask")
        if path.suffix.lower() == ".png"
        and path.stem.endswith(end)
        and path.with_name(path.stem.removesuffix(end)) in images
    }


def _warn_of_repeats(files: Sequence[Path]) -> None:
    """kohya reads repeats and words from the names of the folders that images lie in."""
    named = {path.parent for path in files if _REPEATS.fullmatch(path.parent.name)}
    if named:
        logger.warning(
            "dataset.image_dir: repeats and words in folders' names, as kohya reads them, are not"
            " read here (%s): all images count alike; dataset=kohya reads them, with the captions"
            " in the folders; else set captions.*.repeats",
            listed(sorted(path.name for path in named)),
        )


def _root(settings: Dataset) -> Path:
    root = settings.image_dir.expanduser().resolve()
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "there is no such folder"
        remedy = "give the folder of your images"
        if root.suffix.lower() in CONFIGS:
            remedy += "; sd-scripts' dataset config takes dataset=kohya"
        raise SettingsError(f"dataset.image_dir={settings.image_dir}: {problem}; {remedy}")
    return root


def _walk(root: Path) -> Iterator[Path]:
    """Files, and links to folders, below `root`; nothing hidden."""

    def refuse(error: OSError) -> None:
        raise SettingsError(
            f"dataset.image_dir: cannot list {error.filename}: {error.strerror}; "
            "make it readable or move it out of the folder"
        )

    for parent, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if Path(parent, name).is_symlink()]
        yield from (Path(parent, name) for name in names + links if not name.startswith("."))


def _header_problem(path: Path, settings: Dataset) -> str | None:
    if not path.is_file():  # a broken link, or a pipe that would block the reader
        return "is not a file"
    try:
        width, height = image_files.header_size(path)
    except image_files.decode_errors() as error:
        return image_files.reason(error)
    if width * height > settings.max_pixels:
        return f"{width}x{height} is more than dataset.max_pixels={settings.max_pixels}"
    if min(width, height) < settings.min_size:
        return f"{width}x{height} has a side below dataset.min_size={settings.min_size}"
    return None


def _without_duplicates(files: Mapping[str, Path], settings: Dataset) -> dict[str, Path]:
    """One file of each content, the first by name; the others are reported.

    But for the same image in several of kohya's folders, where it has other captions.
    """
    by_size = defaultdict(list)  # only files of one size can be equal, so few need be hashed
    for name, path in files.items():
        by_size[path.stat().st_size].append(name)
    first: dict[str, str] = {}
    twins = {}
    for name in (name for names in by_size.values() if len(names) > 1 for name in names):
        digest = hashlib.sha256(files[name].read_bytes()).hexdigest()
        if first.setdefault(digest, name) != name:
            twins[name] = first[digest]
    told = {
        twin: name
        for twin, name in twins.items()
        if not settings.is_kohyas or PurePosixPath(twin).parent == PurePosixPath(name).parent
    }
    if told:
        logger.warning(
            "dataset.image_dir: %d duplicates are counted once: %s",
            len(told),
            listed([f"{twin} (equals {name})" for twin, name in told.items()]),
        )
    return {name: path for name, path in files.items() if name not in twins}


def _draw(
    files: Mapping[str, Path], seed: int, wanted: int | None = None
) -> tuple[list[ImageFile], dict[str, str]]:
    """Decode images in the order of the draw until there are enough; also say which failed."""
    drawn: list[ImageFile] = []
    bad = {}
    for name in sorted(files, key=lambda name: _draw_key(name, seed)):
        if len(drawn) == wanted:
            break
        try:
            drawn.append(_decode(files[name], name))
        except image_files.decode_errors() as error:
            bad[name] = image_files.reason(error)
    return drawn, bad


def _draw_key(name: str, seed: int) -> bytes:
    """A rank that other files don't change: one image more moves at most one out of the draw."""
    same_everywhere = unicodedata.normalize("NFC", name)  # macOS decomposes accents in names
    return hashlib.sha256(f"{seed}/{same_everywhere}".encode(errors="surrogateescape")).digest()


def _decode(path: Path, name: str) -> ImageFile:
    data = path.read_bytes()
    width, height = image_files.open_image(BytesIO(data)).size
    return ImageFile(path, name, hashlib.sha256(data).hexdigest(), width, height)


def _report_bad(bad: Mapping[str, str], settings: Dataset, num_usable: int) -> None:
    if not bad:
        return
    found = sorted(bad.items())
    lines = "".join(f"\n  {shown(name, 300)}: {shown(reason, 300)}" for name, reason in found)
    if not settings.skip_bad:
        raise BadImagesError(
            f"dataset.image_dir={settings.image_dir}: {len(bad)} bad images; "
            f"mend or remove them, or leave them out with dataset.skip_bad=true{lines}"
        )
    if not num_usable:
        raise BadImagesError(
            f"dataset.image_dir={settings.image_dir}: no usable images; give others{lines}"
        )
    logger.warning("dataset.skip_bad: left out %d bad images%s", len(bad), lines)


def _split(drawn: Sequence[ImageFile], settings: Dataset, num_usable: int) -> ImageSet:
    num_holdout = settings.num_holdout
    if settings.num_images == "all":
        num_holdout = min(num_holdout, max(len(drawn) // 5, 1), len(drawn) - 1)
    elif len(drawn) < settings.num_images + num_holdout:
        num_holdout = _fewer_holdout(len(drawn), settings.num_images, num_holdout)
        logger.warning(
            "dataset: %d usable images instead of num_images=%d + num_holdout=%d: "
            "%d to train on, %d held out",
            len(drawn),
            settings.num_images,
            settings.num_holdout,
            len(drawn) - num_holdout,
            num_holdout,
        )
    holdout = sorted(drawn[:num_holdout], key=lambda image: image.name)
    train = sorted(drawn[num_holdout:], key=lambda image: image.name)
    return ImageSet(tuple(train), tuple(holdout), num_usable)


def _fewer_holdout(num_drawn: int, num_images: int, num_holdout: int) -> int:
    """The same share as asked for, but at least one held out and first of all one to train on."""
    if num_holdout == 0:
        return 0
    share = num_holdout / (num_images + num_holdout)
    return min(max(round(num_drawn * share), 1), num_drawn - 1)
