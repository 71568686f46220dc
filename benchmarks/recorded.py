"""Sweeps over recorded epochs: the real study and loop, with workers that train nothing."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lorasweep.config.build_run import build_run
from lorasweep.config.compose import compose
from lorasweep.config.run import Run
from lorasweep.lora_files.checkpoint import Checkpoint
from lorasweep.runs.session import EpochReport, Finished, Report, Started
from lorasweep.sweeps.study.search_space import Choice, Space
from lorasweep.sweeps.study.study import Study
from lorasweep.sweeps.study.trial import Trial
from lorasweep.sweeps.sweep_file import read_study_settings
from lorasweep.sweeps.sweep_limits import StopRules
from lorasweep.sweeps.sweep_loop import TrialsOneByOne

SCORE = "val/loss_rel"
Curve = Mapping[int, tuple[float, Sequence[float]]]
"""Epoch -> its score, and the terms that the score is the mean of."""


@dataclass(frozen=True)
class Point:
    """A trial that was trained to its end."""

    params: Mapping[str, Any]
    curve: Curve


def in_any_order(points: Sequence[Point], seed: int) -> list[Mapping[str, Any]]:
    """The points' parameters in an order drawn by `seed`."""
    return [point.params for point in random.Random(seed).sample(points, len(points))]


def replay(
    points: Sequence[Point],
    settings: Sequence[str],
    guesses: Sequence[Mapping[str, Any]],
    max_pack: int,
) -> tuple[float, int]:
    """The best score that a sweep over these points finds, and the epochs that it trains.

    `settings` are overrides of `study`; `guesses` come first, `max_pack` trials train at once.
    """
    num_epochs = max(len(point.curve) for point in points)
    config = compose(["experiment=demo", "hydra/sweeper=optuna", "study.name=r", *settings])
    demo = compose(["experiment=demo", f"trainer.max_train_epochs={num_epochs}"])
    like = build_run(demo, output_dir=Path("recorded"))
    with tempfile.TemporaryDirectory() as name:
        study = Study(
            read_study_settings(config, settings),
            _space(points),
            "recorded",
            Path(name),
            max_epochs=num_epochs,
            guesses=guesses,
        )
        workers = _Recorded({_key(point.params): point.curve for point in points}, max_pack)
        rules = StopRules(None, None, time.monotonic())
        prepare = partial(workers.prepare, like=like)
        TrialsOneByOne(study, prepare, workers, rules).run()
        attrs = [trial.user_attrs for trial in study.trials]
    return min(a["best"]["scores"][SCORE] for a in attrs), sum(int(a["epochs"]) for a in attrs)


def _space(points: Sequence[Point]) -> Space:
    values = {
        name: tuple(dict.fromkeys(point.params[name] for point in points))
        for name in points[0].params
    }
    return Space({n: Choice(n, v, tuple(map(str, v))) for n, v in values.items()}, {})


def _key(params: Mapping[str, Any]) -> str:
    return json.dumps(dict(sorted(params.items())))


class _Recorded:
    """Workers that give a sweep's loop what was recorded, an epoch of each run at a time."""

    def __init__(self, curves: Mapping[str, Curve], max_pack: int) -> None:
        self._curves, self.max_pack = curves, max_pack
        self._of: dict[str, Curve] = {}  # by the run's name
        self._epochs: dict[str, int] = {}  # of those that train
        self._dropped: list[str] = []

    def prepare(self, trial: Trial, like: Run) -> Run:
        run = replace(like, name=f"run-{trial.number}")
        self._of[run.name] = self._curves[_key(trial.params)]
        return run

    @property
    def has_room(self) -> bool:
        return len(self._epochs) - len(self._dropped) < self.max_pack

    def submit(self, run: Run) -> bool:
        if not self.has_room:
            return False
        self._epochs[run.name] = 0
        return True

    def drop(self, name: str) -> None:
        self._dropped.append(name)

    def events(self) -> list[Report]:
        found: list[Report] = []
        for name in self._dropped:
            del self._epochs[name]
            found.append(Finished(run=name, dropped=True))
        self._dropped = []
        for name in list(self._epochs):
            found += self._next_epoch(name)
        return found

    def _next_epoch(self, name: str) -> list[Report]:
        epoch = self._epochs[name] = self._epochs[name] + 1
        found: list[Report] = [Started(run=name, device="recorded")] if epoch == 1 else []
        value, terms = self._of[name][epoch]
        checkpoint = Checkpoint(path=Path(f"{name}-{epoch}"), run=name, epoch=epoch, step=epoch)
        scores, by_score = {SCORE: value}, {SCORE: list(terms)}
        found.append(EpochReport(run=name, checkpoint=checkpoint, scores=scores, terms=by_score))
        if epoch == len(self._of[name]):
            del self._epochs[name]
            found.append(Finished(run=name, dropped=False))
        return found

    def __enter__(self) -> _Recorded:
        return self

    def __exit__(self, *error: Any) -> None:
        self._epochs.clear()
