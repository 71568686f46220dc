"""kohya's folders as they lie on the disk: `10_cat woman/`, or those of a dataset config.

sd-scripts calls each of them a subset. What a word means was read from its config_util.py and
train_util.py of February 2026.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lorasweep.core.foreign_files import ForeignFileError, read_json, read_toml
from lorasweep.core.settings import SettingsError, build_class, unknown_key
from lorasweep.core.text import listed, shown
from lorasweep.core.trainer_words import WHY_NOT
from lorasweep.data.subset_settings import SUBSET_KEYS, SubsetSettings

logger = logging.getLogger("lorasweep.data.dataset")  # whose lines are said once a command

MAX_REPEATS = 10_000  # of a folder; more is a typing error, and would make an epoch without end
_MAX_SUBSETS = 1000
CONFIGS = (".toml", ".json")

DATASET_KEYS = {
    **{
        key: f"dataset.{key}"
        for key in (
            *("resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso"),
            *("bucket_reso_steps", "bucket_no_upscale"),
        )
    },
    "batch_size": "trainer.batch_size",
}
"""What a dataset config says of a whole data set -> our setting, which must say the same."""
_FOLDER_KEYS = (
    *("image_dir", "num_repeats", "class_tokens", "is_reg", "caption_extension"),
    "conditioning_data_dir",
)
_OF_ONE_FOLDER = ("image_dir", "is_reg", "alpha_mask", "conditioning_data_dir")
"""What sd-scripts takes of a subset's own table alone."""
_WITHOUT_EFFECT = ("cache_info", "validation_seed", "debug_dataset")
_ONLY_OFF: Mapping[str, tuple[object, str]] = {
    "color_aug": (False, WHY_NOT["color_aug"]),
    "random_crop": (False, WHY_NOT["random_crop"]),
    "face_crop_aug_range": (None, WHY_NOT["face_crop_aug_range"]),
    "resize_interpolation": (None, "images are scaled in one way"),
    "custom_attributes": ({}, "nothing here reads them"),
    "network_multiplier": (1.0, "a LoRA is trained at its full strength"),
}
"""What has no counterpart here -> its value for off, and why it must be off."""


class NamesFolders(Protocol):
    """The settings of a data set, as far as they name kohya's folders."""

    @property
    def is_kohyas(self) -> bool:
        """Does `image_dir` hold kohya's folders, or is it a dataset config?"""

    @property
    def image_dir(self) -> Path:
        """Where the images are."""

    @property
    def reg_data_dir(self) -> Path | None:
        """What holds kohya's folders of regularisation images."""

    @property
    def conditioning_data_dir(self) -> Path | None:
        """Where the masks are, where a dataset config doesn't say it."""

    @property
    def caption_extension(self) -> str:
        """Of the caption files, where a dataset config doesn't say it."""

    def own(self) -> dict[str, Any]:
        """What a folder has where nothing of its own is said, as SubsetSettings."""


@dataclass(frozen=True, kw_only=True)
class Subset:
    """One folder of images with their captions, and how it is read."""

    name: str
    """Of its arm: no other subset's, and fit for a folder's name."""
    image_dir: Path
    root: Path
    """Links in the folder may lead anywhere in here."""
    num_repeats: int
    class_tokens: str
    """The caption of an image without a caption file."""
    is_reg: bool
    caption_extension: str
    conditioning_data_dir: Path | None
    """Of its masks."""
    settings: SubsetSettings

    def about(self) -> str:
        """All that decides its captions besides its files; as JSON."""
        about = {"kohya_folder": self.class_tokens, "is_reg": self.is_reg, **self.settings.own()}
        return json.dumps(about, sort_keys=True)


def subsets(dataset: NamesFolders, *, warn: bool = False) -> list[Subset]:
    """The folders that a data set names: its own, where it is kohya's, and regularisation images.

    It is asked for often, and one who asks is to `warn` of what is not read.
    Raises SettingsError for a folder that isn't there, or a dataset config that can't be followed.
    """
    found: list[Subset] = []
    if dataset.is_kohyas:
        path = dataset.image_dir.expanduser().resolve()
        is_config = path.suffix.lower() in CONFIGS and not path.is_dir()
        found += (
            _of_config(path, dataset, warn=warn)
            if is_config
            else _of_folders(path, dataset, "image_dir", warn=warn)
        )
    if dataset.reg_data_dir is not None:
        path = dataset.reg_data_dir.expanduser().resolve()
        of_reg = _of_folders(path, dataset, "reg_data_dir", warn=warn)
        found += [replace(one, is_reg=True) for one in of_reg]
    if dataset.is_kohyas and all(one.is_reg for one in found):
        raise SettingsError(
            f"dataset.image_dir={dataset.image_dir}: all folders hold regularisation images; give"
            " one to train on"
        )
    return list(_named(found, warn=warn))


def entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted by name. Raises SettingsError for one that can't be listed."""
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise SettingsError(
            f"cannot list {shown(str(folder), 300)}: {error.strerror}; make it readable"
        ) from None


def dataset_level(dataset: NamesFolders) -> dict[str, Any]:
    """What a dataset config says of the data set as a whole, by our settings."""
    path = dataset.image_dir.expanduser()
    if not dataset.is_kohyas or path.suffix.lower() not in CONFIGS or path.is_dir():
        return {}
    general, (table,) = _tables(path)
    said = {**general, **table}
    return {setting: said[key] for key, setting in DATASET_KEYS.items() if key in said}


def _of_folders(root: Path, dataset: NamesFolders, key: str, *, warn: bool) -> Iterator[Subset]:
    """The folders of `root` whose names begin with their repeats, sorted by name."""
    where = f"dataset.{key}={getattr(dataset, key)}"
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "there is no such folder"
        raise SettingsError(f"{where}: {problem}; give the folder that holds folders like 10_name")
    ignored, links_out, number = [], [], 0
    for folder in entries(root):
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        first, _, tokens = folder.name.partition("_")
        if not re.fullmatch(r"0*[1-9]\d*", first):
            ignored.append(folder.name)
            continue
        if not folder.resolve().is_relative_to(root):
            links_out.append(folder.name)
            continue
        number += 1
        table = {"image_dir": str(folder), "num_repeats": int(first[:9]), "class_tokens": tokens}
        yield _subset(table, dataset, str(folder), root)
    if links_out and warn:
        logger.warning("%s: links that lead out of it are not read: %s", where, listed(links_out))
    if ignored and warn:
        logger.warning("%s: folders without repeats are not read: %s", where, listed(ignored))
    if not number:
        raise SettingsError(
            f"{where}: no folder in it is named like 10_name; give the folder that holds such"
            " folders, or a dataset config (.toml, .json)"
        )


def _of_config(path: Path, dataset: NamesFolders, *, warn: bool) -> Iterator[Subset]:
    general, (table,) = _tables(path)
    of_subsets = table["subsets"]
    shared = {**general, **{key: value for key, value in table.items() if key != "subsets"}}
    if shared.get("validation_split") and warn:
        logger.warning(
            "%s: validation_split has no effect: dataset.num_holdout says how many images are held"
            " out",
            path,
        )
    for number, of_subset in enumerate(of_subsets, start=1):
        where = f"{path.name}: subset {number}"
        if "image_dir" not in of_subset:
            raise SettingsError(f"{where}: image_dir is missing: give the folder of its images")
        values = {**shared, **of_subset}
        for key, (off, why) in _ONLY_OFF.items():
            if values.get(key, off) != off:
                said = shown(str(values[key]))
                raise SettingsError(f"{where}: {key}={said} can't be: {why}; take it out")
        folder = Path(str(values["image_dir"])).expanduser().resolve()
        if not folder.is_dir():
            raise SettingsError(
                f"{where}: image_dir={folder}: there is no such folder; relative paths begin where"
                " the command is started, as kohya's do"
            )
        if values.get("num_repeats", 1) == 0:  # kohya leaves it out
            continue
        yield _subset(values, dataset, where, folder)


def _subset(values: Mapping[str, Any], dataset: NamesFolders, where: str, root: Path) -> Subset:
    own = {key: values[key] for key in SUBSET_KEYS if values.get(key) is not None}
    table = build_class(
        _Table, {key: values[key] for key in _FOLDER_KEYS if values.get(key) is not None}, where
    )
    if not 1 <= table.num_repeats <= MAX_REPEATS:
        raise SettingsError(f"{where}: repeats are 1 to {MAX_REPEATS}; rename or mend it")
    extension = table.caption_extension or dataset.caption_extension
    extension = extension if extension.startswith(".") else f".{extension}"
    if set(extension) & set("/\\\0"):
        raise SettingsError(f"{where}: caption_extension={extension}: must be as .txt")
    return Subset(
        name="",
        image_dir=Path(table.image_dir).expanduser().resolve(),
        root=root,
        num_repeats=table.num_repeats,
        class_tokens=table.class_tokens or "",
        is_reg=table.is_reg,
        caption_extension=extension,
        conditioning_data_dir=(
            dataset.conditioning_data_dir
            if table.conditioning_data_dir is None
            else Path(table.conditioning_data_dir)
        ),
        settings=build_class(SubsetSettings, {**dataset.own(), **own}, where),
    )


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A subset's table, as far as it isn't SubsetSettings."""

    image_dir: str
    num_repeats: int = 1
    class_tokens: str | None = None
    is_reg: bool = False
    caption_extension: str | None = None
    conditioning_data_dir: str | None = None


def _tables(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The tables `general` and `datasets` of a dataset config, whose keys are all known."""
    try:
        config = read_json(path) if path.suffix.lower() == ".json" else read_toml(path)
    except OSError as error:
        raise SettingsError(
            f"dataset.image_dir={path}: {error.strerror}; give a folder that holds folders like"
            " 10_name, or a dataset config"
        ) from None
    except ForeignFileError as error:
        raise SettingsError(f"{shown(str(error), 400)}; mend it") from None
    general, datasets = config.pop("general", {}), config.pop("datasets", [])
    if config:
        _refuse(path.name, next(iter(config)), ("general", "datasets"))
    _check_table(general, f"{path.name}: general", ())
    if not isinstance(datasets, list) or len(datasets) != 1:
        raise SettingsError(
            f"{path.name}: [[datasets]] must be there once: a run trains on one; put the subsets"
            " of several into one, or train on one after the other"
        )
    (table,) = datasets
    _check_table(table, f"{path.name}: datasets", ("subsets",))
    found = table.get("subsets")
    if not isinstance(found, list) or not 1 <= len(found) <= _MAX_SUBSETS:
        raise SettingsError(f"{path.name}: [[datasets.subsets]] is missing: give a folder in each")
    for number, subset in enumerate(found, start=1):
        _check_table(subset, f"{path.name}: subset {number}", _OF_ONE_FOLDER)
    masked = ["conditioning_data_dir" in subset for subset in found]
    odd = [key for subset in found for key in ("is_reg", "alpha_mask") if key in subset]
    if any(masked) and (not all(masked) or odd):
        raise SettingsError(
            f"{path.name}: conditioning_data_dir must be in all subsets, without is_reg and"
            " alpha_mask in any, as with sd-scripts"
        )
    return general, datasets


def _check_table(table: object, where: str, also: Sequence[str]) -> None:
    """Raise SettingsError for a key that nothing here follows."""
    if not isinstance(table, dict):
        raise SettingsError(f"{where}: must be a table of settings")
    if "metadata_file" in table:
        raise SettingsError(
            f"{where}: metadata_file is not read here: put its captions beside the images, as .txt"
        )
    known = {*SUBSET_KEYS, *_FOLDER_KEYS, *DATASET_KEYS, *_ONLY_OFF, *_WITHOUT_EFFECT}
    known = (known - set(_OF_ONE_FOLDER)) | {"validation_split", *also}
    for key in table:
        if key not in known:
            _refuse(where, str(key), known)


def _refuse(where: str, key: str, known: Sequence[str] | set[str]) -> None:
    raise SettingsError(f"{where}: {unknown_key(shown(key), sorted(known))}")


def _named(found: Sequence[Subset], *, warn: bool) -> Iterator[Subset]:
    """The subsets with a name each, after their folders; a folder counts once, as with kohya."""
    taken: set[str] = set()
    folders: set[Path] = set()
    for one in found:
        if one.image_dir in folders:
            if warn:
                logger.warning("%s is given twice: the first counts", one.image_dir)
            continue
        folders.add(one.image_dir)
        plain = re.sub(r"^\d+_", "", one.image_dir.name)
        plain = re.sub(r"[^\w-]+", "_", plain).strip("_-")[:60] or "images"
        name, number = plain, 1
        while name.casefold() in taken:
            number += 1
            name = f"{plain}-{number}"
        taken.add(name.casefold())
        yield replace(one, name=name)
