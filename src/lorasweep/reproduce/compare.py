"""A run beside the run it was to be: losses, weights, pictures, scores."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasweep.lora_files import checkpoint
from lorasweep.tracking.history import Log, LoggedCheckpoint, LoggedRun

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 1e-4
"""Relative difference of weights and losses that other packs, threads and devices may make."""

Verdict = Literal["bit-equal", "within rounding", "different", "not known"]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    verdict: Verdict
    detail: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """All that was compared."""

    rows: tuple[Row, ...]

    @property
    def verdict(self) -> Verdict:
        """Of the weights and the losses, which are the run; of what there is where files are gone.

        Without the weights nothing is called bit-equal.
        """
        found = {row.what: row.verdict for row in self.rows}
        weights, losses = found["weights"], found["losses"]
        if weights != "not known":
            return _worst((weights, losses))
        known = [verdict for verdict in found.values() if verdict != "not known"]
        return _worst(("within rounding", *known)) if known else "not known"

    def as_json(self) -> dict[str, Any]:
        """For reproduction.json."""
        return {"verdict": self.verdict, "rows": [asdict(row) for row in self.rows]}


def compare(
    log: Log, old: LoggedRun, new: LoggedRun, file: Path | None = None, until: int | None = None
) -> Comparison:
    """Everything that both runs of one store logged, up to the epoch `until`.

    `file` is a checkpoint of the old run that its user has, of the epoch `until`.
    """
    return Comparison(
        (
            _losses(log.curve(old, "train/loss"), log.curve(new, "train/loss")),
            _weights(log, log.checkpoints(old), log.checkpoints(new), file, until),
            _pictures(log, old, new),
            _scores(log, old, new),
        )
    )


def _losses(old: Mapping[int, float], new: Mapping[int, float]) -> Row:
    """Step by step, as far as both went; a digest of each series says whether all bits agree."""
    steps = sorted(set(old) & set(new))
    if not steps:
        return Row("losses", "not known", "no step that both have logged")
    gaps = [abs(old[step] - new[step]) / max(abs(old[step]), 1e-12) for step in steps]
    first = next((step for step in steps if not _same(old[step], new[step])), None)
    digests = [_digest(series[step] for step in steps) for series in (old, new)]
    numbers = {"steps": len(steps), "first": first, "digests": digests}
    if first is None:
        return Row("losses", "bit-equal", f"{len(steps)} steps, digest {digests[0]}", numbers)
    largest = max(gaps, key=lambda gap: math.inf if math.isnan(gap) else gap)
    return Row(
        "losses",
        _within(largest),
        f"{len(steps)} steps, digests {digests[0]} and {digests[1]}; first differs step {first},"
        f" by at most {largest:.2g} relative",
        {**numbers, "largest": largest},
    )


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _digest(values: Iterable[float]) -> str:
    return hashlib.sha256(b"".join(struct.pack("<d", value) for value in values)).hexdigest()[:12]


def _weights(
    log: Log,
    old: Mapping[int, LoggedCheckpoint],
    new: Mapping[int, LoggedCheckpoint],
    file: Path | None,
    until: int | None,
) -> Row:
    """By their hashes where all were logged; by their numbers where they differ."""
    epochs = [epoch for epoch in sorted(set(old) & set(new)) if until is None or epoch <= until]
    if not epochs:
        return Row("weights", "not known", "no epoch that both have a checkpoint of")
    hashes = [(old[epoch].hash, new[epoch].hash) for epoch in epochs]
    equal = [
        epoch for epoch, (a, b) in zip(epochs, hashes, strict=True) if a is not None and a == b
    ]
    if len(equal) == len(epochs):
        return Row("weights", "bit-equal", f"{len(epochs)} checkpoints, by their hashes")
    return _numbers(log, old[epochs[-1]], new[epochs[-1]], file, f"{len(equal)}/{len(epochs)}")


def _numbers(
    log: Log, old: LoggedCheckpoint, new: LoggedCheckpoint, file: Path | None, equal: str
) -> Row:
    with log.weights(old) as logged, log.weights(new) as ours:
        theirs = file or logged
        if theirs is None or ours is None:
            return Row("weights", "not known", _without_file(old, new, theirs is None, equal))
        modules, total = by_module(checkpoint.read(theirs)[0], checkpoint.read(ours)[0])
    worst = sorted(modules, key=lambda name: -modules[name])[:3]
    shown = ", ".join(f"{name} {modules[name]:.2g}" for name in worst)
    known_to_differ = old.hash is not None and old.hash != new.hash
    verdict: Verdict = _within(total) if total > 0 or known_to_differ else "bit-equal"
    return Row(
        "weights",
        verdict,
        f"epoch {old.epoch}: {total:.2g} relative, most in {shown}; {equal} checkpoints bit-equal",
        {"relative": total, "modules": modules},
    )


def _without_file(old: LoggedCheckpoint, new: LoggedCheckpoint, is_old: bool, equal: str) -> str:
    gone = old if is_old else new
    known = (
        f"by their hashes {equal} checkpoints are bit-equal" if old.hash else "no hash was logged"
    )
    return (
        f"{known}; {gone.candidate.name}'s file is gone, so how far it differs can't be said"
        " (tracking.upload=all keeps them)"
    )


def by_module(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> tuple[dict[str, float], float]:
    """||new - old|| / ||old|| of each module's tensors, and of all; inf where shapes differ."""
    squares: dict[str, list[float]] = {}
    for name in sorted({*old, *new}):
        pair = squares.setdefault(name.partition(".")[0], [0.0, 0.0])
        a, b = old.get(name), new.get(name)
        if a is None or b is None or a.shape != b.shape:
            pair[0] = math.inf
            continue
        pair[0] += float((a.double() - b.double()).square().sum())
        pair[1] += float(a.double().square().sum())
    relative = {name: _ratio(*pair) for name, pair in squares.items()}
    return relative, _ratio(
        sum(pair[0] for pair in squares.values()), sum(pair[1] for pair in squares.values())
    )


def _ratio(gap: float, size: float) -> float:
    if gap == 0:
        return 0.0
    return math.sqrt(gap / size) if size > 0 else math.inf


def _pictures(log: Log, old: LoggedRun, new: LoggedRun) -> Row:
    """Pixel by pixel, of 255."""
    import numpy as np

    theirs, ours = log.samples(old), log.samples(new)
    both = sorted(set(theirs) & set(ours), key=lambda one: (one[1], one[0]))
    if not both:
        return Row("pictures", "not known", "none that both have drawn")
    most, differing, mean = 0.0, 0, 0.0
    for key in both:
        pair = [
            np.asarray(log.picture(run, names[key]), dtype=np.float32)
            for run, names in ((old, theirs), (new, ours))
        ]
        if pair[0].shape != pair[1].shape:
            return Row("pictures", "different", f"{key[0]}, epoch {key[1]}: of another size")
        gap = np.abs(pair[0] - pair[1])
        most, mean = max(most, float(gap.max())), mean + float(gap.mean()) / len(both)
        differing += bool(gap.any())
    numbers = {"pictures": len(both), "differing": differing, "largest": most, "mean": mean}
    if not differing:
        return Row("pictures", "bit-equal", f"{len(both)} pictures, every pixel", numbers)
    verdict: Verdict = "within rounding" if most <= 2 else "different"
    return Row(
        "pictures",
        verdict,
        f"{differing} of {len(both)} differ, by at most {most:.0f} of 255, {mean:.2g} on average",
        numbers,
    )


def _scores(log: Log, old: LoggedRun, new: LoggedRun) -> Row:
    """Every score of every epoch that both have."""
    keys = [key for key in log.metrics(old) if not key.startswith("train/")]
    gaps: dict[str, float] = {}
    for key in keys:
        theirs, ours = log.curve(old, key), log.curve(new, key)
        for epoch in set(theirs) & set(ours):
            gap = 0.0 if _same(theirs[epoch], ours[epoch]) else abs(theirs[epoch] - ours[epoch])
            scale = max(abs(theirs[epoch]), 1e-12)
            gaps[key] = max(gaps.get(key, 0.0), gap / scale)
    if not gaps:
        return Row("scores", "not known", "none that both have")
    worst = max(gaps, key=lambda key: gaps[key])
    if gaps[worst] == 0:
        return Row("scores", "bit-equal", f"{len(gaps)} scores, every epoch", {"relative": gaps})
    detail = f"{len(gaps)} scores; {worst} by {gaps[worst]:.2g} relative"
    return Row("scores", _within(gaps[worst]), detail, {"relative": gaps})


def _within(relative: float) -> Verdict:
    return "within rounding" if relative <= ROUNDING else "different"


def _worst(verdicts: Iterable[Verdict]) -> Verdict:
    order: tuple[Verdict, ...] = ("bit-equal", "within rounding", "not known", "different")
    return max(verdicts, key=order.index)
