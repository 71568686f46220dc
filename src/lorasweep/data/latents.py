"""Latents of images: each fitted to its bucket, encoded once, cached by content."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.foreign_files import ForeignFileError, parse_json
from lorasweep.core.settings import SettingsError
from lorasweep.data.buckets import Size, bucket_of, check_size, fit, is_scaled
from lorasweep.data.dataset import Dataset
from lorasweep.data.image_files import open_image
from lorasweep.data.kohya_folders import Arm
from lorasweep.data.subset_settings import SubsetSettings
from lorasweep.models.base_model import BaseModel

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One image of one arm, ready to train on."""

    path: Path
    arm: str
    caption: str
    repeats: int
    bucket: Size
    latents: Tensor  # (C, h, w)
    flipped: Tensor | None  # likewise, of the mirrored image
    settings: SubsetSettings


def encode(
    base: BaseModel,
    arms: Sequence[Arm],
    settings: Dataset,
    cache_dir: Path,
    of_arms: Mapping[str, SubsetSettings] | None = None,
) -> list[Item]:
    """Every image of every arm with its latents; equal images are encoded once.

    An arm that `of_arms` doesn't name is read as the data set's settings say.

    Raises SettingsError for a resolution that the model can't take, or an image too small for a
    bucket.
    """
    if not settings.enable_bucket:
        check_size(base, settings.size)
    by_content: dict[tuple[str, bool], tuple[Size, Tensor, Tensor | None]] = {}
    items = []
    for arm in arms:
        own = (of_arms or {}).get(arm.name, settings)
        for image in arm.items:
            digest = hashlib.sha256(image.path.read_bytes()).hexdigest()
            key = digest, own.flip_aug
            if key not in by_content:
                by_content[key] = _encoded(
                    base, image.path, digest, settings, cache_dir, flip=own.flip_aug
                )
            encoded = by_content[key]
            items.append(Item(image.path, arm.name, image.caption, arm.repeats, *encoded, own))
    return items


def pixels(image: Image.Image) -> Tensor:
    """(3, H, W) in -1..1."""
    import numpy as np
    import torch

    values = torch.from_numpy(np.array(image, dtype=np.float32))
    return values.permute(2, 0, 1) / 127.5 - 1


def _encoded(
    base: BaseModel, path: Path, digest: str, settings: Dataset, cache_dir: Path, *, flip: bool
) -> tuple[Size, Tensor, Tensor | None]:
    """An image's bucket, latents, and latents of its mirrored form if those are trained on."""
    image = open_image(path)
    try:
        bucket = bucket_of(image.size, settings)
        check_size(base, bucket, "its bucket")
    except SettingsError as error:
        raise SettingsError(f"{path.name}: {error}") from None
    folder, scale = cache_dir / "latents", is_scaled(image.size, settings)
    fitted = fit(image, bucket, scale=scale)
    # what is only cropped has entries of its own
    identity = ("checked", digest, base.vae_identity, bucket) + (() if scale else ("cropped",))
    latents = _cached(base, fitted, identity, folder, flip=False)
    if not flip:
        return bucket, latents, None
    return bucket, latents, _cached(base, fitted, identity, folder, flip=True)


def _cached(
    base: BaseModel, fitted: Image.Image, identity: tuple[object, ...], folder: Path, *, flip: bool
) -> Tensor:
    """The latents from the cache's file, which is made where it isn't there or is torn."""
    from PIL import ImageOps

    key = hashlib.sha256(repr((*identity, flip)).encode()).hexdigest()
    file = folder / f"{key}.safetensors"
    if file.exists():
        found = _unpacked(file.read_bytes(), key)
        if found is not None:
            return found.to(base.device)
        log.warning("%s is torn and is made again", file)
    pixel_values = pixels(ImageOps.mirror(fitted) if flip else fitted)
    latents = base.encode_images(pixel_values[None])[0]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, _packed(latents, key))
    return latents


def _packed(latents: Tensor, key: str) -> bytes:
    """A cache file's content, with a checksum: some disks leave zeros where a write was lost."""
    from safetensors.torch import save

    kept = latents.cpu().contiguous()
    return save({"latents": kept}, {"check": _checksum(kept, key)})


def _unpacked(content: bytes, key: str) -> Tensor | None:
    """The latents, or None of a torn or changed file, or one of another key."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        latents = load(content)["latents"]
        size = int.from_bytes(content[:8], "little")
        metadata = parse_json(content[8 : 8 + size], key).get("__metadata__")
    except (SafetensorError, KeyError, ForeignFileError):
        return None
    check = metadata.get("check") if isinstance(metadata, dict) else None
    return latents if check == _checksum(latents, key) else None


def _checksum(latents: Tensor, key: str) -> str:
    return hashlib.sha256(key.encode() + latents.numpy().tobytes()).hexdigest()
