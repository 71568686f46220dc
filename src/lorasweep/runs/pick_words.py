"""What is said of a pick beside its score: does it listen to captions, and has it gone astray?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from lorasweep.judging.pick_rule import DRIFT, GAIN, LOSS, SCORE, Ranked
from lorasweep.tracking import Candidate

SMALL_GAIN = 0.01  # multiples of less say nothing, and if none has more, captions hardly matter
NEIGHBOURS = 9  # those ranked next, whose drift is the usual one
OUT_OF_LINE = 3.0  # times their median; picks of the recorded sweeps had at most 2
ALL_FORGOTTEN = 1.0
"""Drift at which predictions are as far from the base's as noise: of eight unrelated prompts, no
recorded checkpoint with more drew two so that they were recognised (benchmarks/README.md)."""


@dataclass(frozen=True)
class Listening:
    """How much the candidates of a sweep, and their base, listen to captions."""

    ranked: Sequence[Ranked[Candidate]]
    of_base: float | None
    """The bare base's own gain; None where it isn't known."""

    @property
    def is_blind(self) -> bool:
        """Do captions not tell the held-out images apart, as far as any candidate knows?"""
        gain = self._largest[GAIN]
        return gain < SMALL_GAIN or self._largest.get(f"{GAIN}_lo", gain) <= 0

    def words(self, winner: Candidate) -> str | None:
        """How much a candidate listens; None where that isn't known."""
        if GAIN not in winner.scores:
            is_by_score = SCORE in winner.scores
            none = f"The held-out captions don't differ, so {SCORE} is {LOSS} alone."
            return none if is_by_score else None
        if self.is_blind:
            return (
                f"Captions hardly tell the held-out images apart ({GAIN} is at most"
                f" {self._largest[GAIN]:.2g}), so whether it listens to them isn't known."
            )
        own, base = f"{GAIN} {winner.scores[GAIN]:.2f}", self.of_base
        if base is None:
            return f"Listens to captions: {own}"
        if base < SMALL_GAIN:
            return f"Listens to captions: {own}, the base's {base:.2f}"
        return (
            f"Listens to captions: {winner.scores[GAIN] / base:.1f}x the base's"
            f" ({own}, the base's {base:.2f})"
        )

    def warnings(self, winner: Candidate) -> list[str]:
        """What speaks against a pick, and the best of its rivals that has no such fault."""
        found = list(self._faults(winner))
        if not found:
            return []
        rivals = [one.file for one in self.ranked if winner not in one.checkpoints]
        good = next((one for one in rivals if not any(self._faults(one))), None)
        rest = "no other is free of that" if good is None else f"the best without: {good.name}"
        return [f"Warning: {winner.name} {' and '.join(found)}; {rest}. Look at the pictures."]

    @property
    def _largest(self) -> dict[str, float]:
        """The scores of the candidate that listens most."""
        listening = [one.file.scores for one in self.ranked if GAIN in one.file.scores]
        return dict(max(listening, key=lambda scores: scores[GAIN], default={GAIN: 0.0}))

    def _faults(self, one: Candidate) -> Iterator[str]:
        gain, drift = one.scores.get(GAIN), one.scores.get(DRIFT)
        base = self.of_base
        if gain is not None and base is not None and gain < base and not self.is_blind:
            yield f"listens to captions less than the bare base ({gain:.2f}, the base {base:.2f})"
        usual = self._usual_drift(one)
        if drift is None:
            return
        if drift >= ALL_FORGOTTEN:
            yield f"has forgotten what the base knew (drift {drift:.2f})"
        elif usual is not None and drift > OUT_OF_LINE * usual:
            yield f"drifts far more than those next to it ({drift:.2g}; they {usual:.2g})"

    def _usual_drift(self, one: Candidate) -> float | None:
        """The median of its neighbours' in the ranking; None where they are too few to tell."""
        others = [other.file for other in self.ranked if one not in other.checkpoints]
        drifts = [other.scores[DRIFT] for other in others[:NEIGHBOURS] if DRIFT in other.scores]
        return median(drifts) if len(drifts) >= NEIGHBOURS // 2 else None
