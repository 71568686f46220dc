"""What is said of a pick beside its score: whether it listens to captions, and what is wrong."""

from __future__ import annotations

import pytest

from candidates import candidate
from lorasweep.judging.pick_rule import Ranked
from lorasweep.runs.pick_words import Listening
from lorasweep.tracking import Candidate


def sweep(of_base: float | None, *found: Candidate) -> Listening:
    return Listening([Ranked([one], one.scores, {}) for one in found], of_base)


def listener(epoch: int, gain: float, low: float = 0.1, drift: float = 0.3) -> Candidate:
    return candidate(epoch, score=0.4, caption_gain=gain, caption_gain_lo=low, prior_drift=drift)


@pytest.mark.parametrize(
    ("of_base", "words"),
    [
        (0.12, "Listens to captions: 3.1x the base's (val/caption_gain 0.37, the base's 0.12)"),
        (-0.01, "Listens to captions: val/caption_gain 0.37, the base's -0.01"),
        (None, "Listens to captions: val/caption_gain 0.37"),
    ],
)
def test_how_much_a_pick_listens_is_told_beside_the_base(of_base: float, words: str) -> None:
    pick = listener(1, 0.37)
    assert sweep(of_base, pick).words(pick) == words


def test_where_captions_hardly_tell_images_apart_nothing_is_made_of_the_gain() -> None:
    """As of one figure in many poses: every gain is noise about zero."""
    pick, best = listener(1, -0.009, low=-0.02), listener(2, 0.002, low=-0.004)
    blind = sweep(0.001, pick, best)
    said = blind.words(pick)
    assert said is not None
    assert said.startswith("Captions hardly tell the held-out images apart (val/caption_gain is at")
    assert "most 0.002)" in said
    assert blind.warnings(pick) == []
    little = listener(4, 0.004, low=0.0004)  # surely, but it is nothing
    assert sweep(0.001, pick, little).is_blind
    # one that surely listens shows that they can be told apart
    able = sweep(0.001, pick, best, listener(3, 0.2))
    assert "less than the bare base" in able.warnings(pick)[0]


def test_without_any_gain_only_a_score_that_would_hold_one_is_explained() -> None:
    alone, old = candidate(1, score=0.4, loss_rel=0.4), candidate(1, loss_rel=0.4)
    said = sweep(None, alone).words(alone)
    assert said == "The held-out captions don't differ, so val/score is val/loss_rel alone."
    assert sweep(None, old).words(old) is None


def test_a_pick_that_listens_less_than_the_base_is_warned_of_with_the_best_that_does_not() -> None:
    pick, deaf, good = listener(1, 0.05), listener(2, 0.08), listener(3, 0.3)
    (said,) = sweep(0.12, pick, deaf, good).warnings(pick)
    assert said == (
        "Warning: a-e001 listens to captions less than the bare base (0.05, the base 0.12); the"
        " best without: a-e003. Look at the pictures."
    )
    assert sweep(0.12, pick, deaf, good).warnings(good) == []
    (said,) = sweep(0.5, pick, deaf, good).warnings(pick)
    assert "no other is free of that" in said


def test_a_pick_that_drifts_far_more_than_its_neighbours_is_warned_of() -> None:
    pick = listener(1, 0.3, drift=0.8)
    others = [listener(n, 0.3, drift=0.2 + n / 100) for n in range(2, 9)]
    (said,) = sweep(0.1, pick, *others).warnings(pick)
    assert (
        "drifts far more than those next to it (0.8; they 0.25); the best without: a-e002" in said
    )
    assert sweep(0.1, *others, pick).warnings(others[0]) == []
    # of two it can't be said which is out of line, unless all is forgotten
    assert sweep(0.1, pick, others[0]).warnings(pick) == []
    burnt = listener(1, 0.3, drift=1.08)
    (said,) = sweep(0.1, burnt, others[0]).warnings(burnt)
    assert "has forgotten what the base knew (drift 1.08); the best without: a-e002" in said
