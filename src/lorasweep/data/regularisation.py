"""Regularisation images: as many of them in an epoch as there are images that are trained on.

They show the model what it knows of the class already, so that the LoRA doesn't forget it
(DreamBooth, arXiv 2208.12242).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from lorasweep.data.latents import Item

log = logging.getLogger(__name__)


def balanced(items: Sequence[Item], num_train: int) -> list[Item]:
    """The items with the repeats that sd-scripts gives them beside `num_train` images with theirs.

    Those that don't fit are left out.
    """
    repeats: list[int] = []
    for item in items:
        if sum(repeats) >= num_train:
            break
        repeats.append(item.repeats)
    left = num_train - sum(repeats)
    if len(repeats) < len(items):
        log.warning(
            "regularisation images: the first %d of %d are as many, with repeats, as the %d images"
            " that are trained on; the others are not used",
            *(len(repeats), len(items), num_train),
        )
    if repeats and left > 0:  # once more each, in turn
        rounds, rest = divmod(left, len(repeats))
        repeats = [one + rounds + (index < rest) for index, one in enumerate(repeats)]
    return [
        replace(item, repeats=number, is_reg=True)
        for item, number in zip(items, repeats, strict=False)
    ]
