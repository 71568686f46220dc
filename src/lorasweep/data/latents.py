"""Latents of images: each fitted to its bucket, encoded once, cached by content."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.settings import SettingsError
from lorasweep.data.buckets import Size, bucket_of, check_size, fit
from lorasweep.data.dataset import Dataset
from lorasweep.data.image_files import open_image
from lorasweep.data.kohya_folders import Arm
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


def encode(base: BaseModel, arms: Sequence[Arm], settings: Dataset, cache_dir: Path) -> list[Item]:
    """Every image of every arm with its latents; equal images are encoded once.

    Raises SettingsError for a resolution that the model can't take, or an image too small for a
    bucket.
    """
    check_size(base, settings.size)
    encoder = _Encoder(base, settings, cache_dir)
    return [
        Item(
            path=image.path,
            arm=arm.name,
            caption=image.caption,
            repeats=arm.repeats,
            bucket=encoder.bucket(image.path),
            latents=encoder.latents(image.path, flip=False),
            flipped=encoder.latents(image.path, flip=True) if settings.flip_aug else None,
        )
        for arm in arms
        for image in arm.items
    ]


def pixels(image: Image.Image) -> Tensor:
    """(3, H, W) in -1..1."""
    import numpy as np
    import torch

    values = torch.from_numpy(np.array(image, dtype=np.float32))
    return values.permute(2, 0, 1) / 127.5 - 1


class _Encoder:
    """Encodes images, keeping what was done in memory and on disk."""

    def __init__(self, base: BaseModel, settings: Dataset, cache_dir: Path) -> None:
        self.base = base
        self.settings = settings
        self.folder = cache_dir / "latents"
        self._digests: dict[Path, str] = {}
        self._buckets: dict[str, Size] = {}
        self._latents: dict[tuple[str, bool], Tensor] = {}

    def bucket(self, path: Path) -> Size:
        digest = self._digest(path)
        if digest not in self._buckets:
            try:
                self._buckets[digest] = bucket_of(open_image(path).size, self.settings)
            except SettingsError as error:
                raise SettingsError(f"{path.name}: {error}") from None
            check_size(self.base, self._buckets[digest])
        return self._buckets[digest]

    def latents(self, path: Path, *, flip: bool) -> Tensor:
        key = (self._digest(path), flip)
        if key not in self._latents:
            self._latents[key] = self._cached(path, flip)
        return self._latents[key]

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._digests[path]

    def _cached(self, path: Path, flip: bool) -> Tensor:
        bucket = self.bucket(path)
        depends = repr(("checked", self._digest(path), self.base.vae_identity, bucket, flip))
        key = hashlib.sha256(depends.encode()).hexdigest()
        file = self.folder / f"{key}.safetensors"
        if file.exists():
            found = _unpacked(file.read_bytes(), key)
            if found is not None:
                return found.to(self.base.device)
            log.warning("%s is torn and is made again", file)
        latents = self._encode(path, bucket, flip)
        write_atomically(file, _packed(latents, key))
        return latents

    def _encode(self, path: Path, bucket: Size, flip: bool) -> Tensor:
        from PIL import ImageOps

        image = fit(open_image(path), bucket)
        if flip:
            image = ImageOps.mirror(image)
        return self.base.encode_images(pixels(image)[None])[0]


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
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    except (SafetensorError, KeyError, ValueError):
        return None
    return latents if metadata.get("check") == _checksum(latents, key) else None


def _checksum(latents: Tensor, key: str) -> str:
    return hashlib.sha256(key.encode() + latents.numpy().tobytes()).hexdigest()
