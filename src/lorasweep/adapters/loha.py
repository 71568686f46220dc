"""LoHa: the Hadamard product of two low-rank products (FedPara, arXiv 2108.06098).

delta = alpha / rank * (w1_a w1_b) * (w2_a w2_b), elementwise: its rank is up to rank^2. Names and
the start are LyCORIS's (arXiv 2309.14859).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lorasweep.adapters.adapter import Site
from lorasweep.adapters.dropout import Dropout
from lorasweep.adapters.lycoris_options import ByWeight, kept_channels
from lorasweep.adapters.stack import FileStack, Members, padded, rank_first
from lorasweep.adapters.weight_deltas import Tensors
from lorasweep.core.safetensors_header import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
"""The factors: a (out, rank), b (rank, in * kh * kw)."""


@dataclass(frozen=True, kw_only=True)
class LoHa(ByWeight):
    """Settings of a LoHa."""

    def initial(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """LyCORIS's start: b's have deviation 1, w1_a 0.1, and w2_a is zero."""
        import torch

        rank, weight = self.rank_at(site), site.weight
        out_features, in_values = weight.shape[0], weight[0].numel()
        return {
            "hada_w1_a": 0.1 * torch.randn(out_features, rank, generator=generator),
            "hada_w1_b": torch.randn(rank, in_values, generator=generator),
            "hada_w2_a": torch.zeros(out_features, rank),
            "hada_w2_b": torch.randn(rank, in_values, generator=generator),
            "alpha": torch.tensor(self.alpha_at(site)),
        }

    def metadata(self) -> dict[str, str]:
        """kohya's ss_network_* entries."""
        return self.kohya_metadata("loha")


@dataclass(frozen=True, kw_only=True)
class LoHaStack(FileStack):
    """K LoHas on one site. A padded rank has zero rows in both factors, so its gradient is zero."""

    factors: tuple[Tensor, ...]  # as NAMES: a's transposed (K, rank_max, out), b's (K, rank_max, n)
    alphas: tuple[float, ...]
    ranks: tuple[int, ...]

    @classmethod
    def check(cls, site: Site, tensors: Tensors) -> None:
        if set(tensors) != {*NAMES, "alpha"}:
            raise CheckpointError(f"{site.key}: {', '.join(sorted(tensors))} is not a plain LoHa's")
        weight = site.weight
        for a, b in (
            (tensors[NAMES[0]], tensors[NAMES[1]]),
            (tensors[NAMES[2]], tensors[NAMES[3]]),
        ):
            rank = tensors[NAMES[1]].shape[0]
            if a.shape != (weight.shape[0], rank) or b.flatten(1).shape != (
                rank,
                weight[0].numel(),
            ):
                raise CheckpointError(
                    f"{site.key}: factors {tuple(a.shape)} x {tuple(b.shape)} don't fit the base"
                    f" model's {tuple(weight.shape)}"
                )

    @classmethod
    def of(cls, site: Site, members: Members) -> Self:
        """Zero-pad the ranks."""
        files = [tensors for _, tensors in members]
        own = [[rank_first(name, file[name]) for file in files] for name in NAMES]
        return cls(
            site=site,
            adapters=tuple(adapter for adapter, _ in members),
            factors=tuple(padded(tensors, site.weight.device) for tensors in own),
            alphas=tuple(float(file["alpha"]) for file in files),
            ranks=tuple(file[NAMES[1]].shape[0] for file in files),
        )

    def leaves(self) -> list[Tensor]:
        return list(self.factors)

    def own_sizes(self, index: int) -> list[int | None]:
        return [self.ranks[index]] * len(NAMES)

    def file_tensors(self, index: int) -> dict[str, Tensor]:
        import torch

        views = zip(NAMES, self.views(index), strict=True)
        factors = {name: rank_first(name, view) for name, view in views}  # its own inverse
        return {**factors, "alpha": torch.tensor(self.alphas[index])}

    def forward(self, x: Tensor, y: Tensor, dropout: Dropout | None) -> Tensor:
        import torch
        from torch.utils.checkpoint import checkpoint

        gains = self._gains(dropout)
        if not torch.is_grad_enabled():
            return self._compute(x, y, gains, *self.factors)
        # The products of the factors are as large as the base's weight, for every run: they are
        # computed again in the backward pass, site by site, rather than all kept until then.
        output = checkpoint(
            self._compute,
            x,
            y,
            gains,
            *self.factors,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        assert isinstance(output, torch.Tensor)
        return output

    def _gains(self, dropout: Dropout | None) -> Tensor:
        """alpha / rank of each run, times what of its output channels is kept: (K, 1, out or 1)."""
        leaf = self.factors[0]
        scales = [alpha / rank for alpha, rank in zip(self.alphas, self.ranks, strict=True)]
        gains = leaf.new_tensor(scales)[:, None, None]
        if dropout is None:
            return gains
        kept = kept_channels(self.adapters, leaf.shape[-1], dropout, leaf.device)
        return gains * kept[:, None]

    def _compute(self, x: Tensor, y: Tensor, gains: Tensor, *factors: Tensor) -> Tensor:
        import torch

        w1_a, w1_b, w2_a, w2_b = factors
        delta = (w1_a * gains).mT.bmm(w1_b) * w2_a.mT.bmm(w2_b)  # (K, out, in * kh * kw)
        num_runs = len(self.ranks)
        if not self.site.is_conv:
            inputs = x.reshape(num_runs, -1, x.shape[-1])
            own = y.reshape(num_runs, -1, y.shape[-1])
            return own.baddbmm(inputs, delta.mT).reshape(y.shape)
        kernels = delta.reshape(num_runs, *self.site.weight.shape)
        runs = zip(x.chunk(num_runs), kernels, strict=True)
        return y + torch.cat([self.site.apply(rows, kernel) for rows, kernel in runs])
