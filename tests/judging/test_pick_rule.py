"""The rule by which a checkpoint is picked."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from lorasweep.judging.pick_rule import BOOTSTRAP, rank, ties

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


def by_the_letter(ours: Sequence[float], best: Sequence[float]) -> bool:
    """A tie by the bootstrap as it is defined, one resampling after the other."""
    gaps = [a - b for a, b in zip(ours, best, strict=True)]
    draw = random.Random(0)
    means = sorted(sum(draw.choices(gaps, k=len(gaps))) / len(gaps) for _ in range(BOOTSTRAP))
    return means[BOOTSTRAP // 40] <= 0


@pytest.mark.parametrize("num_terms", [1, 2, 5, 16])
def test_ties_are_those_of_a_bootstrap_by_the_letter(num_terms: int) -> None:
    """Also those that hang on the last bit: terms with few digits, whose sums are often zero."""
    random_terms = random.Random(num_terms)
    seen = set()
    for trial in range(60):
        digits = (1, 2, 7, 16)[trial % 4]
        best = [round(random_terms.uniform(0.2, 1.2), digits) for _ in range(num_terms)]
        ours = [round(term + random_terms.gauss(0.02, 0.05), digits) for term in best]
        pair = candidate(2, ours, loss_rel=0.8), candidate(1, best, loss_rel=0.7)
        assert ties(*pair, BY) == by_the_letter(ours, best), (ours, best)
        seen.add(ties(*pair, BY))
    assert seen == {False, True}


def test_20000_candidates_are_ranked_in_seconds() -> None:
    """A bootstrap for each by Python's own sums would take 40."""
    random_terms = random.Random(0)
    base = [random_terms.uniform(0.3, 1.2) for _ in range(16)]
    found = []
    for number in range(20_000):
        worse = random_terms.uniform(0, 0.5)
        terms = [term + worse + random_terms.gauss(0, 0.05) for term in base]
        found.append(candidate(number, terms, loss_rel=sum(terms) / 16, prior_drift=0.1))
    begun = time.process_time()
    rank(found, BY)
    assert time.process_time() - begun < 8


def test_of_a_gain_the_largest_is_best_and_ties_reach_up_to_it() -> None:
    by = "val/caption_gain"

    def gains(epoch: int, *terms: float, drift: float) -> Candidate:
        mean = sum(terms) / len(terms)
        return Candidate(epoch, {by: mean, "val/prior_drift": drift}, {by: terms})

    small, large = gains(1, 0.1, 0.2, drift=0.0), gains(2, 0.5, 0.7, drift=0.2)
    tied = gains(3, 0.6, 0.5, drift=0.1)
    assert epochs(rank([small, large, tied], by)) == [3, 2, 1]
    assert ties(tied, large, by)
    assert not ties(small, large, by)
    # without terms: within the best one's own interval
    alone = [
        Candidate(1, {by: 0.45}, {}),
        Candidate(2, {by: 0.5, f"{by}_lo": 0.44}, {}),
        Candidate(3, {by: 0.4}, {}),
    ]
    assert epochs(rank(alone, by)) == [1, 2, 3]
