"""How the factors of a LoRA begin, so that their product times the scale changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from functools import cache
from typing import TYPE_CHECKING

from lorasweep.core import rng

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Start = Callable[[Tensor, int, float, torch.Generator], tuple[Tensor, Tensor]]
    """(weight, rank, scale, generator) to down (rank, in) and up (out, rank) on the CPU."""
    Vectors = tuple[Tensor, Tensor, Tensor]


def start(
    init: str, weight: Tensor, rank: int, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """New fp32 factors for a weight (out, in[, kh, kw]): down (rows, in * kh * kw), up (out, rows).

    `init` is kaiming, orthogonal or pissa; pissa's have 2 * rank rows, of which the later half is
    not to be trained.
    """
    starts: Mapping[str, Start] = {
        "kaiming": _kaiming,
        "orthogonal": _orthogonal,
        "pissa": _pissa,
    }
    return starts[init](weight, rank, scale, generator)


def _kaiming(
    weight: Tensor, rank: int, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Down uniform in +-1/sqrt(fan_in) (kaiming_uniform_ with a=sqrt(5)), up zero."""
    import torch

    fan_in = weight[0].numel()
    bound = 1 / math.sqrt(fan_in)
    down = torch.rand(rank, fan_in, generator=generator) * 2 * bound - bound
    return down, torch.zeros(weight.shape[0], rank)


def _orthogonal(
    weight: Tensor, rank: int, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Both factors random, in subspaces of the rank that are orthogonal to each other.

    PEFT's init_lora_weights="orthogonal" draws the two halves of a random rotation for them, which
    leaves a product of rounding errors; unit vectors make the same product exactly zero.
    """
    import torch

    down, up = torch.zeros(rank, weight[0].numel()), torch.zeros(weight.shape[0], rank)
    down[0::2] = torch.randn(rank // 2, down.shape[1], generator=generator) / 10
    up[:, 1::2] = torch.randn(up.shape[0], rank // 2, generator=generator) / 10
    return down, up


def _pissa(
    weight: Tensor, rank: int, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """PiSSA (arXiv 2404.02948): the weight's largest singular vectors, and their negative.

    The paper takes their product out of the base model; here it is taken out by frozen rows, so
    that the base stays that of every other run, and the file a plain LoRA on it.
    """
    import torch

    left, values, right = _singular(weight, rank)
    root = (values / scale).sqrt()
    own_down, own_up = _kaiming(weight, rank, scale, generator)  # beyond the weight's own rank
    own_down[: len(root)] = root[:, None] * right.mT
    own_up[:, : len(root)] = left * root
    return torch.cat([own_down, own_down]), torch.cat([own_up, -own_up], dim=1)


def _singular(weight: Tensor, rank: int) -> Vectors:
    """The largest singular values with their vectors, (out, n), (n,), (in, n), n <= rank.

    Kept for as long as the weight lives, for every run of a pack asks for the same.
    """
    known = _known().setdefault(weight, {})
    key = (weight._version, rank)
    if key not in known:
        flat = weight.detach().flatten(1).float().cpu()
        known[key] = _decomposed(flat, min(rank, *flat.shape))
    return known[key]


@cache
def _known() -> MutableMapping[Tensor, dict[tuple[int, int], Vectors]]:
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


def _decomposed(matrix: Tensor, rank: int) -> Vectors:
    """The search starts at random, the same for every run, and leaves torch's own stream alone."""
    import torch

    if min(matrix.shape) <= max(256, 2 * rank):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank].clone(), values[:rank].clone(), right[:rank].mT.clone()
    with torch.random.fork_rng(devices=[]):  # svd_lowrank takes no generator
        torch.manual_seed(rng.key_seed(0, "pissa", *matrix.shape, rank))
        left, values, right = torch.svd_lowrank(matrix, q=rank + 16, niter=4)
    return left[:, :rank].clone(), values[:rank].clone(), right[:, :rank].clone()
