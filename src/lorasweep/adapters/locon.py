"""LoCon: LoRA on convolutions of any kernel, with kohya's names (conv_dim, conv_alpha).

delta(x) = alpha / rank * up(down(x)), where down is a convolution of the module's kernel, stride,
padding and dilation to `rank` channels, and up is 1x1 (LyCORIS, arXiv 2309.14859, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from lorasweep.adapters.adapter import Site
from lorasweep.adapters.dropout import Dropout
from lorasweep.adapters.lora import LoRA, LoRAStack
from lorasweep.adapters.stack import FileStack, Members
from lorasweep.adapters.unet_blocks import ConvRanked
from lorasweep.adapters.weight_deltas import Tensors
from lorasweep.core.safetensors_header import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LoCon(ConvRanked, LoRA):
    """Settings of a LoCon: those of a LoRA, and conv_rank, conv_alpha for larger kernels."""

    algo: ClassVar[str] = "locon"

    def network_args(self) -> dict[str, str]:
        if self.targets in ("attn-mlp", "unet-only") or self.conv_rank is None:
            return super().network_args()
        doubled = int(1 / self.num_trained)
        rank, alpha = doubled * self.conv_rank, doubled * float(self.conv_alpha or 0)
        return {**super().network_args(), "conv_dim": str(rank), "conv_alpha": str(alpha)}


@dataclass(frozen=True, kw_only=True)
class LoConStack(LoRAStack):
    """K LoCons on one convolution. The runs' kernels are the groups of one convolution.

    Beside a loop over the runs that is one launch for all of them, and on the CPU faster in most
    sizes.
    """

    def forward(self, x: Tensor, y: Tensor, dropout: Dropout | None) -> Tensor:
        num_runs, groups = len(self.ranks), int(self.site.geometry["groups"])
        rank = self.down.shape[1]
        hidden = self._down(x, num_runs, groups).flatten(-2)  # (K, rows * groups, rank, H * W)
        if dropout is not None:
            hidden = self._drop(hidden.mT, dropout).mT
        up, scale = self._scaled_up()
        up = up.mT.reshape(num_runs, 1, groups, -1, rank)
        up = up.expand(-1, hidden.shape[1] // groups, -1, -1, -1).reshape(-1, *up.shape[-2:])
        flat = y.reshape(len(up), up.shape[1], -1)
        return flat.baddbmm(up, hidden.flatten(0, 1), alpha=scale).reshape(y.shape)

    def _down(self, x: Tensor, num_runs: int, groups: int) -> Tensor:
        """Each run's own rows through its kernels: (K, rows * groups, rank, H, W)."""
        from torch.nn import functional

        kernels = self.down.reshape(-1, *self.site.weight.shape[1:])
        rows = x.reshape(num_runs, -1, x.shape[1] // groups, *x.shape[2:])
        geometry = {**self.site.geometry, "groups": num_runs}
        hidden = functional.conv2d(rows.transpose(0, 1).flatten(1, 2), kernels, **geometry)
        return hidden.unflatten(1, (num_runs, -1)).transpose(0, 1)


@dataclass(frozen=True, kw_only=True)
class TuckerStack(FileStack):
    """LoCons in LyCORIS's Tucker form (lora_mid.weight) on one convolution: for reading only."""

    tensors: tuple[dict[str, Tensor], ...]

    @classmethod
    def check(cls, site: Site, tensors: Tensors) -> None:
        names = {"lora_down.weight", "lora_mid.weight", "lora_up.weight", "alpha"}
        if set(tensors) != names:
            raise CheckpointError(f"{site.key}: {', '.join(sorted(tensors))} is no Tucker LoCon's")
        down, mid, up = (tensors[f"lora_{name}.weight"] for name in ("down", "mid", "up"))
        shape = (up.shape[0], down[0].numel(), *mid.shape[2:])
        inner = (up[0].numel(), down.shape[0])
        if mid.dim() != 4 or shape != tuple(site.weight.shape) or inner != tuple(mid.shape[:2]):
            raise CheckpointError(
                f"{site.key}: a Tucker LoCon of {shape} doesn't fit the base model's"
                f" {tuple(site.weight.shape)}"
            )

    @classmethod
    def of(cls, site: Site, members: Members) -> Self:
        device = site.weight.device
        copies = tuple(
            {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
            for _, tensors in members
        )
        return cls(site=site, adapters=tuple(adapter for adapter, _ in members), tensors=copies)

    def leaves(self) -> list[Tensor]:
        return []

    def file_tensors(self, index: int) -> dict[str, Tensor]:
        return dict(self.tensors[index])

    def forward(self, x: Tensor, y: Tensor, dropout: Dropout | None) -> Tensor:
        import torch

        rows = x.chunk(len(self.tensors))
        deltas = [self.site.apply(own, self.delta_weight(i)) for i, own in enumerate(rows)]
        return y + torch.cat(deltas)
