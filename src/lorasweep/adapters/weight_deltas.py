"""What the tensors of a file do to a weight, from the file alone, whatever program wrote it.

Formulas: LoRA (arXiv 2106.09685), LoHa as FedPara (arXiv 2108.06098), LoKr (arXiv 2309.14859), with
LyCORIS's names and its Tucker forms of convolutions. LyCORIS's own get_diff_weight has the scale
twice for LoHa and LoKr.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]
"""A site's tensors by their names below its key."""

_MARKS = {
    "lora_down.weight": "lora",
    "hada_w1_a": "loha",
    "lokr_w2": "lokr",
    "lokr_w2_a": "lokr",
    "diff": "full",
    "w_norm": "norm",
    "lambda_layer": "tlora",
    "oft_diag": "oft",
    "oft_blocks": "oft",
    "a1.weight": "glora",
    "on_input": "ia3",
    "b_norm": "norm",
    "diff_b": "bias",  # which may stand beside any of them
}


def algorithm(tensors: Tensors) -> str | None:
    """Which algorithm a site's tensors are of: lora, loha, lokr, full, oft, …; None: no known one.

    `dora_scale` beside them makes it DoRA (`has_magnitude`).
    """
    return next((name for mark, name in _MARKS.items() if mark in tensors), None)


def has_magnitude(tensors: Tensors) -> bool:
    """Does DoRA's magnitude belong to it (arXiv 2402.09353)? Then the base's weight counts too."""
    return "dora_scale" in tensors


def rank_of(tensors: Tensors) -> int | None:
    """The rank that alpha is divided by; None where a full matrix has none."""
    for name in ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if name in tensors:
            return int(tensors[name].shape[0])
    return None


def scale_of(tensors: Tensors) -> float:
    """alpha / rank; 1 without an alpha, and for LoKr's full matrices, which have no rank."""
    rank = rank_of(tensors)
    if rank is None or "alpha" not in tensors:
        return 1.0
    return float(tensors["alpha"]) / rank


def low_rank_delta(tensors: Tensors, shape: Sequence[int] | None = None) -> Tensor:
    """What a LoRA, LoHa or LoKr adds to a weight of `shape`, (out, in) or (out, in, kh, kw), fp32.

    Without `shape` the layout of a kernel may be flat, which no norm minds. Of DoRA it is the part
    before the magnitudes. Raises KeyError for another algorithm.
    """
    kind = {"lora": _lora, "loha": _loha, "lokr": _lokr}[algorithm(tensors) or ""]
    delta = kind({name: tensor.float() for name, tensor in tensors.items()}, shape)
    delta = delta * scale_of(tensors)
    return delta if shape is None else delta.reshape(tuple(shape))


def _lora(tensors: Tensors, shape: Sequence[int] | None) -> Tensor:
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    if "lora_mid.weight" in tensors:
        return _tucker(tensors["lora_mid.weight"], up.flatten(1).mT, down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _loha(tensors: Tensors, shape: Sequence[int] | None) -> Tensor:
    def factor(number: int) -> Tensor:
        a, b = tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"]
        core = tensors.get(f"hada_t{number}")
        return a @ b if core is None else _tucker(core, a, b)

    return factor(1) * factor(2)


def _lokr(tensors: Tensors, shape: Sequence[int] | None) -> Tensor:
    import torch

    left, right = lokr_factors(tensors)
    if shape is not None and len(shape) == 4:
        right = right.reshape(right.shape[0], -1, *shape[2:])
        left = left[..., None, None]
    elif right.dim() == 4:
        left = left[..., None, None]
    return torch.kron(left, right.contiguous())


def lokr_factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """LoKr's factors, multiplied out: (out1, in1), (out2, in2[, kh, kw] or in2 * kh * kw)."""
    left, right = tensors.get("lokr_w1"), tensors.get("lokr_w2")
    if left is None:
        left = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    if right is None:
        a, b, core = tensors["lokr_w2_a"], tensors["lokr_w2_b"], tensors.get("lokr_t2")
        right = a @ b.flatten(1) if core is None else _tucker(core, a, b)
        if core is None and b.dim() == 4:
            right = right.reshape(a.shape[0], *b.shape[1:])
    return left, right


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core (r, s, kh, kw) between a (r, out) and b (s, in): (out, in, kh, kw)."""
    import torch

    return torch.einsum("rskl,ro,si->oikl", core, a, b)


def frobenius_norm(tensors: Tensors) -> Tensor:
    """Norm of `low_rank_delta`, a scalar in fp32; of LoRA and LoKr without forming the delta."""
    scale = abs(scale_of(tensors))
    if algorithm(tensors) == "lora" and "lora_mid.weight" not in tensors:
        down = tensors["lora_down.weight"].float().flatten(1)
        up = tensors["lora_up.weight"].float().flatten(1)
        squared = ((down @ down.mT) * (up.mT @ up)).sum().clamp(min=0)
        return squared.sqrt() * scale
    if algorithm(tensors) == "lokr":
        left, right = lokr_factors({name: tensor.float() for name, tensor in tensors.items()})
        return left.norm() * right.norm() * scale
    return low_rank_delta(tensors).norm()
