"""What TPE and pruners save on the demo: `python -m benchmarks.search train | replay`.

- train: for each seed (of the images' order, the noise and the search) a grid of 16 points, every
  epoch of it, and a TPE sweep of 12 trials over the same choices. Target: TPE's best is at least as
  good as the grid's, in fewer epochs. Every epoch of the grids goes to --record, and grids that
  are there are not trained again.
- replay: those epochs through the real study and sweep loop. Nothing is trained: a run's epochs
  don't depend on who else is in the pack. TPE with --searches seeds of its own a grid, for whether
  it finds the best of a grid is also luck; then all points under each pruner, in an order drawn by
  seed. Target: an equal best.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import show
from benchmarks.recorded import Curve, Point, in_any_order, replay
from lorasweep.sweeps.study.study_storage import find_journal, open_storage
from lorasweep.tracking import candidates

SCORE = "val/loss_rel"
RANKS, RATES = (4, 8, 16, 32), (3e-4, 1e-3, 3e-3, 1e-2)
RANK = f"adapter.rank=choice({','.join(map(str, RANKS))})"
GRID = [
    RANK,
    f"optimizer.unet_lr=choice({','.join(map(str, RATES))})",
    *("study.sampler=grid", "study.n_trials=16", "study.pruner=none", "launcher.max_pack=8"),
]
TPE_STUDY = ["study.sampler=tpe", "study.n_trials=12", "study.pruner=none"]
TPE = [*GRID[:2], *TPE_STUDY, "launcher.max_pack=4"]
TPE_CASES = {
    "ours": [],
    "ours, median": ["study.pruner=median", "study.min_epochs=3"],
    "Optuna's gamma": ["study.sampler_options={gamma: 0.1}"],
}
FIRST = {"adapter.rank": 16, "optimizer.unet_lr": 1e-3}  # the demo's own: a sweep's first trial
PRUNERS = {
    "none": ["study.pruner=none"],
    "median": ["study.pruner=median"],
    "percentile": ["study.pruner=percentile"],
    "asha, factor 2": ["study.pruner=asha", "study.pruner_options={reduction_factor: 2}"],
    "asha, factor 3": ["study.pruner=asha", "study.pruner_options={reduction_factor: 3}"],
    "asha, factor 3, from epoch 4": [  # as the sweeps have it that ship
        "study.pruner=asha",
        "study.pruner_options={reduction_factor: 3}",
        "study.min_epochs=4",
    ],
    "hyperband, factor 2": ["study.pruner=hyperband", "study.pruner_options={reduction_factor: 2}"],
    "wilcoxon": ["study.pruner=wilcoxon"],
    "patient, 2 epochs": ["study.pruner=patient", "study.pruner_options={patience: 2}"],
}


def main() -> None:
    """Run one benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["train", "replay"])
    parser.add_argument("--seeds", type=int, default=5, help="seeds to repeat with (default 5)")
    parser.add_argument("--record", type=Path, required=True, help="JSON file of the grids' epochs")
    parser.add_argument("--pack", type=int, default=4, help="of replay: runs at once (default 4)")
    parser.add_argument("--searches", type=int, default=12, help="of replay: TPE's, a grid (12)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
    given = parser.parse_intermixed_args()
    if given.what == "train":
        _train(given.seeds, given.record, given.overrides)
    else:
        recorded = json.loads(given.record.read_text())
        grids = {int(seed): [_point(one) for one in kept] for seed, kept in recorded.items()}
        _replay_tpe(grids, given.pack, given.searches)
        _replay_pruners(grids, given.pack)


@dataclass(frozen=True)
class Result:
    """What a sweep came to."""

    best: float
    epochs: int

    def row(self, name: str, seed: int) -> list[str]:
        """As a row of the table."""
        return [name, str(seed), f"{self.best:.4f}", str(self.epochs)]


def _train(seeds: int, record: Path, overrides: Sequence[str]) -> None:
    recorded = json.loads(record.read_text()) if record.is_file() else {}
    rows = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as name:
            if str(seed) not in recorded:
                _sweep(seed, "grid", Path(name), [*GRID, *overrides])
                recorded[str(seed)] = _epochs(Path(name), "grid")
                record.write_text(json.dumps(recorded))
            points = [_point(one) for one in recorded[str(seed)]]
            tpe = _sweep(seed, "tpe", Path(name) / "tpe", [*TPE, *overrides])
        grid = Result(_best(points), sum(len(point.curve) for point in points))
        for row in (grid.row("grid of 16", seed), tpe.row("TPE, 12 trials", seed)):
            rows.append(row)
            print(" | ".join(row), flush=True)
    show("Sweeps of the demo", ["sweep", "seed", f"best {SCORE}", "epochs"], rows)


def _sweep(seed: int, name: str, root: Path, case: Sequence[str]) -> Result:
    """Run a sweep of the demo from nothing, with a seed for the search and for the runs."""
    places = [f"output_root={root}", f"cache_dir={root}/cache", f"study.name={name}"]
    own = [f"seed={seed}", f"study.seed={seed}", "experiment=demo", "hydra/sweeper=optuna"]
    command = [sys.executable, "-m", "lorasweep", "train", "-m", *own, *places, *case]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = [trial.user_attrs for trial in _trials(root, name)]
    best = min(attrs["best"]["scores"][SCORE] for attrs in found if "best" in attrs)
    return Result(best, sum(int(attrs.get("epochs", 0)) for attrs in found))


def _trials(root: Path, name: str) -> list[Any]:
    from optuna import load_study

    journal = find_journal(f"demo-{name}", root)
    storage = open_storage(str(journal), journal.parent)
    trials: list[Any] = load_study(study_name=f"demo-{name}", storage=storage).trials
    return trials


def _epochs(root: Path, name: str) -> list[dict[str, Any]]:
    """Every epoch of a sweep's runs, as MLflow has them."""
    epochs: dict[str, list[Any]] = {}
    for one in candidates(f"sqlite:///{root}/mlflow.db", "lorasweep", f"demo-{name}"):
        terms = [round(term, 6) for term in one.terms.get(SCORE, ())]
        epochs.setdefault(one.run, []).append((one.epoch, one.scores[SCORE], terms))
    return [
        {"params": trial.params, "epochs": sorted(epochs[f"demo-{trial.number}"])}
        for trial in _trials(root, name)
    ]


Grids = Mapping[int, Sequence[Point]]
"""By seed."""


def _replay_tpe(grids: Grids, max_pack: int, searches: int) -> None:
    rows = []
    for name, own_settings in TPE_CASES.items():
        study = [*TPE_STUDY, *own_settings]
        seeds = [(seed, seed + len(grids) * number) for seed in grids for number in range(searches)]
        results = [
            Result(*replay(grids[seed], [*study, f"study.seed={own}"], [FIRST], max_pack))
            for seed, own in seeds
        ]
        bests = [_best(grids[seed]) for seed, _ in seeds]
        rows.append([name, *_against(bests, results)])
    show(f"12 TPE trials, {searches} searches of each grid, packs of {max_pack}", COLUMNS, rows)


def _replay_pruners(grids: Grids, max_pack: int) -> None:
    rows = []
    bests = [_best(points) for points in grids.values()]
    for pruner, own_settings in PRUNERS.items():
        common = ["study.n_trials=16", "study.sampler=random", "study.min_epochs=2"]
        study = [*common, *own_settings]
        results = [
            Result(*replay(points, study, in_any_order(points, seed), max_pack))
            for seed, points in grids.items()
        ]
        rows.append([pruner, *_against(bests, results)])
    show(f"Pruners over {len(grids)} recorded grids, packs of {max_pack}", COLUMNS, rows)


COLUMNS = ["study", "epochs", "of the grids'", "as good", "at worst, over the grid's best"]


def _best(points: Sequence[Point]) -> float:
    return min(value for point in points for value, _ in point.curve.values())


def _against(bests: Sequence[float], results: Sequence[Result]) -> list[str]:
    epochs, full = sum(result.epochs for result in results), 96 * len(results)
    ratios = [result.best / best for result, best in zip(results, bests, strict=True)]
    good = f"{sum(ratio <= 1 for ratio in ratios)} of {len(ratios)}"
    return [str(epochs), f"{epochs / full:.0%}", good, f"{max(ratios):.3f}"]


def _point(kept: dict[str, Any]) -> Point:
    curve: Curve = {epoch: (value, terms) for epoch, value, terms in kept["epochs"]}
    return Point(kept["params"], curve)


if __name__ == "__main__":
    main()
