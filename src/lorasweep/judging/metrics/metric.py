"""Scores of checkpoints, made from the written file on the clean base. One file a metric."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from lorasweep.adapters.pack import Pack
from lorasweep.data.latents import Item
from lorasweep.models.base_model import BaseModel

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
    reg: Sequence[Item] = ()
    """Regularisation images, which are trained on too."""

    @property
    def trained(self) -> Sequence[Item]:
        """All that an epoch sees."""
        return [*self.train, *self.reg]


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


@runtime_checkable
class Named(Protocol):
    """A metric that knows its scores before any work, so that a wrong objective is refused then."""

    def names(self, arms: Collection[str], num_holdout: int) -> Mapping[str, bool]:
        """The scores that it will give, and whether each has terms."""


def names(
    metrics: Iterable[Metric], arms: Collection[str], num_holdout: int
) -> Mapping[str, bool] | None:
    """The scores that runs will have, and whether each has terms; None if one doesn't say."""
    found: dict[str, bool] = {}
    for metric in metrics:
        if not isinstance(metric, Named):
            return None
        found.update(metric.names(arms, num_holdout))
    return found
