"""Scores of checkpoints, made from the written file on the clean base. One file a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lorasweep.adapters.pack import Pack
from lorasweep.latents import Item
from lorasweep.models import BaseModel

Scores = Mapping[str, float]
"""Name (val/loss_rel) to value."""

Terms = Mapping[str, Sequence[float]]
"""Name to what a score is the mean of, in an order that is the same for all checkpoints."""


@dataclass(frozen=True)
class Scored:
    """What one metric says of one checkpoint; terms let `pick` compare checkpoints in pairs."""

    scores: Scores
    terms: Terms = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Images:
    """What a metric may look at: the training images and the held-out ones, by arm."""

    train: Sequence[Item]
    holdout: Sequence[Item]


class Scorer(Protocol):
    """A metric made ready for one base model and one set of images."""

    def baseline(self) -> Scores:
        """The bare base model's own scores, where curves begin."""

    def score(self, pack: Pack) -> list[Scored]:
        """Scores of each checkpoint in the pack, in its order."""


class Metric(Protocol):
    """Settings of a metric."""

    def prepare(self, base: BaseModel, images: Images) -> Scorer | None:
        """What the base alone gives is computed here, once. None if there is nothing to score."""
