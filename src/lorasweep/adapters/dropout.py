"""Random zeros of a training step, keyed by run, step and module: no generator state is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasweep.core import rng

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Dropout:
    """Where the random zeros of a training step come from; None of it applies when scoring."""

    seeds: Sequence[int]
    """The seeds of the pack's runs, in row order."""
    steps: Sequence[int]
    """The micro step each of them is at."""
    site: str
    """The module's key, so that no two modules share a draw."""

    def generator(self, index: int, device: torch.device) -> torch.Generator:
        """Run `index`'s own, at its step on this site."""
        seed, step = self.seeds[index], self.steps[index]
        return rng.generator(seed, "dropout", step, self.site, device=str(device))


def survivors(shape: Sequence[int], rate: float, draw: torch.Generator) -> Tensor:
    """0 with a chance of `rate`, else 1 / (1 - rate), so that the expectation stays."""
    import torch

    chances = torch.rand(*shape, generator=draw, device=draw.device)
    return (chances >= rate) / (1 - rate)


def module_survives(rate: float, draw: torch.Generator) -> Tensor:
    """Is an adapter computed on the site at all? (1,) of bool; not scaled up, as kohya's isn't."""
    import torch

    return torch.rand(1, generator=draw, device=draw.device) >= rate
