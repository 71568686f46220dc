"""Masks of images: where it is white, an image's loss counts, and where it is black, it doesn't."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from lorasweep.core.settings import SettingsError
from lorasweep.core.text import shown
from lorasweep.data import image_files
from lorasweep.data.dataset import Dataset, ImageFile, ImageSet
from lorasweep.data.subsets import entries, subsets

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def mask_files(dataset: Dataset, images: ImageSet) -> dict[str, bytes]:
    """The mask file of each image that has one to have, by the image's name.

    It has the image's file name, with any image's extension, in `conditioning_data_dir` or a
    folder there that is named as the image's. Raises SettingsError for one that is missing, can't
    be read or has another size.
    """
    folders = {one.name: one.conditioning_data_dir for one in subsets(dataset)}
    found: dict[str, bytes] = {}
    bad: dict[str, str] = {}
    known: dict[Path, dict[str, Path]] = {}
    for image in images.images:
        arm = image.name.partition("/")[0]
        folder = folders.get(arm) if dataset.is_kohyas else dataset.conditioning_data_dir
        if folder is None:
            continue
        path = _mask_of(image, folder.expanduser(), known)
        if path is None:
            bad[image.name] = f"no mask in {folder}"
            continue
        try:
            data = path.read_bytes()
            size = open_mask(BytesIO(data)).size
        except image_files.decode_errors() as error:
            bad[image.name] = f"its mask {image_files.reason(error)}"
            continue
        if size != (image.width, image.height):
            bad[image.name] = f"its mask has {size[0]}x{size[1]}, not {image.width}x{image.height}"
        found[image.name] = data
    if bad:
        lines = "".join(f"\n  {shown(name, 300)}: {shown(why, 300)}" for name, why in bad.items())
        raise SettingsError(
            f"dataset.conditioning_data_dir: {len(bad)} images without a good mask; put one of the"
            f" same name and size there for each, white where the image counts{lines}"
        )
    return found


def open_mask(source: Path | BytesIO) -> Image.Image:
    """8-bit grey: the red channel of an image, as sd-scripts takes it."""
    return image_files.open_image(source).getchannel("R")


def mask_latents(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """A mask of an image as its latents need it: (h, w) in 0..1, each the mean of its area."""
    import numpy as np
    import torch

    values = torch.from_numpy(np.array(mask, dtype=np.float32))[None, None] / 255
    return torch.nn.functional.interpolate(values, size=size, mode="area")[0, 0]


def _mask_of(image: ImageFile, folder: Path, known: dict[Path, dict[str, Path]]) -> Path | None:
    name = PurePosixPath(image.name)
    for place in (folder / name.parent, folder / image.path.parent.name, folder):
        if place not in known:
            known[place] = {path.stem: path for path in _image_files(place)}
        if (path := known[place].get(name.stem)) is not None:
            inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
            return path if inside else None
    return None


def _image_files(folder: Path) -> list[Path]:
    """Sorted so that of one stem the first name stays."""
    if not folder.is_dir():
        return []
    found = reversed(entries(folder))
    return [one for one in found if one.suffix.lower() in image_files.SUFFIXES and one.is_file()]
