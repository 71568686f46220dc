"""What a base model is told of the pictures that it denoises: prompts, sizes and crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SizeAndCrop:
    """Which part of what a picture is; each pair is width and height, or left and top, in pixels.

    SDXL is told of it (arXiv 2307.01952, section 2.2).
    """

    original: tuple[int, int]
    """Before it was scaled."""
    crop: tuple[int, int]
    """Of the scaled picture."""
    size: tuple[int, int]
    """The picture's own."""

    @classmethod
    def whole(cls, size: tuple[int, int]) -> Self:
        """A picture that was never scaled or cropped, such as one that is drawn."""
        return cls(size, (0, 0), size)


@dataclass(frozen=True)
class Conditioning:
    """Rows of a batch as a base wants them told; only the base that made it reads it."""

    embeds: Tensor
    """Prompt embeddings (N, L, D)."""
    pooled: Tensor | None = None
    """Embeddings of whole prompts (N, P), where the base reads them."""
    time_ids: Tensor | None = None
    """Sizes and crops (N, 6), where the base reads them."""

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: Sequence[int]) -> Conditioning:
        """These rows, in this order."""
        taken = {name: tensor[list(rows)] for name, tensor in self._tensors().items()}
        return Conditioning(**taken)

    @classmethod
    def joined(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, which are of one base."""
        import torch

        found = [part._tensors() for part in parts]
        return cls(**{name: torch.cat([one[name] for one in found]) for name in found[0]})

    def _tensors(self) -> dict[str, Tensor]:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in given.items() if tensor is not None}
