"""What TPE and pruners save on the demo: `python -m benchmarks.search train | replay`.

- train: for each seed (of the images' order, the noise and the search) a grid of 16 points, every
  epoch of it, and a TPE sweep of 12 trials with pruning over the same ranges. Target: TPE's best is
  at least as good as the grid's, in fewer epochs. Every epoch of the grids goes to --record.
- replay: those epochs through the real study and flow under each pruner, the points in an order
  drawn by seed: which best they keep and how many epochs they train. Nothing is trained for it: a
  run's epochs don't depend on who else is in the pack. Target: an equal best.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import show
from benchmarks.recorded import Curve, Point, replay
from lorasweep.study.storage import find_journal, open_storage
from lorasweep.tracking import candidates

SCORE = "val/loss_rel"
RANKS, RATES = (4, 8, 16, 32), (3e-4, 1e-3, 3e-3, 1e-2)
RANK = f"adapter.rank=choice({','.join(map(str, RANKS))})"
GRID = [
    RANK,
    f"optimizer.unet_lr=choice({','.join(map(str, RATES))})",
    *("study.sampler=grid", "study.n_trials=16", "study.pruner=none", "launcher.max_pack=8"),
]
TPE = [
    RANK,
    f"optimizer.unet_lr=tag(log,interval({RATES[0]},{RATES[-1]}))",
    *("study.sampler=tpe", "study.n_trials=12", "launcher.max_pack=4", "study.pruner=asha"),
    *("study.pruner_options={reduction_factor: 2}", "study.min_epochs=2"),
]
PRUNERS: dict[str, dict[str, Any]] = {
    "none": {},
    "median": {},
    "percentile": {},
    "asha": {"reduction_factor": 2},
    "hyperband": {"reduction_factor": 2},
    "wilcoxon": {},
    "patient": {"patience": 2},
}


def main() -> None:
    """Run one benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["train", "replay"])
    parser.add_argument("--seeds", type=int, default=5, help="seeds to repeat with (default 5)")
    parser.add_argument("--record", type=Path, required=True, help="JSON file of the grids' epochs")
    parser.add_argument("--pack", type=int, default=4, help="of replay: runs at once (default 4)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
    given = parser.parse_intermixed_args()
    if given.what == "train":
        _train(given.seeds, given.record, given.overrides)
    else:
        _replay(json.loads(given.record.read_text()), given.pack)


@dataclass(frozen=True)
class Result:
    """What a sweep came to."""

    best: float
    epochs: int

    def row(self, name: str, seed: int) -> list[str]:
        """As a row of the table."""
        return [name, str(seed), f"{self.best:.4f}", str(self.epochs)]


def _train(seeds: int, record: Path, overrides: Sequence[str]) -> None:
    recorded: dict[str, list[dict[str, Any]]] = {}
    rows = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as name:
            grid = _sweep(seed, "grid", Path(name), [*GRID, *overrides])
            recorded[str(seed)] = _epochs(Path(name), "grid")
            record.write_text(json.dumps(recorded))
            tpe = _sweep(seed, "tpe", Path(name), [*TPE, *overrides])
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


def _replay(recorded: dict[str, list[dict[str, Any]]], max_pack: int) -> None:
    rows = []
    for pruner, options in PRUNERS.items():
        results = [
            Result(*replay([_point(p) for p in points], int(seed), pruner, options, max_pack))
            for seed, points in recorded.items()
        ]
        full = sum(len(point["epochs"]) for points in recorded.values() for point in points)
        epochs = sum(result.epochs for result in results)
        best = [
            min(value for point in points for _, value, _ in point["epochs"])
            for points in recorded.values()
        ]
        kept = sum(result.best == value for result, value in zip(results, best, strict=True))
        worst = max(result.best / value for result, value in zip(results, best, strict=True))
        bests = " ".join(f"{result.best:.4f}" for result in results)
        of = f"{kept} of {len(results)}"
        rows.append([pruner, str(epochs), f"{1 - epochs / full:.0%}", of, f"{worst:.3f}", bests])
    columns = ["pruner", "epochs", "saved", "same best", "worst best, over the real", "bests"]
    show(f"Pruners over {len(recorded)} recorded grids, packs of {max_pack}", columns, rows)


def _point(kept: dict[str, Any]) -> Point:
    curve: Curve = {epoch: (value, terms) for epoch, value, terms in kept["epochs"]}
    return Point(kept["params"], curve)


if __name__ == "__main__":
    main()
