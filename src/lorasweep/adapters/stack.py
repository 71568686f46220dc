"""The adapters of K neighbouring runs on one site, computed at once: what all types have in common.

A type computes its delta of the activations in `forward`. The delta of the weight, and its norm,
are those of the file that the run would write (`weight_deltas.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lorasweep.adapters.adapter import Adapter, Site
from lorasweep.adapters.dropout import Dropout
from lorasweep.adapters.weight_deltas import Tensors, frobenius_norm, low_rank_delta

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Members = Sequence[tuple[Adapter | None, Tensors]]
"""Each run's settings and its tensors on a site; an adapter of None is read from a file."""


@dataclass(frozen=True, kw_only=True)
class Stack(ABC):
    """The adapters of K neighbouring runs on one site."""

    site: Site
    adapters: tuple[Adapter | None, ...]
    """Of each run; None: read from a file, not to be trained."""

    @abstractmethod
    def leaves(self) -> list[Tensor]:
        """The stacked tensors that receive gradients, each (K, ...)."""

    def own_sizes(self, index: int) -> list[int | None]:
        """How much of each leaf's second dimension is run `index`'s own; None: all."""
        return [None] * len(self.leaves())

    def are_ups(self) -> list[bool]:
        """Which of the leaves are a LoRA's second factor, that LoRA+ (arXiv 2402.12354) speeds."""
        return [False] * len(self.leaves())

    @abstractmethod
    def file_tensors(self, index: int) -> dict[str, Tensor]:
        """Run `index`'s tensors as a file holds them; they make the same stack again."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor, dropout: Dropout | None) -> Tensor:
        """The base's output `y` plus the delta of each run on its own rows of `x`."""

    @property
    def drops(self) -> bool:
        """Does any of the runs drop anything in training?"""
        return any(adapter is not None and adapter.drops for adapter in self.adapters)

    def views(self, index: int) -> list[Tensor]:
        """Run `index`'s own part of each leaf, sharing its memory, in the order of `leaves`."""
        sizes = self.own_sizes(index)
        return [
            _part(leaf.detach()[index], size)
            for leaf, size in zip(self.leaves(), sizes, strict=True)
        ]

    def gradients(self, index: int) -> list[Tensor]:
        """Run `index`'s own part of each leaf's gradient, in the same order."""
        sizes = self.own_sizes(index)
        return [
            _part(leaf.grad[index], size)
            for leaf, size in zip(self.leaves(), sizes, strict=True)
            if leaf.grad is not None
        ]

    def delta_weight(self, index: int) -> Tensor:
        """Run `index`'s change of the base's weight, in the weight's shape."""
        return low_rank_delta(self.file_tensors(index), self.site.weight.shape)

    def limit_norm(self, index: int, maximum: float) -> None:
        """kohya's scale_weight_norms: the delta's norm is `maximum` at most.

        All factors of the product take the same root of the correction.
        """
        factors, norm = self.views(index), frobenius_norm(self.file_tensors(index))
        correction = (maximum / norm.clamp(min=maximum)) ** (1 / len(factors))
        for factor in factors:
            factor.mul_(correction)


class FileStack(Stack):
    """A stack of one type, made of files' tensors alone; DoRA's is put around one."""

    @classmethod
    @abstractmethod
    def check(cls, site: Site, tensors: Tensors) -> None:
        """Raise CheckpointError unless a file's tensors are whole and fit the site."""

    @classmethod
    @abstractmethod
    def of(cls, site: Site, members: Members) -> Self:
        """Stack runs of equal layout, copying."""

    @classmethod
    def layout(cls, tensors: Tensors) -> Hashable:
        """What runs of this type must have in common on a site to be stacked: here nothing."""
        return None


def padded(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Copies of (rank, n) tensors stacked to (K, rank_max, n), zero where a rank is smaller."""
    import torch

    most = max(tensor.shape[0] for tensor in tensors)
    stacked = torch.zeros(len(tensors), most, tensors[0].shape[1], device=device)
    for index, tensor in enumerate(tensors):
        stacked[index, : tensor.shape[0]] = tensor
    return stacked


def rank_first(name: str, tensor: Tensor) -> Tensor:
    """A factor between its form in LyCORIS's files and here, (rank, n): its own inverse.

    Those whose names end in _a are (out, rank) there; kernels of the others are made flat.
    """
    return tensor.mT if name.endswith("_a") else tensor.flatten(1)


def _part(own: Tensor, size: int | None) -> Tensor:
    return own if size is None else own[:size]
