"""Adapters: the trainable low-rank parts. One file a type; `pack` attaches K of them to a base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lorasweep.core.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Site:
    """A module of the base model that can carry an adapter."""

    key: str
    """Its name in files, kohya's: lora_unet_down_blocks_0_attentions_0_proj_in."""
    part: str
    """unet or text_encoder: which learning rate drives it."""
    path: str
    """The module's dotted path in its part: down_blocks.0.attentions.0.proj_in."""
    module: torch.nn.Module
    """A Linear or Conv2d with `weight`."""

    @property
    def is_conv(self) -> bool:
        """Is it a convolution (NCHW rows) rather than a Linear (channels last)?"""
        return self.weight.dim() == 4

    @property
    def has_kernel(self) -> bool:
        """Is it a convolution with a kernel larger than 1x1?"""
        return self.is_conv and self.weight[0, 0].numel() > 1

    @property
    def is_pointwise(self) -> bool:
        """Does each position of the output depend on that of the input alone?"""
        if not self.is_conv:
            return True
        geometry = self.geometry
        plain = geometry["stride"] == (1, 1) and geometry["padding"] in ((0, 0), "valid")
        return plain and geometry["groups"] == 1 and not self.has_kernel

    @property
    def weight(self) -> Tensor:
        """The module's frozen weight: (out, in) or (out, in / groups, kh, kw)."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The module's frozen bias (out,), if it has one."""
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        return bias

    @property
    def geometry(self) -> dict[str, Any]:
        """Stride, padding, dilation and groups of a convolution, as conv2d takes them."""
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self.module, name) for name in names}

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the module would compute of `x` with this weight and no bias."""
        from torch.nn import functional

        if self.is_conv:
            return functional.conv2d(x, weight, **self.geometry)
        return functional.linear(x, weight)


@dataclass(frozen=True)
class Dropout:
    """Where the random zeros of a training step come from; None of it applies when scoring."""

    seeds: Sequence[int]
    """The seeds of the pack's runs, in row order."""
    steps: Sequence[int]
    """The micro step each of them is at."""
    site: str
    """The module's key, so that no two modules share a draw."""


Tensors = Mapping[str, "Tensor"]
"""A site's tensors by their names below its key, as files hold them."""


class Stack(Protocol):
    """The adapters of K neighbouring runs on one site, computed at once."""

    @classmethod
    def layout(cls, adapter: Adapter | None, tensors: Tensors) -> Hashable:
        """What runs must have in common on a site to be stacked."""

    @classmethod
    def check(cls, site: Site, tensors: Tensors) -> None:
        """Raise CheckpointError unless a file's tensors are whole and fit the site."""

    @classmethod
    def of(cls, site: Site, members: Sequence[tuple[Adapter | None, Tensors]]) -> Stack:
        """Stack runs of equal layout, copying; an adapter of None is read from a file."""

    @property
    def drops(self) -> bool:
        """Does any of the runs drop anything in training?"""

    def leaves(self) -> list[Tensor]:
        """The stacked tensors that receive gradients, each (K, ...)."""

    def views(self, index: int) -> list[Tensor]:
        """Run `index`'s own part of each leaf, sharing its memory, in the order of `leaves`."""

    def gradients(self, index: int) -> list[Tensor]:
        """Run `index`'s own part of each leaf's gradient, in the same order."""

    def file_tensors(self, index: int) -> dict[str, Tensor]:
        """Run `index`'s tensors as a file holds them; `of` makes the same stack from them."""

    def forward(self, x: Tensor, y: Tensor, dropout: Dropout | None) -> Tensor:
        """The base's output `y` plus the delta of each run on its own rows of `x`."""

    def delta_weight(self, index: int) -> Tensor:
        """Run `index`'s change of the base's weight, in the weight's shape."""

    def limit_norm(self, index: int, maximum: float) -> None:
        """Scale run `index`'s factors so that its delta's norm is at most `maximum`."""


class Adapter(Settings, ABC):
    """Settings of one type of adapter, and how its tensors begin."""

    targets: str | tuple[str, ...]
    scale_weight_norms: float | None

    def carries(self, site: Site) -> bool:
        """Can this type adapt the site? One that `targets` names and it can't is reported."""
        return True

    def wants(self, site: Site) -> bool:
        """Is the site to have an adapter, by further settings such as the ranks by block?"""
        return True

    @abstractmethod
    def initial(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """New fp32 tensors for a site, as files hold them; the delta they make is zero."""

    @abstractmethod
    def metadata(self) -> dict[str, str]:
        """kohya's ss_network_* entries."""
