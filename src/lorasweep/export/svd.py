"""Best approximations of a weight's change by a LoRA (Eckart and Young 1936), all in fp32 or above.

Where a type's delta is a product of thin factors, they are decomposed by QR and a small SVD; the
full (out, in) matrix is decomposed only where there is nothing thinner. torch.svd_lowrank isn't
used: it starts at random and is not exact, and what was kept is told of all parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasweep.adapters.weight_deltas import Tensors, algorithm, lokr_factors, scale_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor


SMALL = 256  # rows up to which the plain SVD is quick
FLOOR = 1e-7  # below this share of the largest, a value from squares is rounding


@dataclass(frozen=True)
class Spectrum:
    """A delta's SVD: left (out, k), values (k), right (k, in * kernel)."""

    left: Tensor
    values: Tensor
    right: Tensor

    def rank_for(self, energy: float) -> int:
        """The smallest rank, at least 1, that keeps this share of the squared norm."""
        squares = self.values.double() ** 2
        kept = squares.cumsum(0)
        return 1 + int((kept < energy * kept[-1]).sum()) if kept[-1] > 0 else 1

    def squared(self, rank: int | None = None) -> float:
        """Squared Frobenius norm of the first `rank` parts, or of all."""
        return float((self.values[:rank].double() ** 2).sum())

    def as_lora(
        self, rank: int, shape: Sequence[int], dtype: torch.dtype, *, pad: bool = True
    ) -> dict[str, Tensor]:
        """A site's tensors of the LoRA of this rank, or of less where there is no more to keep.

        `shape` is the weight's. With `pad` it is of this very rank, zeros at the end.
        """
        import torch

        root = self.values[:rank].clamp(min=0).sqrt()
        down, up = root[:, None] * self.right[:rank], self.left[:, :rank] * root
        if pad and (missing := rank - len(root)) > 0:
            down = torch.nn.functional.pad(down, (0, 0, 0, missing))
            up = torch.nn.functional.pad(up, (0, missing))
        kernel = (1, 1) if len(shape) == 4 else ()
        return {
            "lora_down.weight": down.reshape(-1, *shape[1:]).to(dtype),
            "lora_up.weight": up.reshape(*up.shape, *kernel).to(dtype),
            "alpha": torch.tensor(float(len(down))),
        }


@dataclass(frozen=True)
class Loss:
    """What approximations kept, over sites."""

    total: float
    """Share of the squared norm of all sites together."""
    worst: float
    worst_site: str

    @property
    def error(self) -> float:
        """Relative Frobenius error of all sites together."""
        return math.sqrt(max(0.0, 1 - self.total))

    @property
    def worst_error(self) -> float:
        """The same of the worst site."""
        return math.sqrt(max(0.0, 1 - self.worst))

    @classmethod
    def of(cls, kept: Mapping[str, tuple[float, float]]) -> Loss:
        """From (kept, whole) squared norms by site."""
        shares = {key: part / whole for key, (part, whole) in kept.items() if whole > 0}
        whole = sum(whole for _, whole in kept.values())
        if not shares:
            return cls(1.0, 1.0, "")
        site = min(shares, key=lambda key: shares[key])
        return cls(sum(part for part, _ in kept.values()) / whole, shares[site], site)


def spectrum(site: Tensors) -> Spectrum:
    """Of a site's LoRA, LoHa, LoKr or full difference; magnitudes left out. Raises KeyError."""
    kind = algorithm(site)
    tensors = {name: tensor.float() for name, tensor in site.items()}
    if kind == "full":
        return of_matrix(tensors["diff"].flatten(1))
    scale = scale_of(site)
    found = {"lora": _lora, "loha": _loha, "lokr": _lokr}[kind or ""](tensors)
    sign = -1 if scale < 0 else 1
    return Spectrum(found.left * sign, found.values * abs(scale), found.right)


def of_product(left: Tensor, right: Tensor) -> Spectrum:
    """Of left (out, r) @ right (r, in): QR of each side and the SVD of what is between."""
    import torch

    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        return of_matrix(left @ right)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    inner = of_matrix(r_left @ r_right.mT)
    return Spectrum(q_left @ inner.left, inner.values, inner.right @ q_right.mT)


def of_matrix(matrix: Tensor) -> Spectrum:
    """Of a full matrix (out, in), computed in fp64."""
    import torch

    wide = matrix.double()
    if wide.shape[0] > wide.shape[1]:
        found = of_matrix(matrix.mT)
        return Spectrum(found.right.mT, found.values, found.left.mT)
    if wide.shape[0] <= SMALL:
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
        return Spectrum(left.float(), values.float(), right.float())
    # the eigenvectors of the small square are found many times sooner than the SVD of a wide matrix
    squares, vectors = torch.linalg.eigh(wide @ wide.mT)
    values, left = squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    values = torch.where(values > FLOOR * values[0], values, 0)
    right = torch.where(values[:, None] > 0, (left.mT @ wide) / values[:, None], 0)
    return Spectrum(left.float(), values.float(), right.float())


def _lora(t: Tensors) -> Spectrum:
    down, up = t["lora_down.weight"], t["lora_up.weight"].flatten(1)
    if "lora_mid.weight" not in t:
        return of_product(up, down.flatten(1))
    return of_product(*_tucker(t["lora_mid.weight"], up.mT, down.flatten(1)))


def _loha(t: Tensors) -> Spectrum:
    """A product of two rank-r products is one of rank r * r: all pairs of columns and of rows."""
    (left1, right1), (left2, right2) = _half(t, 1), _half(t, 2)
    if left1.shape[1] * left2.shape[1] >= min(left1.shape[0], right1.shape[1]):
        return of_matrix((left1 @ right1) * (left2 @ right2))  # the matrix itself is no larger
    left = (left1[:, :, None] * left2[:, None, :]).flatten(1)
    return of_product(left, (right1[:, None, :] * right2[None, :, :]).flatten(0, 1))


def _half(t: Tensors, number: int) -> tuple[Tensor, Tensor]:
    a, b = t[f"hada_w{number}_a"], t[f"hada_w{number}_b"]
    core = f"hada_t{number}"
    return _tucker(t[core], a, b) if core in t else (a, b)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """core (r, s, kh, kw) between a (r, out) and b (s, in): (out, r) and (r, in * kh * kw)."""
    import torch

    return a.mT, torch.einsum("rskl,si->rikl", core, b).flatten(1)


def _lokr(t: Tensors) -> Spectrum:
    """The SVD of a Kronecker product is the Kronecker product of the SVDs, sorted anew."""
    import torch

    left, right = lokr_factors(t)
    one, two = of_matrix(left), of_matrix(right.flatten(1))
    values = torch.outer(one.values, two.values).flatten()
    order = values.argsort(descending=True, stable=True)
    both_left = torch.kron(one.left.contiguous(), two.left.contiguous())
    both_right = torch.kron(one.right.contiguous(), two.right.contiguous())
    return Spectrum(both_left[:, order], values[order], both_right[order])


def dtype_of(site: Tensors) -> torch.dtype:
    """The type that a site's weights are saved in."""
    return max(site.values(), key=lambda tensor: tensor.numel()).dtype
