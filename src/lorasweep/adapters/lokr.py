"""LoKr: the Kronecker product of two matrices (LyCORIS, arXiv 2309.14859; KronA, arXiv 2212.10650).

delta = scale * kron(w1, w2); w2, and on demand w1, are themselves low-rank products. The Kronecker
product is never formed: an input seen as an (in1, in2) matrix X gives w1 X w2^T. Names and rules
are LyCORIS's.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lorasweep.adapters.adapter import Site
from lorasweep.adapters.dropout import Dropout
from lorasweep.adapters.lycoris_options import ByWeight, kept_channels
from lorasweep.adapters.stack import FileStack, Members, padded, rank_first
from lorasweep.adapters.weight_deltas import Tensors, rank_of
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.settings import SettingsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LoKr(ByWeight):
    """Settings of a LoKr."""

    factor: int
    decompose_both: bool
    full_matrix: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor != -1 and self.factor < 1:
            raise SettingsError(
                f"adapter.factor={self.factor}: give -1 (as square as can be) or 1 up"
            )

    def initial(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """LyCORIS's start: kaiming_uniform_ with a=sqrt(5), and w2 or its second factor is zero."""
        import torch

        rank, (outs, ins) = self.rank_at(site), self.shapes(site)
        kernel = tuple(site.weight.shape[2:])
        tensors: dict[str, Tensor] = {}
        if self.decompose_both and not self.full_matrix and rank < max(outs[0], ins[0]) / 2:
            tensors["lokr_w1_a"] = _kaiming(outs[0], rank, generator)
            tensors["lokr_w1_b"] = _kaiming(rank, ins[0], generator)
        else:
            tensors["lokr_w1"] = _kaiming(outs[0], ins[0], generator)
        if self.full_matrix or rank >= max(outs[1], ins[1]) / 2:
            tensors["lokr_w2"] = torch.zeros(outs[1], ins[1], *kernel)
        else:
            tensors["lokr_w2_a"] = _kaiming(outs[1], rank, generator)
            tensors["lokr_w2_b"] = torch.zeros(rank, ins[1] * math.prod(kernel))
        is_full = {"lokr_w1", "lokr_w2"} <= set(tensors)
        # A full matrix has no rank to divide by: LyCORIS then writes the rank for a scale of 1.
        return {**tensors, "alpha": torch.tensor(float(rank) if is_full else self.alpha_at(site))}

    def shapes(self, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
        """(out1, out2), (in1, in2): w1 is (out1, in1), w2 is (out2, in2)."""
        out_features, in_features = site.weight.shape[:2]
        return factorization(out_features, self.factor), factorization(in_features, self.factor)

    def metadata(self) -> dict[str, str]:
        """kohya's ss_network_* entries."""
        return self.kohya_metadata(
            "lokr",
            factor=self.factor,
            decompose_both=self.decompose_both,
            full_matrix=self.full_matrix,
        )


def factorization(size: int, factor: int) -> tuple[int, int]:
    """`size` as a product, the smaller first: of `factor` where that divides it, else of the
    largest divisor below it; -1: as square as can be. LyCORIS's rule.
    """
    if factor > 0 and size % factor == 0:
        small, large = sorted((factor, size // factor))
        return small, large
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(divisor for divisor in range(most, 0, -1) if size % divisor == 0)
    return small, size // small


@dataclass(frozen=True, kw_only=True)
class LoKrStack(FileStack):
    """K LoKrs of equal factor shapes on one site. A padded rank is zero in both of its factors."""

    names: tuple[str, ...]
    """The factors' in files: those of `left`, then those of `right`."""
    left: tuple[Tensor, ...]
    """w1 (K, out1, in1), or its factors with the rank first: (K, rank_max, out1), (…, in1)."""
    right: tuple[Tensor, ...]
    """w2 (K, out2, in2 * kh * kw), or its factors likewise."""
    alphas: tuple[float, ...]
    ranks: tuple[int | None, ...]  # None: both matrices are full, and the scale is 1

    @classmethod
    def layout(cls, tensors: Tensors) -> Hashable:
        names = (_names(tensors, matrix) for matrix in ("lokr_w1", "lokr_w2"))
        return _shape(tensors, "lokr_w1"), *map(len, names)

    @classmethod
    def check(cls, site: Site, tensors: Tensors) -> None:
        names = {"alpha", *_names(tensors, "lokr_w1"), *_names(tensors, "lokr_w2")}
        if set(tensors) != names:
            raise CheckpointError(f"{site.key}: {', '.join(sorted(tensors))} is not a plain LoKr's")
        w1, w2, weight = _shape(tensors, "lokr_w1"), _shape(tensors, "lokr_w2"), site.weight
        fits = (w1[0] * w2[0], w1[1] * w2[1]) == (weight.shape[0], weight[0].numel())
        ranks = {tensors[name].shape[1] for name in tensors if name.endswith("_a")}
        ranks |= {tensors[name].shape[0] for name in tensors if name.endswith("_b")}
        if not fits or len(ranks) > 1:
            raise CheckpointError(
                f"{site.key}: kron of {w1} and {w2} doesn't fit the base model's"
                f" {tuple(weight.shape)}"
            )

    @classmethod
    def of(cls, site: Site, members: Members) -> Self:
        """Zero-pad the ranks; the runs have the same factor shapes (`layout`)."""
        files = [tensors for _, tensors in members]
        left, right = (_names(files[0], matrix) for matrix in ("lokr_w1", "lokr_w2"))
        factors = [
            padded([rank_first(name, file[name]) for file in files], site.weight.device)
            for name in (*left, *right)
        ]
        return cls(
            site=site,
            adapters=tuple(adapter for adapter, _ in members),
            names=(*left, *right),
            left=tuple(factors[: len(left)]),
            right=tuple(factors[len(left) :]),
            alphas=tuple(float(file["alpha"]) for file in files),
            ranks=tuple(rank_of(file) for file in files),
        )

    def leaves(self) -> list[Tensor]:
        return [*self.left, *self.right]

    def own_sizes(self, index: int) -> list[int | None]:
        """Its rank; all of a full matrix."""
        rank = self.ranks[index]
        return [
            rank if len(factors) == 2 else None
            for factors in (self.left, self.right)
            for _ in factors
        ]

    def file_tensors(self, index: int) -> dict[str, Tensor]:
        import torch

        views = dict(zip(self.names, self.views(index), strict=True))
        tensors = {name: rank_first(name, view) for name, view in views.items()}  # its own inverse
        if "lokr_w2" in tensors:
            out2 = tensors["lokr_w2"].shape[0]
            tensors["lokr_w2"] = tensors["lokr_w2"].reshape(out2, -1, *self.site.weight.shape[2:])
        return {**tensors, "alpha": torch.tensor(self.alphas[index])}

    def _scaled_left(self) -> Tensor:
        """w1 times alpha / rank, (K, out1, in1): the smallest place to put the scale."""
        scales = [
            1.0 if rank is None else alpha / rank
            for alpha, rank in zip(self.alphas, self.ranks, strict=True)
        ]
        first, *rest = self.left
        scaled = first if set(scales) == {1.0} else first * first.new_tensor(scales)[:, None, None]
        return scaled.mT.bmm(rest[0]) if rest else scaled

    def forward(self, x: Tensor, y: Tensor, dropout: Dropout | None) -> Tensor:
        import torch

        is_conv = self.site.is_conv
        if dropout is None and not is_conv:
            return self._linear(x, y)
        delta = self._conv(x) if is_conv else self._linear(x, torch.zeros_like(y))
        if dropout is not None:
            channels = self.site.weight.shape[0]
            kept = kept_channels(self.adapters, channels, dropout, delta.device)
            kept = kept.repeat_interleave(x.shape[0] // len(self.ranks), 0)  # (K * rows, out)
            between = [1] * (delta.dim() - 2)
            shape = (-1, channels, *between) if is_conv else (-1, *between, channels)
            delta = delta * kept.reshape(shape).to(delta.dtype)
        return y + delta

    def _linear(self, x: Tensor, y: Tensor) -> Tensor:
        """y + w1 X w2^T, with X's columns taken to the rank first where w2 has one."""
        left, num_runs = self._scaled_left(), len(self.ranks)
        out1, in1 = left.shape[1:]
        inner = x.reshape(num_runs, -1, x.shape[-1] // in1)  # (K, tokens * in1, in2)
        last = self.right[0] if len(self.right) == 2 else self.right[0].mT
        if len(self.right) == 2:
            inner = inner.bmm(self.right[1].mT)
        width = inner.shape[-1]
        columns = inner.reshape(num_runs, -1, in1, width).mT.reshape(num_runs, -1, in1)
        rows = columns.bmm(left.mT).reshape(num_runs, -1, width, out1).mT
        rows = rows.reshape(num_runs, -1, width)  # (K, tokens * out1, in2 or rank)
        return y.reshape(num_runs, rows.shape[1], -1).baddbmm(rows, last).reshape(y.shape)

    def _conv(self, x: Tensor) -> Tensor:
        import torch

        left = self._scaled_left()
        runs = enumerate(x.chunk(len(self.ranks)))
        return torch.cat([self._conv_one(rows, left[index], index) for index, rows in runs])

    def _conv_one(self, x: Tensor, left: Tensor, index: int) -> Tensor:
        """A run's delta of (rows, in, H, W): w2's kernel on each of in1 groups, w1 across them."""
        from torch.nn import functional

        rows, (out1, in1) = x.shape[0], left.shape
        groups = x.reshape(rows * in1, -1, *x.shape[2:])
        kernel = self.right[-1][index]
        kernel = kernel.reshape(kernel.shape[0], groups.shape[1], *self.site.weight.shape[2:])
        inner = self.site.apply(groups, kernel)
        across = left @ inner.reshape(rows, in1, -1)
        if len(self.right) == 1:
            return across.reshape(rows, -1, *inner.shape[2:])
        hidden = across.reshape(rows * out1, *inner.shape[1:])
        last = functional.conv2d(hidden, self.right[0][index].mT[..., None, None])
        return last.reshape(rows, -1, *inner.shape[2:])


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """kaiming_uniform_ with a=sqrt(5): uniform in +-1/sqrt(columns)."""
    import torch

    return (torch.rand(rows, columns, generator=generator) * 2 - 1) / math.sqrt(columns)


def _names(tensors: Tensors, matrix: str) -> list[str]:
    """Names of a matrix in a file, or of its two factors."""
    return [matrix] if matrix in tensors else [f"{matrix}_a", f"{matrix}_b"]


def _shape(tensors: Tensors, matrix: str) -> tuple[int, int]:
    """(out, in * kh * kw) of w1 or w2, whether it is full or in factors."""
    names = _names(tensors, matrix)
    return tensors[names[0]].shape[0], tensors[names[-1]][0].numel()
