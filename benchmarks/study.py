"""What a sweep costs and saves: `python -m benchmarks.study bookkeeping | tpe | pruner`.

- bookkeeping: CPU of asking, reporting (3 epochs), pruning and telling, a trial, in a study of
  1,000 on the journal. Target: at most 50 ms, flat from the 100th to the 1,000th. The first row is
  ours and the journal's; what a sampler or pruner of Optuna's adds is the difference of rows. What
  Hydra takes to compose a job comes on top and is printed beside it.
- tpe: on the demo, a TPE sweep of 12 trials with pruning against the grid of 16 points over the
  same ranges: best score and epochs trained, over seeds. Target: as good, in fewer epochs.
- pruner: on the demo, 12 random trials with the pruner and without. Target: an equal best.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import show
from lorasweep import cli
from lorasweep.config import compose, register_resolvers
from lorasweep.jobs import study_settings
from lorasweep.study.settings import StudySettings
from lorasweep.study.space import Choice, Number, Space
from lorasweep.study.storage import find_journal, open_storage
from lorasweep.study.study import Study

SCORE = "val/loss_rel"
RANKS, RATES = (4, 8, 16, 32), (3e-4, 1e-3, 3e-3, 1e-2)
SAMPLE = ["sampling.every_n_epochs=0"]  # pictures cost the same on both sides


def main() -> None:
    """Run one benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["bookkeeping", "tpe", "pruner"])
    parser.add_argument("--seeds", type=int, default=5, help="seeds to repeat with (default 5)")
    parser.add_argument("--trials", type=int, default=1000, help="of bookkeeping (default 1000)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
    given = parser.parse_args()
    if given.what == "bookkeeping":
        _bookkeeping(given.trials)
    elif given.what == "tpe":
        _compare(given.seeds, {"grid of 16": _GRID, "TPE, 12 trials": _TPE}, given.overrides)
    else:
        _compare(given.seeds, {"all epochs": _RANDOM, "pruned": _PRUNED}, given.overrides)


_SPACE = [f"adapter.rank=choice({','.join(map(str, RANKS))})"]
_FREE = [*_SPACE, f"optimizer.unet_lr=tag(log,interval({RATES[0]},{RATES[-1]}))"]
_ASHA = ["study.pruner=asha", "study.pruner_options={reduction_factor: 3}", "study.min_epochs=4"]
_FIXED = [*_SPACE, f"optimizer.unet_lr=choice({','.join(map(str, RATES))})"]
_GRID = [*_FIXED, "study.sampler=grid", "study.n_trials=16", "study.pruner=none"]
_TPE = [*_FREE, "study.sampler=tpe", "study.n_trials=12", *_ASHA]
_RANDOM = [*_FREE, "study.sampler=random", "study.n_trials=12", "study.pruner=none"]
_PRUNED = [*_FREE, "study.sampler=random", "study.n_trials=12", *_ASHA]


@dataclass(frozen=True)
class Result:
    """What a sweep came to."""

    best: float
    epochs: int
    seconds: float


def _compare(seeds: int, cases: dict[str, list[str]], overrides: Sequence[str]) -> None:
    rows = []
    for seed in range(seeds):
        for name, case in cases.items():
            result = _sweep(seed, [*case, *overrides])
            row = [
                name,
                str(seed),
                f"{result.best:.4f}",
                str(result.epochs),
                f"{result.seconds:.0f}",
            ]
            rows.append(row)
            print(" | ".join(row), flush=True)
    show("Sweeps of the demo", ["sweep", "seed", f"best {SCORE}", "epochs", "seconds"], rows)


def _sweep(seed: int, case: Sequence[str]) -> Result:
    """Run a sweep of the demo from nothing, with a seed for the search and for the runs."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        places = [f"output_root={name}", f"cache_dir={name}/cache"]
        own = [f"seed={seed}", f"study.seed={seed}", "experiment=demo"]
        cli.main(["train", "-m", "hydra/sweeper=optuna", *own, *SAMPLE, *places, *case])
        trials = _trials(Path(name))
    values = [attrs["best"]["scores"][SCORE] for attrs in trials if "best" in attrs]
    epochs = sum(int(attrs.get("epochs", 0)) for attrs in trials)
    return Result(min(values), epochs, time.perf_counter() - began)


def _trials(output_root: Path) -> list[dict[str, Any]]:
    from optuna import load_study

    journal = find_journal(None, output_root)
    storage = open_storage(str(journal), journal.parent)
    return [t.user_attrs for t in load_study(study_name=None, storage=storage).trials]


def _bookkeeping(num_trials: int) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for sampler, pruner in (("random", "none"), ("random", "median"), ("tpe", "median")):
            folder = Path(name) / "b" / f"{sampler}-{pruner}"
            seconds = _ask_and_tell(_settings(sampler, pruner, num_trials), folder)
            rows.append([sampler, pruner, *_around(seconds)])
            print(" | ".join(rows[-1]), flush=True)
    columns = ["sampler", "pruner", "around the 100th", "the 500th", "the last", "mean"]
    show(f"CPU ms a trial, of {num_trials} (target: at most 50, flat)", columns, rows)
    register_resolvers()
    began = time.process_time()
    for rank in range(1, 11):
        compose(["experiment=demo", f"adapter.rank={rank}"])
    print(f"Composing one job with Hydra: {(time.process_time() - began) * 100:.0f} ms of CPU")


def _settings(sampler: str, pruner: str, num_trials: int) -> StudySettings:
    config = compose(
        [
            "experiment=demo",
            "hydra/sweeper=optuna",
            f"study.n_trials={num_trials}",
            f"study.sampler={sampler}",
            f"study.pruner={pruner}",
            "study.name=bench",
        ]
    )
    settings: StudySettings = study_settings(config)
    return settings


def _ask_and_tell(settings: StudySettings, folder: Path) -> list[float]:
    """CPU seconds of each trial."""
    ranks = Choice("adapter.rank", RANKS, tuple(map(str, RANKS)))
    rates = Number("optimizer.unet_lr", RATES[0], RATES[-1], log=True)
    space = Space({"adapter.rank": ranks, "optimizer.unet_lr": rates}, {})
    study = Study(settings, space, "bench", folder, max_epochs=3)
    seconds: list[float] = []
    while True:
        began = time.process_time()
        trial = study.next()
        if trial is None:
            return seconds
        trial.plan(3)
        for epoch in (1, 2, 3):
            value = abs(float(trial.params["optimizer.unet_lr"]) - 1e-3) + 1 / epoch
            trial.report(epoch, Path("x"), {SCORE: value}, {})
            trial.should_prune()
        study.complete(trial)
        seconds.append(time.process_time() - began)


def _around(seconds: Sequence[float]) -> list[str]:
    parts = [seconds[75:125], seconds[475:525], seconds[-50:], seconds]
    return [f"{statistics.mean(part) * 1000:.1f}" if part else "" for part in parts]


if __name__ == "__main__":
    main()
