"""Which bucket an image goes to: images of about one shape train together, as kohya's do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from lorasweep.core.settings import SettingsError
from lorasweep.data.dataset import Dataset

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


def check_size(base: HasSizes, size: Size) -> None:
    """Raise SettingsError unless the model can compute width and height exactly."""
    multiple = base.vae_scale_factor
    if any(side % multiple or side < base.size_multiple for side in size):
        raise SettingsError(
            f"dataset.resolution={list(size)}: this model needs multiples of {multiple}"
            f" of at least {base.size_multiple} pixels"
        )


def buckets(settings: Dataset) -> list[Size]:
    """The sizes images are sorted into: multiples of the step whose area fits (kohya's rule)."""
    width, height = settings.size
    area, step = width * height, settings.bucket_reso_steps
    square = math.isqrt(area) // step * step
    sizes = {(square, square)} if square >= step else set()
    for side in range(settings.min_bucket_reso, settings.max_bucket_reso + 1, step):
        other = min(settings.max_bucket_reso, area // side // step * step)
        if other >= settings.min_bucket_reso:
            sizes |= {(side, other), (other, side)}
    if not sizes:
        raise SettingsError(
            f"dataset.min_bucket_reso={settings.min_bucket_reso}: no bucket fits into"
            f" {width}x{height}; lower it or raise dataset.resolution"
        )
    return sorted(sizes)


def bucket_of(size: Size, settings: Dataset) -> Size:
    """The bucket that an image of `size` goes to. Raises SettingsError if it fits none."""
    if not settings.enable_bucket:
        return settings.size
    width, height = size
    if settings.bucket_no_upscale:
        area = settings.size[0] * settings.size[1]
        shrink = min(1.0, math.sqrt(area / (width * height)))
        step = settings.bucket_reso_steps
        # rounded as kohya does, or a side of 512 that comes out as 511.99 would fall to 448
        bucket = (round(width * shrink) // step * step, round(height * shrink) // step * step)
        if min(bucket) < step:
            raise SettingsError(
                f"an image of {width}x{height} is too small for dataset.bucket_reso_steps={step}"
                " with dataset.bucket_no_upscale=true; lower the steps or allow upscaling"
            )
        return bucket
    ratio = math.log(width / height)
    return min(buckets(settings), key=lambda b: (abs(math.log(b[0] / b[1]) - ratio), -b[0] * b[1]))


def fit(image: Image.Image, size: Size) -> Image.Image:
    """Scale the image to cover `size` and crop its centre."""
    from PIL import Image, ImageOps

    # area averaging loses no detail when shrinking; Lanczos is sharper when growing
    shrinks = image.width >= size[0] and image.height >= size[1]
    method = Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS
    return ImageOps.fit(image, size, method)
