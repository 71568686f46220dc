"""The empty caption: trains the unconditional part of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lorasweep.core.settings import Settings
from lorasweep.data.captions.caption_images import Repeats
from lorasweep.data.dataset import ImageFile


@dataclass(frozen=True, kw_only=True)
class Empty(Settings):
    """No words for any image."""

    cached: ClassVar[bool] = False
    tags: ClassVar[bool] = False

    repeats: Repeats

    def identity(self) -> str:
        """Nothing but its kind."""
        return "empty"

    def caption(self, images: Sequence[ImageFile]) -> Iterator[list[str]]:
        """An empty text for each image."""
        yield [""] * len(images)
