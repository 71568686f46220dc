"""How much a caption tells a model about its image: losses with other images' captions, over own.

A checkpoint may have a small loss since all images are alike (a blue ground) and no longer listen
to the prompt. What a caption is worth shows in pairs: the same noised image, once with its own
caption and once with other images'. It is an estimate of the information that captions and images
share (arXiv 2310.07972), as in diffusion classifiers (arXiv 2303.16203).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasweep.core import rng
from lorasweep.judging.metrics.tuple_losses import LossTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Swaps:
    """Tuples with their own captions, and the same with others' in their place."""

    own: Sequence[LossTuple]
    swapped: Sequence[LossTuple]
    of: Sequence[int]
    """Which of `own` each of `swapped` is."""

    def mean(self, losses: Tensor) -> Tensor:
        """Losses (K, S) of the swapped tuples -> their means (K, N) by own tuple."""
        import torch

        of = torch.tensor(self.of, dtype=torch.long)
        sums = torch.zeros(len(losses), len(self.own)).index_add(1, of, losses)
        return sums / torch.bincount(of, minlength=len(self.own))


def swaps(tuples: Sequence[LossTuple], num_swaps: int, seed: int) -> Swaps:
    """Give each tuple the captions of up to `num_swaps` other images of its arm.

    Images stand in a ring, drawn by `seed`; an image takes the captions of those that follow it, so
    each caption is used equally often. Captions equal to its own are passed over, and an image that
    has no other is left out: of an arm with one caption, all are.
    """
    captions: dict[str, dict[int, str]] = {}
    for t in tuples:
        captions.setdefault(t.item.arm, {})[t.image] = t.item.caption
    others = {arm: _others(of_image, num_swaps, seed) for arm, of_image in captions.items()}
    own = [t for t in tuples if others[t.item.arm][t.image]]
    pairs = [(n, caption) for n, t in enumerate(own) for caption in others[t.item.arm][t.image]]
    swapped = [replace(own[n], item=replace(own[n].item, caption=c)) for n, c in pairs]
    return Swaps(own, swapped, [n for n, _ in pairs])


def _others(captions: Mapping[int, str], num_swaps: int, seed: int) -> dict[int, list[str]]:
    """Other captions for each image."""
    ring = sorted(captions)
    rng.python_random(seed, "swaps").shuffle(ring)
    found = {}
    for place, image in enumerate(ring):
        following = [captions[one] for one in (*ring[place + 1 :], *ring[:place])]
        different = [one for one in following if one != captions[image]]
        found[image] = different[:num_swaps]
    return found
