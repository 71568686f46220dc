"""The rule by which a checkpoint is picked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorasweep.judging.pick_rule import rank

BY = "val/loss_rel"


@dataclass(frozen=True)
class Candidate:
    epoch: int
    scores: Mapping[str, float]
    terms: Mapping[str, Sequence[float]]


def candidate(epoch: int, terms: Sequence[float] = (), **scores: float) -> Candidate:
    named = {f"val/{key}": value for key, value in scores.items()}
    return Candidate(epoch, named, {BY: terms})


def epochs(ranked: list[Candidate]) -> list[int]:
    return [one.epoch for one in ranked]


def test_without_ties_the_order_is_that_of_the_score() -> None:
    found = [
        candidate(1, loss_rel=0.9, loss_rel_hi=0.91, prior_drift=0.0),
        candidate(2, loss_rel=0.7, loss_rel_hi=0.71, prior_drift=9.0),
        candidate(3, loss_rel=0.8, loss_rel_hi=0.81, prior_drift=1.0),
    ]
    assert epochs(rank(found, BY)) == [2, 3, 1]


def test_within_the_interval_of_the_smallest_the_lowest_drift_wins() -> None:
    found = [
        candidate(1, loss_rel=0.9, prior_drift=0.1),
        candidate(2, loss_rel=0.73, prior_drift=0.2),
        candidate(3, loss_rel=0.7, loss_rel_hi=0.75, prior_drift=0.9),
        candidate(4, loss_rel=0.74, prior_drift=0.5),
    ]
    assert epochs(rank(found, BY)) == [2, 4, 3, 1]


def test_checkpoints_are_compared_image_by_image() -> None:
    """Images differ widely, but the first checkpoint is worse on every one of them."""
    hard_and_easy = [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    best = candidate(3, terms=hard_and_easy, loss_rel=0.7, loss_rel_hi=1.0, prior_drift=0.9)
    worse = candidate(
        1, terms=[term + 0.1 for term in hard_and_easy], loss_rel=0.8, prior_drift=0.1
    )
    noise = [0.02, -0.02, 0.02, -0.02, 0.02, -0.01]
    like = candidate(
        2,
        terms=[a + b for a, b in zip(hard_and_easy, noise, strict=True)],
        loss_rel=0.7017,
        prior_drift=0.5,
    )
    # second by its score, but worse on every image: no tie, although a larger score is one
    near = candidate(
        4, terms=[term + 0.001 for term in hard_and_easy], loss_rel=0.701, prior_drift=0.0
    )
    assert epochs(rank([worse, like, near, best], BY)) == [2, 3, 4, 1]


def test_of_equal_drift_the_earlier_epoch_wins() -> None:
    found = [
        candidate(7, loss_rel=0.7, loss_rel_hi=0.8, prior_drift=0.5),
        candidate(4, loss_rel=0.75, prior_drift=0.5),
    ]
    assert epochs(rank(found, BY)) == [4, 7]


def test_a_candidate_without_drift_loses_a_tie() -> None:
    found = [
        candidate(1, loss_rel=0.7, loss_rel_hi=0.8),
        candidate(2, loss_rel=0.75, prior_drift=0.5),
    ]
    assert epochs(rank(found, BY)) == [2, 1]
