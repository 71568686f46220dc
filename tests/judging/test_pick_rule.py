"""The rule by which a checkpoint is picked."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
from scipy.stats import sem
from scipy.stats import t as student

from lorasweep.judging.pick_rule import BOOTSTRAP, Ranked, rank, ties

BY = "val/loss_rel"


@dataclass(frozen=True)
class Candidate:
    epoch: int
    scores: Mapping[str, float]
    terms: Mapping[str, Sequence[float]]
    setting: str | None = None


def candidate(epoch: int, terms: Sequence[float] = (), **scores: float) -> Candidate:
    named = {f"val/{key}": value for key, value in scores.items()}
    return Candidate(epoch, named, {BY: terms})


def epochs(ranked: list[Ranked[Candidate]]) -> list[int]:
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
        candidate(2, loss_rel=0.71, prior_drift=0.2),
        candidate(3, loss_rel=0.7, loss_rel_hi=0.75, prior_drift=0.9),
        candidate(4, loss_rel=0.712, prior_drift=0.5),
    ]
    assert epochs(rank(found, BY)) == [2, 4, 3, 1]


def test_a_tie_lies_close_to_the_smallest_score_however_wide_its_interval() -> None:
    """Of four held-out images one outlier makes any interval hold zero: 0.579 won over 0.353."""
    best = candidate(2, terms=[0.2, 0.3, 0.4, 0.512], loss_rel=0.353, prior_drift=0.9)
    far = candidate(1, terms=[0.75, 0.7, 0.5, 0.366], loss_rel=0.579, prior_drift=0.1)
    close = candidate(3, terms=[0.3, 0.3, 0.4, 0.424], loss_rel=0.356, prior_drift=0.3)
    assert by_the_letter(far.terms[BY], best.terms[BY])
    assert epochs(rank([best, far, close], BY)) == [3, 2, 1]
    # by the interval of the score itself, where terms are not known
    wide = candidate(2, loss_rel=0.353, loss_rel_hi=0.7, prior_drift=0.9)
    assert epochs(rank([wide, candidate(1, loss_rel=0.579, prior_drift=0.1)], BY)) == [2, 1]


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
        candidate(4, loss_rel=0.71, prior_drift=0.5),
    ]
    assert epochs(rank(found, BY)) == [4, 7]


def test_a_candidate_without_drift_loses_a_tie() -> None:
    found = [
        candidate(1, loss_rel=0.7, loss_rel_hi=0.8),
        candidate(2, loss_rel=0.71, prior_drift=0.5),
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
        pair = candidate(2, ours, loss_rel=0.71), candidate(1, best, loss_rel=0.7)
        assert ties(*pair, BY) == by_the_letter(ours, best), (ours, best)
        seen.add(ties(*pair, BY))
    assert seen == {False, True}


def seeds(setting: str, epoch: int, *scores: float) -> list[Candidate]:
    return [Candidate(epoch, {BY: score}, {}, setting) for score in scores]


def test_what_differs_in_its_seed_alone_is_ranked_by_the_mean_over_seeds() -> None:
    """One seed of the first setting has the smallest score of all."""
    lucky, steady = seeds("a", 1, 0.60, 0.48, 0.75), seeds("b", 1, 0.52, 0.50, 0.51)
    other_epoch, alone = seeds("b", 2, 0.56), [candidate(1, loss_rel=0.58)]
    ranked = rank([*lucky, *other_epoch, *steady, *alone], BY)
    assert [one.scores[BY] for one in ranked] == pytest.approx([0.51, 0.56, 0.58, 0.61])
    assert [one.file.scores[BY] for one in ranked] == [0.50, 0.56, 0.58, 0.48]
    assert [len(one.checkpoints) for one in ranked] == [3, 1, 1, 3]


def test_scores_too_large_to_add_come_last() -> None:
    huge = seeds("a", 1, 1.7e308, 1.7e308, 0.1)
    ranked = rank([*huge, candidate(1, loss_rel=0.5)], BY)
    assert [one.file.scores[BY] for one in ranked] == [0.5, 0.1]


@pytest.mark.parametrize("number", [2, 3, 6, 12])
def test_the_interval_over_seeds_is_students(number: int) -> None:
    draw = random.Random(number)
    scores = [draw.uniform(0.4, 0.6) for _ in range(number)]
    (one,) = rank(seeds("a", 1, *scores), BY)
    low, high = student.interval(0.95, number - 1, loc=statistics.fmean(scores), scale=sem(scores))
    found = one.scores[f"{BY}_lo"], one.scores[f"{BY}_hi"]
    assert found == pytest.approx((low, high), abs=0.003)


def test_ties_of_settings_are_those_of_their_means_image_by_image() -> None:
    def setting(name: str, drift: float, *terms: Sequence[float]) -> list[Candidate]:
        return [
            Candidate(1, {BY: sum(of) / len(of), "val/prior_drift": drift}, {BY: of}, name)
            for of in terms
        ]

    best = setting("a", 0.9, [0.4, 0.6, 0.5], [0.5, 0.5, 0.4])
    like = setting("b", 0.1, [0.5, 0.5, 0.46], [0.4, 0.62, 0.45])
    worse = setting("c", 0.0, [0.41, 0.61, 0.51], [0.51, 0.51, 0.41])  # on every image
    assert [one.file.setting for one in rank([*best, *worse, *like], BY)] == ["b", "a", "c"]


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
    tied = gains(3, 0.59, 0.6, drift=0.1)
    assert epochs(rank([small, large, tied], by)) == [3, 2, 1]
    assert ties(tied, large, by)
    assert not ties(small, large, by)
    # without terms: within the best one's own interval
    alone = [
        Candidate(1, {by: 0.495}, {}),
        Candidate(2, {by: 0.5, f"{by}_lo": 0.44}, {}),
        Candidate(3, {by: 0.4}, {}),
    ]
    assert epochs(rank(alone, by)) == [1, 2, 3]
