"""The rule by which a checkpoint is picked."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
from scipy.stats import sem
from scipy.stats import t as student

from lorasweep.judging.pick_rule import Ranked, comparable, rank, ties

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


def test_the_best_score_comes_first_whatever_it_ties_with_and_however_far_it_drifts() -> None:
    found = [
        candidate(1, loss_rel=0.9, loss_rel_hi=0.91, prior_drift=0.0),
        candidate(2, loss_rel=0.7, loss_rel_hi=0.85, prior_drift=9.0),
        candidate(3, loss_rel=0.71, loss_rel_hi=0.81, prior_drift=1.0),
    ]
    assert epochs(rank(found, BY)) == [2, 3, 1]
    assert [ties(one, found[1], BY) for one in found] == [False, True, True]


def test_checkpoints_are_compared_image_by_image() -> None:
    """Images differ widely, but one checkpoint is worse on every one of them, another isn't."""
    hard_and_easy = [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    best = candidate(3, terms=hard_and_easy, loss_rel=0.7, loss_rel_hi=1.0)
    noise = [0.02, -0.02, 0.02, -0.02, 0.02, -0.01]
    like = [a + b for a, b in zip(hard_and_easy, noise, strict=True)]
    # nearer by its score than the other
    worse = candidate(4, terms=[term + 0.001 for term in hard_and_easy], loss_rel=0.701)
    assert ties(candidate(2, terms=like, loss_rel=0.7017), best, BY)
    assert not ties(worse, best, BY)


def test_of_equal_scores_the_earlier_epoch_comes_first() -> None:
    found = [candidate(7, loss_rel=0.7), candidate(4, loss_rel=0.7)]
    assert epochs(rank(found, BY)) == [4, 7]


OLD = candidate(1, loss_rel=0.5)
WHOLE = candidate(2, loss_rel=0.5, caption_gain=0.1, score=0.4)
BLIND = candidate(3, loss_rel=0.5, score=0.5)


@pytest.mark.parametrize(
    ("candidates", "asked", "by"),
    [
        ([WHOLE, WHOLE], "val/score", "val/score"),
        ([BLIND, BLIND], "val/score", "val/score"),
        ([OLD, OLD], "val/score", BY),
        ([OLD, WHOLE], "val/score", BY),
        ([BLIND, WHOLE], "val/score", BY),  # one of them has no gain to be counted
        ([WHOLE, candidate(4)], "val/score", "val/score"),  # what broke has no loss either
        ([candidate(4)], "val/score", "val/score"),
        ([OLD, WHOLE], "val/gap", "val/gap"),
    ],
)
def test_where_scores_do_not_compare_the_loss_does(
    candidates: list[Candidate], asked: str, by: str
) -> None:
    assert comparable(candidates, asked) == by


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
    def setting(name: str, *terms: Sequence[float]) -> list[Candidate]:
        return [Candidate(1, {BY: sum(of) / len(of)}, {BY: of}, name) for of in terms]

    best = setting("a", [0.4, 0.6, 0.5], [0.5, 0.5, 0.4])
    like = setting("b", [0.5, 0.5, 0.46], [0.4, 0.62, 0.45])
    worse = setting("c", [0.41, 0.61, 0.51], [0.51, 0.51, 0.41])  # on every image
    ranked = {one.file.setting: one for one in rank([*best, *worse, *like], BY)}
    assert list(ranked) == ["a", "b", "c"]
    assert [ties(ranked[name], ranked["a"], BY) for name in "bc"] == [True, False]


def test_of_a_gain_the_largest_is_best_and_ties_reach_up_to_it() -> None:
    by = "val/caption_gain"

    def gains(epoch: int, *terms: float, drift: float) -> Candidate:
        mean = sum(terms) / len(terms)
        return Candidate(epoch, {by: mean, "val/prior_drift": drift}, {by: terms})

    small, large = gains(1, 0.1, 0.2, drift=0.0), gains(2, 0.5, 0.7, drift=0.2)
    tied = gains(3, 0.59, 0.6, drift=0.1)
    assert epochs(rank([small, large, tied], by)) == [2, 3, 1]
    assert ties(tied, large, by)
    assert not ties(small, large, by)
    # without terms: within the best one's own interval
    alone = [
        Candidate(1, {by: 0.495}, {}),
        Candidate(2, {by: 0.5, f"{by}_lo": 0.44}, {}),
        Candidate(3, {by: 0.4}, {}),
    ]
    assert epochs(rank(alone, by)) == [2, 1, 3]
    assert [ties(one, alone[1], by) for one in alone] == [True, True, False]
