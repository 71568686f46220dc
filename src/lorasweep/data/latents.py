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
from lorasweep.data.buckets import Size, bucket_of, check_size, fit, is_scaled, size_and_crop
from lorasweep.data.caption_variants import settled_caption
from lorasweep.data.dataset import Dataset
from lorasweep.data.image_files import open_image, open_with_alpha
from lorasweep.data.kohya_folders import Arm, CaptionedImage
from lorasweep.data.masks import mask_latents, open_mask
from lorasweep.data.subset_settings import SubsetSettings
from lorasweep.models.base_model import BaseModel
from lorasweep.models.conditioning import SizeAndCrop

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

log = logging.getLogger(__name__)

_Encoded = tuple[Size, "Tensor", "Tensor | None", "Tensor | None", Size]
"""A bucket, an image's latents, those of its mirrored form, its mask and its own size."""


@dataclass(frozen=True)
class Item:
    """One image of one arm, ready to train on."""

    path: Path
    arm: str
    caption: str
    """As its file has it."""
    repeats: int
    bucket: Size
    latents: Tensor  # (C, h, w)
    flipped: Tensor | None  # likewise, of the mirrored image
    settings: SubsetSettings
    mask: Tensor | None = None  # (h, w), from 0 where the loss doesn't count to 1
    original_size: Size | None = None  # before it was fitted to its bucket; None: it was not
    is_reg: bool = False

    @property
    def prompt(self) -> str:
        """The caption with what the settings add, where nothing is drawn by chance."""
        return settled_caption(self.caption, self.settings)

    def latents_of(self, *, mirrored: bool) -> Tensor:
        """The latents (C, h, w), of the mirrored image where there are any of it."""
        return self.flipped if mirrored and self.flipped is not None else self.latents

    def size_and_crop(self, *, flipped: bool = False) -> SizeAndCrop:
        """What a base is told of the image, or of its mirrored form."""
        return size_and_crop(self.original_size or self.bucket, self.bucket, flipped=flipped)


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
    by_content: dict[tuple[object, ...], _Encoded] = {}
    items = []
    for arm in arms:
        own = (of_arms or {}).get(arm.name, settings)
        for image in arm.items:
            digest = hashlib.sha256(image.path.read_bytes()).hexdigest()
            key = digest, own.flip_aug, own.alpha_mask, image.mask
            if key not in by_content:
                by_content[key] = _encoded(base, image, digest, settings, own, cache_dir)
            bucket, latents, flipped, mask, size = by_content[key]
            named = (image.path, arm.name, image.caption, arm.repeats)
            items.append(Item(*named, bucket, latents, flipped, own, mask, size))
    return items


def masks_of(items: Sequence[Item], mirrored: Sequence[bool]) -> Tensor | None:
    """The masks (N, 1, h, w) of items of one bucket, mirrored as they are; None where none has any.

    An item without one counts everywhere.
    """
    import torch

    if all(item.mask is None for item in items):
        return None
    found = [torch.ones_like(item.latents[0]) if item.mask is None else item.mask for item in items]
    turned = [mask.flip(-1) if m else mask for mask, m in zip(found, mirrored, strict=True)]
    return torch.stack(turned)[:, None]


def pixels(image: Image.Image) -> Tensor:
    """(3, H, W) in -1..1."""
    import numpy as np
    import torch

    values = torch.from_numpy(np.array(image, dtype=np.float32))
    return values.permute(2, 0, 1) / 127.5 - 1


def _encoded(
    base: BaseModel,
    captioned: CaptionedImage,
    digest: str,
    settings: Dataset,
    own: SubsetSettings,
    cache_dir: Path,
) -> _Encoded:
    path = captioned.path
    image, mask = _opened(captioned, own)
    try:
        bucket = bucket_of(image.size, settings)
        check_size(base, bucket, "its bucket")
    except SettingsError as error:
        raise SettingsError(f"{path.name}: {error}") from None
    folder, scale = cache_dir / "latents", is_scaled(image.size, settings)
    fitted = fit(image, bucket, scale=scale)
    # what is only cropped, or not laid on white, has entries of its own
    identity = ("checked", digest, base.vae_identity, bucket) + (() if scale else ("cropped",))
    identity += ("alpha",) if own.alpha_mask and captioned.mask is None else ()
    latents = _cached(base, fitted, identity, folder, flip=False)
    flipped = _cached(base, fitted, identity, folder, flip=True) if own.flip_aug else None
    of_latents = None
    if mask is not None:
        size = (latents.shape[-2], latents.shape[-1])
        of_latents = mask_latents(fit(mask, bucket, scale=scale), size).to(latents.device)
    return bucket, latents, flipped, of_latents, image.size


def _opened(
    captioned: CaptionedImage, own: SubsetSettings
) -> tuple[Image.Image, Image.Image | None]:
    """An image and its mask: a file's, or else its alpha, which then makes nothing white."""
    if captioned.mask is not None:
        return open_image(captioned.path), open_mask(captioned.mask)
    if own.alpha_mask:
        return open_with_alpha(captioned.path)
    return open_image(captioned.path), None


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
