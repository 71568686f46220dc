"""The rule by which a checkpoint is picked: the best score, of seeds together by their mean."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

SCORE = "val/score"
"""LOSS - GAIN, the default: how close a checkpoint comes to the images, and how much it listens."""
LOSS, GAIN = "val/loss_rel", "val/caption_gain"
DRIFT = "val/prior_drift"
LARGER_IS_BETTER = GAIN
FEW_IMAGES = 8  # with fewer held-out ones the order of checkpoints is partly luck
BOOTSTRAP = 1000
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


def comparable(candidates: Iterable[HasScores], by: str) -> str:
    """The score that candidates are ranked by: LOSS in place of SCORE where that can't compare.

    Older versions gave no SCORE, and it holds no GAIN where captions don't tell images apart: what
    lacks one is compared with others by the loss alone.
    """
    scored = [one.scores for one in candidates if LOSS in one.scores]
    if by != SCORE or not scored:
        return by
    is_whole = all(SCORE in one for one in scored)
    return SCORE if is_whole and len({GAIN in one for one in scored}) == 1 else LOSS


def rank(candidates: Iterable[T], by: str) -> list[Ranked[T]]:
    """Candidates with the best first, by a score; smaller is better unless its `sign` is -1.

    Checkpoints that differ in their seed alone count as one, by their mean. Of equal scores the
    earlier epoch comes first. What can't be told from the best (`ties`) is not put before it: taken
    by the least drift, as the one-standard-error rule would have it (Breiman et al., 1984), ties
    draw worse pictures than the best score does (benchmarks/README.md, Choosing).
    """
    found = by_setting(candidates, by)
    return sorted(found, key=lambda one: (sign(by) * one.scores[by], one.epoch))


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


def ties(candidate: HasScores, best: HasScores, by: str) -> bool:
    """Can a candidate not be told from the one with the best score?

    It can't where the 95 % interval of its distance to the best score holds zero. Both were scored
    on the same images and noise, so they are compared image by image: how much images differ among
    themselves, which makes each score's own interval wide, drops out. Where a score's terms are not
    known, the candidate must lie within the best one's own interval.
    """
    gap = sign(by) * (candidate.scores[by] - best.scores[by])
    ours, theirs = candidate.terms.get(by), best.terms.get(by)
    if ours and theirs and len(ours) == len(theirs):
        return reaches_zero([sign(by) * (a - b) for a, b in zip(ours, theirs, strict=True)])
    worst = f"{by}_hi" if sign(by) == 1 else f"{by}_lo"
    limit = best.scores.get(worst, best.scores[by])
    return gap <= max(0.0, sign(by) * (limit - best.scores[by]))


def reaches_zero(gaps: Sequence[float]) -> bool:
    """Is the 2.5 % quantile of their mean, by bootstrap, at most zero?"""
    draw = random.Random(0)  # the same resamplings each time
    sums = sorted(sum(draw.choices(gaps, k=len(gaps))) for _ in range(BOOTSTRAP))
    return sums[BOOTSTRAP // 40] <= 0
