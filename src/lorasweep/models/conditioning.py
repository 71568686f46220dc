"""What a base model is told of the pictures that it denoises: their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Rows of a batch as text encoders give them; only the base that made it reads it."""

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

    def repeated(self, times: int) -> Conditioning:
        """All rows, `times` one after the other."""
        return self[list(range(len(self))) * times]

    @classmethod
    def joined(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, which are of one base."""
        import torch

        found = [part._tensors() for part in parts]
        return cls(**{name: torch.cat([one[name] for one in found]) for name in found[0]})

    def _tensors(self) -> dict[str, Tensor]:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in given.items() if tensor is not None}
