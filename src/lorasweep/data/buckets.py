"""Which bucket an image goes to: images of about one shape train together, as kohya's do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from lorasweep.core.settings import SettingsError
from lorasweep.data.dataset import Dataset
from lorasweep.models.conditioning import SizeAndCrop

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]
"""Width and height in pixels."""


class HasSizes(Protocol):
    """A loaded model, or what its configs say of it."""

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a side of one latent."""

    @property
    def size_multiple(self) -> int:
        """Pixels that a side has at least."""


def check_size(base: HasSizes, size: Size, key: str = "dataset.resolution") -> None:
    """Raise SettingsError, naming the nearest good size, unless the model computes this one."""
    multiple, least = base.vae_scale_factor, base.size_multiple
    good = [max(least, round(side / multiple) * multiple) for side in size]
    if good != list(size):
        raise SettingsError(
            f"{key}={list(size)}: this model needs multiples of {multiple} of at least {least}"
            f" pixels; the nearest is {good}"
        )


def buckets(settings: Dataset) -> list[Size]:
    """The sizes images are sorted into: multiples of the step whose area fits (kohya's rule).

    As kohya's, the least side is rounded down to the step and the greatest one up.
    """
    width, height = settings.size
    area, step = width * height, settings.bucket_reso_steps
    least = settings.min_bucket_reso // step * step
    greatest = -(-settings.max_bucket_reso // step) * step
    square = math.isqrt(area) // step * step
    sizes = {(square, square)} if square >= step else set()
    for side in range(max(least, step), greatest + 1, step):
        other = min(greatest, area // side // step * step)
        if other >= max(least, step):
            sizes |= {(side, other), (other, side)}
    if not sizes:
        raise SettingsError(
            f"dataset.min_bucket_reso={settings.min_bucket_reso}: no bucket fits into"
            f" {width}x{height}; lower it or raise dataset.resolution"
        )
    return sorted(sizes)


def bucket_of(size: Size, settings: Dataset) -> Size:
    """The bucket that an image of `size` goes to: sd-scripts' `BucketManager.select_bucket`.

    Raises SettingsError if it fits none.
    """
    if not settings.enable_bucket:
        return settings.size
    if settings.bucket_no_upscale:
        return _cut_to_steps(size, settings)
    known, ratio = buckets(settings), size[0] / size[1]
    # ratios, not their logarithms: a tall image's nearest bucket is another by those
    return size if size in known else min(known, key=lambda b: abs(b[0] / b[1] - ratio))


def is_scaled(size: Size, settings: Dataset) -> bool:
    """Is an image of `size` scaled to its bucket, or has it its size and is only cropped?"""
    return not settings.bucket_no_upscale or size[0] * size[1] > math.prod(settings.size)


def size_and_crop(original: Size, bucket: Size, *, flipped: bool) -> SizeAndCrop:
    """What a base is told of an image that was fitted to its bucket.

    Crop's left and top are sd-scripts' (`BucketManager.get_crop_ltrb`, after Stability AI's
    preprocessing): of the image as fitted *into* the bucket, whichever part of it is trained on.
    """
    ratio = original[0] / original[1]
    if bucket[0] / bucket[1] > ratio:
        width, height = bucket[1] * ratio, float(bucket[1])
    else:
        width, height = float(bucket[0]), bucket[0] / ratio
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    if flipped:
        left = bucket[0] - (left + width)
    return SizeAndCrop(original, (int(left), int(top)), bucket)


def _cut_to_steps(size: Size, settings: Dataset) -> Size:
    """The image's own size, shrunk where its area is too large, less what is over the steps."""
    (width, height), step = size, settings.bucket_reso_steps
    if is_scaled(size, settings):
        ratio = width / height
        # one side becomes a multiple of the step: the one that keeps the ratio better
        ideal = math.sqrt(math.prod(settings.size) * ratio)
        by_width, by_height = _down(ideal, step), _down(math.prod(settings.size) / ideal, step)
        other_height, other_width = _down(by_width / ratio, step), _down(by_height * ratio, step)
        if min(by_width, by_height, other_width, other_height) < step:
            raise _too_small(size, step)
        if abs(by_width / other_height - ratio) < abs(other_width / by_height - ratio):
            return by_width, other_height
        return other_width, by_height
    if min(size) < step:
        raise _too_small(size, step)
    return _down(width, step), _down(height, step)


def _down(side: float, step: int) -> int:
    return int(side + 0.5) // step * step


def _too_small(size: Size, step: int) -> SettingsError:
    return SettingsError(
        f"an image of {size[0]}x{size[1]} is too small for dataset.bucket_reso_steps={step}"
        " with dataset.bucket_no_upscale=true; lower the steps or allow upscaling"
    )


def fit(image: Image.Image, size: Size, *, scale: bool = True) -> Image.Image:
    """Scale the image to cover `size`, unless `scale` is false, and crop its centre."""
    from PIL import Image, ImageOps

    if not scale:
        left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
        return image.crop((left, top, left + size[0], top + size[1]))

    # area averaging loses no detail when shrinking; Lanczos is sharper when growing
    shrinks = image.width >= size[0] and image.height >= size[1]
    method = Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS
    return ImageOps.fit(image, size, method)
