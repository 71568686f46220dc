"""The rule by which a checkpoint is picked: smallest score, ties by an interval, least drift."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DRIFT = "val/prior_drift"
LARGER_IS_BETTER = "val/caption_gain"
BOOTSTRAP = 1000


class HasScores(Protocol):
    """What the rule looks at of a checkpoint."""

    @property
    def epoch(self) -> int:
        """The epoch that it was written after."""

    @property
    def scores(self) -> Mapping[str, float]:
        """Its scores by name."""

    @property
    def terms(self) -> Mapping[str, Sequence[float]]:
        """What scores are means of, in the same order for all checkpoints that are compared."""


T = TypeVar("T", bound=HasScores)


def with_finite_score(candidates: Iterable[T], by: str) -> list[T]:
    """Those that can be ranked by a score."""
    return [one for one in candidates if math.isfinite(one.scores.get(by, math.nan))]


def sign(by: str) -> int:
    """-1 for a score, or its part by arm, of which larger is better; else 1."""
    return -1 if by.startswith(LARGER_IS_BETTER) else 1


def rank(candidates: Iterable[T], by: str) -> list[T]:
    """Candidates with the best first, by a score; smaller is better unless its `sign` is -1.

    The scores are measured on few images, so the smallest is partly luck. As in the
    one-standard-error rule (Breiman et al., 1984), all that can't be told from the smallest one
    (`ties`) count as equal to it, and among them the most modest comes first: the lowest
    `val/prior_drift`, then the earlier epoch. The rest follow by their score.
    """
    by_score = sorted(candidates, key=lambda one: (sign(by) * one.scores[by], one.epoch))

    def order(one: T) -> tuple[bool, float, int]:
        if ties(one, by_score[0], by):
            return False, one.scores.get(DRIFT, math.inf), one.epoch
        return True, sign(by) * one.scores[by], one.epoch

    return sorted(by_score, key=order)


def ties(candidate: HasScores, smallest: HasScores, by: str) -> bool:
    """Does the 95 % interval of the candidate's distance to the smallest score hold zero?

    Both were scored on the same images and noise, so they are compared image by image: how much
    images differ among themselves, which makes each score's own interval wide, drops out. Where a
    score's terms are not known, the candidate must lie within the smallest one's own interval.
    """
    ours, best = candidate.terms.get(by), smallest.terms.get(by)
    if ours and best and len(ours) == len(best):
        return _reaches_zero([sign(by) * (a - b) for a, b in zip(ours, best, strict=True)])
    worst = f"{by}_hi" if sign(by) == 1 else f"{by}_lo"
    limit = sign(by) * smallest.scores.get(worst, smallest.scores[by])
    return sign(by) * candidate.scores[by] <= max(limit, sign(by) * smallest.scores[by])


def _reaches_zero(gaps: Sequence[float]) -> bool:
    """Is the 2.5 % quantile of their mean, by bootstrap, at most zero?"""
    if min(gaps) > 0:  # as it is for most of a sweep: so is then the mean of any draw
        return False
    if max(gaps) <= 0:
        return True
    import numpy as np

    # row by row, which adds up each draw in its order
    means = np.array(gaps)[_draws(len(gaps))].sum(axis=0) / len(gaps)
    return int(np.count_nonzero(means <= 0)) > BOOTSTRAP // 40


@lru_cache(maxsize=4)
def _draws(size: int) -> NDArray[np.intp]:
    """Which of `size` terms each resampling takes, the same each time: (size, BOOTSTRAP)."""
    import numpy as np

    draw = random.Random(0)
    drawn = [draw.choices(range(size), k=size) for _ in range(BOOTSTRAP)]
    return np.array(drawn, dtype=np.intp).T.copy()
