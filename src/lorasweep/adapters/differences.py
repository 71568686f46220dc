"""Differences of biases and of norms' weights, as LyCORIS and others save them: plain additions.

They are in files alone: nothing here trains them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from lorasweep.adapters.adapter import Site
from lorasweep.adapters.dropout import Dropout
from lorasweep.adapters.stack import FileStack, Members, Stack
from lorasweep.adapters.weight_deltas import Tensors
from lorasweep.core.safetensors_header import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


ADDED = frozenset({"diff_b", "w_norm", "b_norm"})
"""A file's tensors that are plain additions."""


@dataclass(frozen=True, kw_only=True)
class NormStack(FileStack):
    """K differences of a LayerNorm's or GroupNorm's weight and bias."""

    weight: Tensor  # (K, channels)
    bias: Tensor  # (K, channels); zero where a file has none

    @classmethod
    def check(cls, site: Site, tensors: Tensors) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if not set(shapes) <= {"w_norm", "b_norm"} or not _is_norm(site):
            raise CheckpointError(
                f"{site.key}: {', '.join(sorted(shapes))} is of no norm's weights"
            )
        if set(shapes.values()) != {tuple(site.weight.shape)} or site.bias is None:
            raise CheckpointError(
                f"{site.key}: differences of {shapes} don't fit the base model's"
                f" {tuple(site.weight.shape)}"
            )

    @classmethod
    def of(cls, site: Site, members: Members) -> Self:
        return cls(
            site=site,
            adapters=tuple(adapter for adapter, _ in members),
            weight=_stacked(site, members, "w_norm"),
            bias=_stacked(site, members, "b_norm"),
        )

    def leaves(self) -> list[Tensor]:
        return [self.weight, self.bias]

    def file_tensors(self, index: int) -> dict[str, Tensor]:
        return {"w_norm": self.weight.detach()[index], "b_norm": self.bias.detach()[index]}

    def forward(self, x: Tensor, y: Tensor, dropout: Dropout | None) -> Tensor:
        import torch
        from torch.nn import functional

        norm: Any = self.site.module
        pieces = []
        for rows, weight, bias in zip(
            x.chunk(len(self.weight)), self.weight, self.bias, strict=True
        ):
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
            pieces.append(
                functional.group_norm(rows, norm.num_groups, weight, bias, norm.eps)
                if isinstance(norm, torch.nn.GroupNorm)
                else functional.layer_norm(rows, norm.normalized_shape, weight, bias, norm.eps)
            )
        return y + torch.cat(pieces)

    def delta_weight(self, index: int) -> Tensor:
        return self.weight.detach()[index]


@dataclass(frozen=True, kw_only=True)
class BiasStack(Stack):
    """K differences of a site's bias, around the stack that changes its weight, if there is one."""

    inner: Stack | None
    bias: Tensor  # (K, out)

    @classmethod
    def check(cls, site: Site, tensors: Tensors) -> None:
        """Raise CheckpointError unless a file's difference is of the site's bias."""
        shape, bias = tuple(tensors["diff_b"].shape), site.bias
        if bias is None:
            raise CheckpointError(
                f"{site.key}: it changes a bias, which the base model hasn't there"
            )
        if shape != tuple(bias.shape):
            raise CheckpointError(
                f"{site.key}: diff_b of {shape} doesn't fit the base model's {tuple(bias.shape)}"
            )

    @classmethod
    def around(cls, inner: Stack | None, site: Site, members: Members) -> Self:
        """The members' differences, around the stack of their other tensors."""
        return cls(
            site=site,
            adapters=tuple(adapter for adapter, _ in members),
            inner=inner,
            bias=_stacked(site, members, "diff_b"),
        )

    def leaves(self) -> list[Tensor]:
        return [*(self.inner.leaves() if self.inner else ()), self.bias]

    def own_sizes(self, index: int) -> list[int | None]:
        return [*(self.inner.own_sizes(index) if self.inner else ()), None]

    def file_tensors(self, index: int) -> dict[str, Tensor]:
        own = self.inner.file_tensors(index) if self.inner else {}
        return {**own, "diff_b": self.bias.detach()[index]}

    def forward(self, x: Tensor, y: Tensor, dropout: Dropout | None) -> Tensor:
        bias = self.bias.repeat_interleave(y.shape[0] // len(self.bias), 0).to(y.dtype)
        between = [1] * (y.dim() - 2)
        shape = (len(bias), -1, *between) if self.site.is_conv else (len(bias), *between, -1)
        result = y if self.inner is None else self.inner.forward(x, y, dropout)
        return result + bias.reshape(shape)

    def delta_weight(self, index: int) -> Tensor:
        import torch

        if self.inner is None:
            return torch.zeros_like(self.site.weight, dtype=torch.float32)
        return self.inner.delta_weight(index)


def bias_delta(tensors: Tensors) -> Tensor | None:
    """What a file's tensors add to a site's bias, fp32; None for nothing."""
    found = tensors.get("b_norm", tensors.get("diff_b"))
    return None if found is None else found.float()


def without_bias(tensors: Tensors) -> dict[str, Tensor]:
    """A file's tensors without the difference of a bias."""
    return {name: tensor for name, tensor in tensors.items() if name != "diff_b"}


def _is_norm(site: Site) -> bool:
    from torch import nn

    return isinstance(site.module, nn.LayerNorm | nn.GroupNorm)


def _stacked(site: Site, members: Members, name: str) -> Tensor:
    import torch

    zeros = torch.zeros(site.weight.shape[0])
    rows = [tensors.get(name, zeros) for _, tensors in members]
    return torch.stack([row.to(site.weight.device, torch.float32) for row in rows])
