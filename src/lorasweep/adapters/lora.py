"""Standard LoRA (Hu et al., arXiv 2106.09685), with kohya's networks.lora names and options.

delta(x) = alpha / rank * up(down(x)) on Linear and 1x1 convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import PositiveFloat, PositiveInt

from lorasweep import rng
from lorasweep.adapters import Adapter, Dropout, Site, Tensors
from lorasweep.adapters.keys import check_targets
from lorasweep.checkpoint import CheckpointError
from lorasweep.settings import Probability

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """Settings of a standard LoRA; names and meanings are kohya's."""

    rank: PositiveInt
    alpha: PositiveFloat
    targets: str
    network_dropout: Probability
    rank_dropout: Probability
    module_dropout: Probability
    scale_weight_norms: PositiveFloat | None

    def __post_init__(self) -> None:
        check_targets(self.targets)

    @property
    def drops(self) -> bool:
        """Is anything dropped in training?"""
        return self.network_dropout > 0 or self.rank_dropout > 0 or self.module_dropout > 0

    def initial(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Down is uniform in +-1/sqrt(fan_in) (kaiming_uniform_ with a=sqrt(5)), up is zero."""
        import torch

        out_features, in_features = site.weight.shape[:2]
        bound = 1 / math.sqrt(site.weight[0].numel())
        down = torch.rand(self.rank, in_features, generator=generator) * 2 * bound - bound
        up = torch.zeros(out_features, self.rank)
        kernel = (1, 1) if site.is_conv else ()
        return {
            "lora_down.weight": down.reshape(*down.shape, *kernel),
            "lora_up.weight": up.reshape(*up.shape, *kernel),
            "alpha": torch.tensor(float(self.alpha)),
        }

    def metadata(self) -> dict[str, str]:
        """kohya's ss_network_* entries."""
        return {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(self.rank),
            "ss_network_alpha": str(float(self.alpha)),
            "ss_network_dropout": str(self.network_dropout or None),
            "ss_scale_weight_norms": str(self.scale_weight_norms),
        }


@dataclass(frozen=True)
class LoRAStack:
    """K LoRAs on one site. A padded rank has zero rows, which stay zero: nobody updates them."""

    down: Tensor  # (K, rank_max, in)
    up: Tensor  # (K, rank_max, out), transposed so that a run's own part is contiguous
    alphas: tuple[float, ...]
    ranks: tuple[int, ...]
    adapters: tuple[Adapter | None, ...]  # None: read from a file, not to be trained
    is_conv: bool

    @classmethod
    def layout(cls, adapter: Adapter | None, tensors: Tensors) -> Hashable:
        return cls.__name__

    @classmethod
    def check(cls, site: Site, tensors: Tensors) -> None:
        if set(tensors) != {"lora_down.weight", "lora_up.weight", "alpha"}:
            raise CheckpointError(
                f"{site.key}: {', '.join(sorted(tensors))} is not a standard LoRA's"
            )
        weight = site.weight
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        fits = down[0].numel() == weight[0].numel() and up.shape[0] == weight.shape[0]
        if not fits or down.shape[0] != up[0].numel() or weight[0, 0].numel() > 1:
            raise CheckpointError(
                f"{site.key}: factors {tuple(up.shape)} x {tuple(down.shape)} don't fit the base"
                f" model's {tuple(weight.shape)}"
            )

    @classmethod
    def of(cls, site: Site, members: Sequence[tuple[Adapter | None, Tensors]]) -> LoRAStack:
        """Zero-pad the ranks; shapes are (rank, in[, 1, 1]) and (out, rank[, 1, 1])."""
        import torch

        tensors = [run for _, run in members]
        ranks = tuple(run["lora_down.weight"].shape[0] for run in tensors)
        out_features, in_features = site.weight.shape[:2]
        device = site.weight.device
        down = torch.zeros(len(members), max(ranks), in_features, device=device)
        up = torch.zeros(len(members), max(ranks), out_features, device=device)
        for index, (run, rank) in enumerate(zip(tensors, ranks, strict=True)):
            down[index, :rank] = run["lora_down.weight"].flatten(1)
            up[index, :rank] = run["lora_up.weight"].flatten(1).mT
        return cls(
            down=down,
            up=up,
            alphas=tuple(float(run["alpha"]) for run in tensors),
            ranks=ranks,
            adapters=tuple(adapter for adapter, _ in members),
            is_conv=site.is_conv,
        )

    @property
    def drops(self) -> bool:
        return any(isinstance(adapter, LoRA) and adapter.drops for adapter in self.adapters)

    def leaves(self) -> list[Tensor]:
        return [self.down, self.up]

    def views(self, index: int) -> list[Tensor]:
        rank = self.ranks[index]
        return [leaf.detach()[index, :rank] for leaf in self.leaves()]

    def gradients(self, index: int) -> list[Tensor]:
        rank = self.ranks[index]
        return [leaf.grad[index, :rank] for leaf in self.leaves() if leaf.grad is not None]

    def file_tensors(self, index: int) -> dict[str, Tensor]:
        import torch

        down, up = self.views(index)
        kernel = (1, 1) if self.is_conv else ()
        return {
            "lora_down.weight": down.reshape(*down.shape, *kernel),
            "lora_up.weight": up.mT.reshape(*up.mT.shape, *kernel),
            "alpha": torch.tensor(self.alphas[index]),
        }

    @property
    def scales(self) -> tuple[float, ...]:
        """alpha / rank of each run."""
        return tuple(alpha / rank for alpha, rank in zip(self.alphas, self.ranks, strict=True))

    def forward(self, x: Tensor, y: Tensor, dropout: Dropout | None) -> Tensor:
        num_runs = len(self.ranks)
        if self.is_conv:
            return self._forward_conv(x, y, num_runs, dropout)
        hidden = x.reshape(num_runs, -1, x.shape[-1]).bmm(self.down.mT)  # (K, rows * tokens, rank)
        if dropout is not None:
            tokens = hidden.reshape(num_runs, x.shape[0] // num_runs, -1, hidden.shape[-1])
            hidden = self._drop(tokens, dropout).reshape(hidden.shape)
        up, scale = self._scaled_up()
        return (
            y.reshape(num_runs, -1, y.shape[-1]).baddbmm(hidden, up, alpha=scale).reshape(y.shape)
        )

    def _forward_conv(self, x: Tensor, y: Tensor, num_runs: int, dropout: Dropout | None) -> Tensor:
        rows = x.shape[0] // num_runs
        down = self.down.repeat_interleave(rows, 0)  # (K * rows, rank, in)
        hidden = down.bmm(x.flatten(2))  # (K * rows, rank, H * W)
        if dropout is not None:
            tokens = hidden.mT.unflatten(0, (num_runs, rows))
            hidden = self._drop(tokens, dropout).flatten(0, 1).mT
        up, scale = self._scaled_up()
        up = up.mT.repeat_interleave(rows, 0)
        return y.flatten(2).baddbmm(up, hidden, alpha=scale).reshape(y.shape)

    def _scaled_up(self) -> tuple[Tensor, float]:
        """`up`, and what its products are still to be multiplied by; one scale for all is free."""
        scales = self.scales
        if len(set(scales)) == 1:
            return self.up, scales[0]
        return self.up * self.up.new_tensor(scales)[:, None, None], 1.0

    def _drop(self, hidden: Tensor, dropout: Dropout) -> Tensor:
        """kohya's three dropouts on the rank activations (K, rows, tokens, rank)."""
        import torch

        masks = [
            _mask(adapter, hidden[index], rank, dropout, index)
            for index, (adapter, rank) in enumerate(zip(self.adapters, self.ranks, strict=True))
        ]
        return hidden * torch.stack(masks)

    def delta_weight(self, index: int) -> Tensor:
        down, up = self.views(index)
        delta = up.mT @ down * self.scales[index]
        return delta[..., None, None] if self.is_conv else delta

    def limit_norm(self, index: int, maximum: float) -> None:
        """kohya's scale_weight_norms: both factors take the square root of the correction."""
        down, up = self.views(index)
        # ||up^T down||_F from the rank x rank Gram matrices: the full delta is never formed.
        squared = ((down @ down.mT) * (up @ up.mT)).sum().clamp(min=0)
        norm = squared.sqrt() * self.scales[index]
        factor = (maximum / norm.clamp(min=maximum)).sqrt()
        down.mul_(factor)
        up.mul_(factor)


def _mask(
    adapter: Adapter | None, hidden: Tensor, rank: int, dropout: Dropout, index: int
) -> Tensor:
    """What run `index`'s activations (rows, tokens, rank_max) are multiplied by."""
    import torch

    assert isinstance(adapter, LoRA)
    mask = torch.ones_like(hidden)
    if not adapter.drops:
        return mask
    device = hidden.device
    draw = rng.generator(
        dropout.seeds[index], "dropout", dropout.steps[index], dropout.site, device=str(device)
    )
    rows, tokens, _ = hidden.shape
    own = mask[..., :rank]
    if adapter.module_dropout > 0:
        own *= torch.rand(1, generator=draw, device=device) >= adapter.module_dropout
    if adapter.network_dropout > 0:
        keep = torch.rand(rows, tokens, rank, generator=draw, device=device)
        own *= (keep >= adapter.network_dropout) / (1 - adapter.network_dropout)
    if adapter.rank_dropout > 0:
        keep = torch.rand(rows, 1, rank, generator=draw, device=device)
        own *= (keep >= adapter.rank_dropout) / (1 - adapter.rank_dropout)
    return mask
