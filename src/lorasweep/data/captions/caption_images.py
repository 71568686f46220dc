"""Captioners: what makes a caption for each image, one file a captioner.

A new one is a frozen dataclass of settings that follows `Captioner`, and a YAML in conf/captions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, ClassVar, Protocol

from pydantic import Field

from lorasweep.core.settings import SettingsError
from lorasweep.data.captions.caption_cache import CaptionCache
from lorasweep.data.dataset import ImageFile
from lorasweep.data.subsets import MAX_REPEATS

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
"""auto (CUDA where there is one), cpu, cuda, or one of several: cuda:1."""
Repeats = Annotated[int, Field(gt=0, le=MAX_REPEATS)]
"""How often an epoch shows each image of an arm."""


class CaptionerError(ValueError):
    """What the user must mend in a captioner's settings.

    The message begins with the field's name; `caption_images` puts the arm's key before it.
    """


class Captioner(Protocol):
    """Makes the captions of one arm."""

    cached: ClassVar[bool]
    """Is a caption costly enough to be kept?"""

    @property
    def repeats(self) -> int:
        """How often an epoch shows each image with this caption."""

    def identity(self) -> str:
        """What decides the captions besides the image: model, revision or hash, settings."""

    def caption(self, images: Sequence[ImageFile]) -> Iterator[list[str]]:
        """Captions in the images' order, yielded batch by batch as they are made."""


def caption_images(
    captioner: Captioner, images: Sequence[ImageFile], cache_dir: Path, *, arm: str
) -> list[str]:
    """One caption for each image, made only where the cache below `cache_dir` has none.

    Processes that caption with the same model and settings take turns, so none of them makes
    what another has made. Raises SettingsError in one line that begins with `captions.{arm}`.
    """
    try:
        if not captioner.cached:
            return list(chain.from_iterable(captioner.caption(images)))
        return _caption_cached(captioner, images, cache_dir, arm)
    except CaptionerError as error:
        raise SettingsError(f"captions.{arm}.{error}") from None


def are_tags(captioner: Captioner) -> bool:
    """May the parts of the captions between commas be shuffled and dropped? Sentences' may not.

    The captioner's `tags` says it; of one that has none they may, as kohya does with all.
    """
    return bool(getattr(captioner, "tags", True))


def identity(captioner: Captioner, *, arm: str) -> str:
    """What decides an arm's captions besides the images, its model found or downloaded.

    Raises SettingsError in one line that begins with `captions.{arm}`.
    """
    try:
        return captioner.identity()
    except CaptionerError as error:
        raise SettingsError(f"captions.{arm}.{error}") from None


def in_batches(images: Sequence[ImageFile], size: int) -> Iterator[Sequence[ImageFile]]:
    """Consecutive runs of at most `size` images."""
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _caption_cached(
    captioner: Captioner, images: Sequence[ImageFile], cache_dir: Path, arm: str
) -> list[str]:
    cache = CaptionCache(cache_dir / "captions", captioner.identity())
    captions = cache.find(images)
    if len(captions) < len({image.sha256 for image in images}):
        with cache.lock(f"captions.{arm}"):
            captions = cache.find(images)  # another process may have made them meanwhile
            missing = {image.sha256: image for image in images if image.sha256 not in captions}
            for image, text in _captioned(captioner, list(missing.values()), arm):
                cache.put(image, text)
                captions[image.sha256] = text
    return [captions[image.sha256] for image in images]


def _captioned(
    captioner: Captioner, images: Sequence[ImageFile], arm: str
) -> Iterator[tuple[ImageFile, str]]:
    """Make captions, showing a bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    if not images:
        return
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"captions {arm}", total=len(images))
        remaining = iter(images)
        for batch in captioner.caption(images):
            for text, image in zip(batch, remaining, strict=False):
                yield image, text
            progress.advance(bar, len(batch))
