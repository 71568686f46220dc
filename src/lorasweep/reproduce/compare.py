"""How far a run is the same as the run that it makes again: losses, weights, pictures, scores."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasweep.core.foreign_files import ForeignFileError
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.lora_files import checkpoint
from lorasweep.tracking.history import Log, LoggedRun
from lorasweep.tracking.read_candidates import Candidate, checkpoint_file

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 1e-4
"""Relative difference of weights and losses that other packs, threads and devices may make."""

Verdict = Literal["bit-equal", "within rounding", "different", "not known"]


@dataclass(frozen=True)
class ComparedRow:
    """One kind of result of both runs."""

    what: str
    verdict: Verdict
    detail: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """All that was compared."""

    rows: tuple[ComparedRow, ...]

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


def compare(
    log: Log,
    old: LoggedRun,
    new: LoggedRun,
    output_root: Path,
    file: Path | None = None,
    until: int | None = None,
) -> Comparison:
    """Everything that both runs of one store logged, up to the epoch `until`.

    Checkpoints are read below `output_root`, or are MLflow's copies. `file` is a checkpoint of the
    old run that its user has, of the epoch `until`.
    """
    return Comparison(
        (
            _losses(log.curve(old, "train/loss"), log.curve(new, "train/loss")),
            _weights(log, log.checkpoints(old), log.checkpoints(new), output_root, file, until),
            _pictures(log, old, new),
            _scores(log, old, new),
        )
    )


def _losses(old: Mapping[int, float], new: Mapping[int, float]) -> ComparedRow:
    """Step by step, as far as both went; a digest of each series says whether all bits agree."""
    steps = sorted(set(old) & set(new))
    if not steps:
        return ComparedRow("losses", "not known", "no step that both have logged")
    gaps = {step: _relative_gap(old[step], new[step]) for step in steps}
    first = next((step for step in steps if gaps[step] > 0), None)
    digests = [_digest(series[step] for step in steps) for series in (old, new)]
    numbers = {"steps": len(steps), "first": first, "digests": digests}
    if first is None:
        return ComparedRow(
            "losses", "bit-equal", f"{len(steps)} steps, digest {digests[0]}", numbers
        )
    largest = max(gaps.values())
    return ComparedRow(
        "losses",
        _within(largest),
        f"{len(steps)} steps, digests {digests[0]} and {digests[1]}; first differs step {first},"
        f" by at most {largest:.2g} relative",
        {**numbers, "largest": largest},
    )


def _relative_gap(old: float, new: float) -> float:
    """0 for two NaN, inf for one."""
    if old == new or (math.isnan(old) and math.isnan(new)):
        return 0.0
    gap = abs(old - new) / max(abs(old), 1e-12)
    return math.inf if math.isnan(gap) else gap


def _digest(values: Iterable[float]) -> str:
    return hashlib.sha256(b"".join(struct.pack("<d", value) for value in values)).hexdigest()[:12]


def _weights(
    log: Log,
    old: Mapping[int, Candidate],
    new: Mapping[int, Candidate],
    output_root: Path,
    file: Path | None,
    until: int | None,
) -> ComparedRow:
    """By their hashes where all were logged; by their numbers where they differ."""
    epochs = [epoch for epoch in sorted(set(old) & set(new)) if until is None or epoch <= until]
    if not epochs:
        return ComparedRow("weights", "not known", "no epoch that both have a checkpoint of")
    equal = [e for e in epochs if old[e].hash is not None and old[e].hash == new[e].hash]
    if len(equal) == len(epochs):
        return ComparedRow("weights", "bit-equal", f"{len(epochs)} checkpoints, by their hashes")
    then, now, share = old[epochs[-1]], new[epochs[-1]], f"{len(equal)}/{len(epochs)} checkpoints"
    with (
        checkpoint_file(log.uri, then, output_root) as logged,
        checkpoint_file(log.uri, now, output_root) as ours,
    ):
        theirs = file or logged
        if theirs is None or ours is None:
            gone = then if theirs is None else now
            known = f"by their hashes {share} are bit-equal" if then.hash else "no hash was logged"
            return ComparedRow(
                "weights",
                "not known",
                f"{known}; {gone.name}'s file is gone, so how far it differs can't be"
                " said (tracking.upload=all keeps them)",
            )
        try:
            modules, total = by_module(checkpoint.read(theirs)[0], checkpoint.read(ours)[0])
        except CheckpointError as error:
            return ComparedRow("weights", "not known", f"{share} are bit-equal; {error}")
    most = sorted(modules, key=lambda name: -modules[name])[:3]
    named = ", ".join(f"{name} {modules[name]:.2g}" for name in most)
    known_to_differ = then.hash is not None and then.hash != now.hash
    return ComparedRow(
        "weights",
        _within(total) if total > 0 or known_to_differ else "bit-equal",
        f"epoch {then.epoch}: {total:.2g} relative, most in {named}; {share} bit-equal",
        {"relative": total, "modules": modules},
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


def _pictures(log: Log, old: LoggedRun, new: LoggedRun) -> ComparedRow:
    """Pixel by pixel, of 255."""
    import numpy as np

    theirs, ours = log.samples(old), log.samples(new)
    both = sorted(set(theirs) & set(ours), key=lambda one: (one[1], one[0]))
    if not both:
        return ComparedRow("pictures", "not known", "none that both have drawn")
    most, differing, mean = 0.0, 0, 0.0
    for key in both:
        try:
            pair = [
                np.asarray(log.picture(run, names[key]), dtype=np.float32)
                for run, names in ((old, theirs), (new, ours))
            ]
        except ForeignFileError as error:
            return ComparedRow("pictures", "not known", str(error))
        if pair[0].shape != pair[1].shape:
            return ComparedRow(
                "pictures", "different", f"{key[0]}, epoch {key[1]}: of another size"
            )
        gap = np.abs(pair[0] - pair[1])
        most, mean = max(most, float(gap.max())), mean + float(gap.mean()) / len(both)
        differing += bool(gap.any())
    numbers = {"pictures": len(both), "differing": differing, "largest": most, "mean": mean}
    if not differing:
        return ComparedRow("pictures", "bit-equal", f"{len(both)} pictures, every pixel", numbers)
    verdict: Verdict = "within rounding" if most <= 2 else "different"
    return ComparedRow(
        "pictures",
        verdict,
        f"{differing} of {len(both)} differ, by at most {most:.0f} of 255, {mean:.2g} on average",
        numbers,
    )


def _scores(log: Log, old: LoggedRun, new: LoggedRun) -> ComparedRow:
    """Every score of every epoch that both have."""
    gaps: dict[str, float] = {}
    for key in [key for key in log.metrics(old) if not key.startswith("train/")]:
        theirs, ours = log.curve(old, key), log.curve(new, key)
        if both := set(theirs) & set(ours):
            gaps[key] = max(_relative_gap(theirs[epoch], ours[epoch]) for epoch in both)
    if not gaps:
        return ComparedRow("scores", "not known", "none that both have")
    worst = max(gaps, key=lambda key: gaps[key])
    if not gaps[worst]:
        return ComparedRow(
            "scores", "bit-equal", f"{len(gaps)} scores, every epoch", {"relative": gaps}
        )
    detail = f"{len(gaps)} scores; {worst} by {gaps[worst]:.2g} relative"
    return ComparedRow("scores", _within(gaps[worst]), detail, {"relative": gaps})


def _within(relative: float) -> Verdict:
    return "within rounding" if relative <= ROUNDING else "different"


def _worst(verdicts: Iterable[Verdict]) -> Verdict:
    order: tuple[Verdict, ...] = ("bit-equal", "within rounding", "not known", "different")
    return max(verdicts, key=order.index)
