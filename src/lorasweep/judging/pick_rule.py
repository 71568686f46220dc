"""The rule by which a checkpoint is picked: smallest score; of close ties, the least drift."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DRIFT = "val/prior_drift"
LARGER_IS_BETTER = "val/caption_gain"
FEW_IMAGES = 8  # with fewer held-out ones the order of checkpoints is partly luck
BOOTSTRAP = 1000
TIE_BOUND = 0.02
"""How far above the smallest score, in parts of it, a tie may lie.

By so much another seed alone changes the score: over the five seeds of benchmarks/grids.json the
standard deviation of val/loss_rel of one setting and epoch is 0.8 % (median), 1.4 % for the runs
that come below 0.6.
"""
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantile of Student's t for 1, 2, … degrees of freedom; the last one for more."""


class HasScores(Protocol):
    """What the rule compares."""

    @property
    def epoch(self) -> int:
        """The epoch that it was written after."""

    @property
    def scores(self) -> Mapping[str, float]:
        """Its scores by name."""

    @property
    def terms(self) -> Mapping[str, Sequence[float]]:
        """What scores are means of, in the same order for all checkpoints that are compared."""


class HasSetting(HasScores, Protocol):
    """A checkpoint."""

    @property
    def setting(self) -> str | None:
        """Equal for runs that differ in their seed alone; None where that isn't known."""


T = TypeVar("T", bound=HasSetting)


@dataclass(frozen=True)
class Ranked(Generic[T]):
    """What is ranked: a checkpoint, or those of an epoch that differ in their seed alone."""

    checkpoints: Sequence[T]
    """The best by its own score first."""
    scores: Mapping[str, float]
    """Means over the seeds; `_lo` and `_hi` are then the 95 % interval of the mean over seeds."""
    terms: Mapping[str, Sequence[float]]

    @property
    def epoch(self) -> int:
        """The epoch that they were written after."""
        return self.checkpoints[0].epoch

    @property
    def file(self) -> T:
        """The checkpoint that is taken."""
        return self.checkpoints[0]


def with_finite_score(candidates: Iterable[T], by: str) -> list[T]:
    """Those that can be ranked by a score."""
    return [one for one in candidates if math.isfinite(one.scores.get(by, math.nan))]


def sign(by: str) -> int:
    """-1 for a score, or its part by arm, of which larger is better; else 1."""
    return -1 if by.startswith(LARGER_IS_BETTER) else 1


def rank(candidates: Iterable[T], by: str) -> list[Ranked[T]]:
    """Candidates with the best first, by a score; smaller is better unless its `sign` is -1.

    Checkpoints that differ in their seed alone count as one, by their mean. The scores are
    measured on few images, so the smallest is partly luck. As in the one-standard-error rule
    (Breiman et al., 1984), all that can't be told from the smallest one and lie close to it
    (`ties`) count as equal to it, and among them the most modest comes first: the lowest
    `val/prior_drift`, then the earlier epoch. The rest follow by their score.
    """
    found = by_setting(candidates, by)
    by_score = sorted(found, key=lambda one: (sign(by) * one.scores[by], one.epoch))

    def order(one: Ranked[T]) -> tuple[bool, float, int]:
        if ties(one, by_score[0], by):
            return False, one.scores.get(DRIFT, math.inf), one.epoch
        return True, sign(by) * one.scores[by], one.epoch

    return sorted(by_score, key=order)


def by_setting(candidates: Iterable[T], by: str) -> list[Ranked[T]]:
    """Candidates, those together that differ in their seed alone, in the order they come."""
    found: dict[tuple[object, int], list[T]] = {}
    for number, one in enumerate(candidates):
        found.setdefault((one.setting or number, one.epoch), []).append(one)
    return [_over_seeds(some, by) for some in found.values()]


def _over_seeds(some: Sequence[T], by: str) -> Ranked[T]:
    if len(some) == 1:
        return Ranked(some, some[0].scores, some[0].terms)
    best_first = sorted(some, key=lambda one: sign(by) * one.scores[by])
    shared = set.intersection(*(set(one.scores) for one in some))
    scores = {name: sum(one.scores[name] for one in some) / len(some) for name in shared}
    scores[f"{by}_lo"], scores[f"{by}_hi"] = interval_of_mean([one.scores[by] for one in some])
    terms = [one.terms.get(by, ()) for one in some]
    is_same = len({len(of) for of in terms}) == 1
    means = [sum(of) / len(of) for of in zip(*terms, strict=True)] if is_same else []
    return Ranked(best_first, scores, {by: means})


def interval_of_mean(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of what at least two seeds gave, by Student's t."""
    mean, freedom = sum(values) / len(values), len(values) - 1
    squares = sum((one - mean) * (one - mean) for one in values)  # inf, where ** and fsum raise
    half = T_975[min(freedom, len(T_975)) - 1] * math.sqrt(squares / freedom / len(values))
    return mean - half, mean + half


def ties(candidate: HasScores, smallest: HasScores, by: str) -> bool:
    """Does the candidate lie within TIE_BOUND of the smallest score, and can't be told from it?

    It can't where the 95 % interval of its distance to the smallest score holds zero; with few
    images nearly any distance has such an interval, hence the bound. Both were scored on the same
    images and noise, so they are compared image by image: how much images differ among themselves,
    which makes each score's own interval wide, drops out. Where a score's terms are not known, the
    candidate must lie within the smallest one's own interval.
    """
    gap = sign(by) * (candidate.scores[by] - smallest.scores[by])
    if gap > TIE_BOUND * abs(smallest.scores[by]):
        return False
    ours, best = candidate.terms.get(by), smallest.terms.get(by)
    if ours and best and len(ours) == len(best):
        return _reaches_zero([sign(by) * (a - b) for a, b in zip(ours, best, strict=True)])
    worst = f"{by}_hi" if sign(by) == 1 else f"{by}_lo"
    limit = smallest.scores.get(worst, smallest.scores[by])
    return gap <= max(0.0, sign(by) * (limit - smallest.scores[by]))


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
