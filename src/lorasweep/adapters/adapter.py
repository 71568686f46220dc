"""What an adapter is of: a site of the base model, and the settings of a type of adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasweep.core.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Site:
    """A module of the base model that can carry an adapter, or in a file a norm."""

    key: str
    """Its name in files, kohya's: lora_unet_down_blocks_0_attentions_0_proj_in."""
    part: str
    """unet, text_encoder or text_encoder_2: which learning rate drives it."""
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


class Adapter(Settings, ABC):
    """Settings of one type of adapter, and how its tensors begin."""

    targets: str | tuple[str, ...]
    scale_weight_norms: float | None

    @property
    def drops(self) -> bool:
        """Is anything dropped in training?"""
        return False

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
