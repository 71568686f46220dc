"""The same runs by kohya's sd-scripts and by the native trainer: `python -m benchmarks.parity …`

- record: for every type of adapter, runs of 5 seeds by each trainer, as a person starts them, on
  the settings given. Each goes to --record once it has ended; those that are there are left alone.
  Seeds draw other numbers in each trainer, so only their spread can be compared.
- replay: the tables of what was recorded. Nothing is trained.

Without settings of your own a narrow model of SD1.5's shape is trained, with random weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import show

CASES = {
    "lora": ["adapter=lora", "adapter.rank=4", "adapter.alpha=2"],
    "locon": ["adapter=locon", "adapter.rank=4", "adapter.conv_rank=2"],
    "loha": ["adapter=loha", "adapter.rank=2", "adapter.alpha=1"],
}
TRAINERS = ("sd_scripts", "native")
SEEDS = range(1, 6)
SCORE = "val/loss_rel"
COMMON = [
    *("lr_scheduler=cosine", "lr_scheduler.warmup=0.1", "trainer.max_train_epochs=5"),
    *("sampling.every_n_epochs=0", "tracking.offline=true", "name=parity"),
    "launcher.max_pack=1",
]
NARROW = [
    *("experiment=demo", "dataset.num_images=8", "dataset.num_holdout=4", "trainer.batch_size=4"),
    *("optimizer.unet_lr=4e-3", "optimizer.text_encoder_lr=5e-4", "trainer.device=cpu"),
    *("metrics.validation.num_timesteps=4", "metrics.validation.num_bootstrap=50"),
    "metrics.prior_drift.num_timesteps=1",
]
"""Of the demo's images 8 in three folders: 6 steps an epoch."""


def main() -> None:
    """Record or replay."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record")
    record.add_argument("--checkout", type=Path, required=True, help="of kohya-ss/sd-scripts")
    record.add_argument("--python", type=Path, required=True, help="of its environment")
    record.add_argument("--work", type=Path, required=True, help="where is trained")
    record.add_argument("--only", choices=list(CASES), help="one type of adapter")
    record.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="data, base, rates …")
    replay = commands.add_parser("replay")
    for command in (record, replay):
        command.add_argument("--record", type=Path, default=Path("benchmarks/parity.json"))
    given = parser.parse_args()
    if given.command == "record":
        _record(given)
    _replay(json.loads(given.record.read_text()))


def _record(given: argparse.Namespace) -> None:
    work, checkout = given.work.absolute(), given.checkout.absolute()
    work.mkdir(parents=True, exist_ok=True)
    overrides = given.overrides
    if not overrides:
        checkout, overrides = _narrow(checkout, work)
    own = {
        "sd_scripts": [f"trainer.path={checkout}", f"trainer.python={given.python.absolute()}"],
        "native": [],
    }
    for case in [given.only] if given.only else CASES:
        kept = json.loads(given.record.read_text()) if given.record.is_file() else {}
        of_case = kept.setdefault(case, {})
        for trainer in TRAINERS:
            if trainer in of_case:
                continue
            chosen = [f"trainer={trainer}", *own[trainer], *CASES[case]]
            places = [f"output_root={work}", f"cache_dir={work}/cache"]
            folder = work / case / trainer
            of_case[trainer] = _train([*overrides, *COMMON, *chosen, *places], folder)
            given.record.write_text(json.dumps(kept, separators=(",", ":")))
            print(case, trainer, flush=True)
        if "files" not in of_case:
            of_case["files"] = _compare_files(work / case)
        given.record.write_text(json.dumps(kept, separators=(",", ":")))


def _narrow(checkout: Path, work: Path) -> tuple[Path, list[str]]:
    """A narrow base model, and the checkout made to take it; they are the tests' own."""
    sys.path.insert(0, "tests")
    import narrow_sd15  # type: ignore[import-not-found]

    if not (work / "model").exists():
        narrow_sd15.write_model(work / "model")
        narrow_sd15.write_checkout(work / "checkout", checkout, work / "model")
    return work / "checkout", [*NARROW, f"model.path={work / 'model'}"]


def _train(overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """A run of each seed, one after the other, by one command; what it cost and what came of it."""
    seeds = [f"seed={','.join(map(str, SEEDS))}", f"hydra.sweep.dir={folder}"]
    command = [sys.executable, "-m", "lorasweep", "train", "-m", *overrides, *seeds]
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)  # with all of its children
    seconds = time.monotonic() - begun
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    return {
        "runs": [_outcome(one) for one in sorted(folder.glob("[0-9]*"))],
        "wall_s": round(seconds / len(SEEDS), 1),
        "cpu_s": round((used.ru_utime + used.ru_stime) / len(SEEDS), 1),
        "peak_mb": used.ru_maxrss // 1024,  # of the largest of its processes
    }


def _outcome(folder: Path) -> dict[str, Any]:
    """What a run's folder says of its training."""
    epochs = [json.loads(one.read_text()) for one in sorted((folder / "epochs").glob("0*.json"))]
    trained = [epoch for epoch in epochs if epoch["epoch"] > 0]
    steps = [step for epoch in trained for step in epoch["steps"]]
    names = ("train/lr_unet", "train/lr_text_encoder")
    spans = [epoch["steps"][-1][1] - epoch["steps"][0][1] for epoch in trained]
    return {
        "steps": [len(epoch["steps"]) for epoch in trained],
        "losses": [
            round(statistics.mean(step[2]["train/loss"] for step in epoch["steps"]), 5)
            for epoch in trained
        ],
        "scores": [round(epoch["scores"][SCORE], 5) for epoch in trained],
        "rates": {name: [_digits(step[2].get(name, 0.0)) for step in steps] for name in names},
        "step_ms": round(sum(spans) / sum(len(epoch["steps"]) - 1 for epoch in trained), 1),
    }


def _digits(value: float) -> float:
    """sd-scripts' log has single precision."""
    return float(f"{value:.6g}")


def _compare_files(folder: Path) -> dict[str, Any]:
    """Tensors and metadata of the last checkpoints of the first seed: what differs."""
    from lorasweep.lora_files import checkpoint

    theirs, ours = (
        checkpoint.read(sorted((folder / trainer / "0").glob("*.safetensors"))[-1])
        for trainer in TRAINERS
    )
    shapes = [{name: list(one.shape) for name, one in found[0].items()} for found in (theirs, ours)]
    other = [name for name in shapes[0].keys() & shapes[1] if shapes[0][name] != shapes[1][name]]
    texts = [
        {key: value for key, value in found[1].items() if key.startswith("ss_")}
        for found in (theirs, ours)
    ]
    both = sorted(texts[0].keys() & texts[1].keys())
    return {
        "tensors": len(shapes[0]),
        "numbers": sum(one.numel() for one in theirs[0].values()),
        "tensors_that_differ": sorted((shapes[0].keys() ^ shapes[1].keys()) | set(other)),
        "entries": len(texts[0]),
        "theirs_alone": sorted(texts[0].keys() - texts[1].keys()),
        "ours_alone": sorted(texts[1].keys() - texts[0].keys()),
        "other_values": {
            key: [texts[0][key], texts[1][key]]
            for key in both
            if _value(texts[0][key]) != _value(texts[1][key])
        },
    }


def _value(text: str) -> object:
    """An entry's value: the folders' order is that of the disk."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _replay(kept: Mapping[str, Any]) -> None:
    for what, title in (("losses", "Mean training loss of an epoch"), ("scores", SCORE)):
        rows = [row for case in kept for row in _curve(case, kept[case], what)]
        columns = ["type", "epoch", "sd-scripts", "native", "native's mean within", "difference"]
        show(f"{title}, mean of {len(SEEDS)} seeds [least, most]", columns, rows)
    rows = [_same(case, kept[case]) for case in kept]
    columns = [
        "type",
        "steps an epoch",
        "rates",
        "tensors",
        "their shapes",
        "ss_ entries",
        "lacking",
    ]
    show("What is equal", columns, rows)
    for case, of_case in kept.items():
        for key, (theirs, ours) in of_case["files"]["other_values"].items():
            print(f"{case} {key}: {theirs[:120]} | {ours[:120]}")
    rows = [
        [case, trainer, *(f"{value:.0f}" for value in _cost(kept[case][trainer]))]
        for case in kept
        for trainer in TRAINERS
    ]
    columns = ["type", "trainer", "ms a step", "CPU s a run", "wall s", "peak MB of a process"]
    show("What a run costs, start and scores included", columns, rows)


def _curve(case: str, of_case: Mapping[str, Any], what: str) -> list[list[str]]:
    """A row an epoch: is the native trainer's mean within the spread of sd-scripts' seeds?"""
    theirs, ours = ([run[what] for run in of_case[trainer]["runs"]] for trainer in TRAINERS)
    rows = []
    for epoch, (those, these) in enumerate(
        zip(zip(*theirs, strict=True), zip(*ours, strict=True), strict=True), start=1
    ):
        difference = statistics.mean(these) - statistics.mean(those)
        error = math.sqrt((statistics.variance(those) + statistics.variance(these)) / len(SEEDS))
        is_within = min(those) <= statistics.mean(these) <= max(those)
        rows.append(
            [
                case,
                str(epoch),
                *(f"{statistics.mean(s):.4f} [{min(s):.4f}, {max(s):.4f}]" for s in (those, these)),
                "yes" if is_within else "no",
                f"{difference:+.4f} (s.e. {error:.4f})",
            ]
        )
    return rows


def _same(case: str, of_case: Mapping[str, Any]) -> list[str]:
    runs = [run for trainer in TRAINERS for run in of_case[trainer]["runs"]]
    steps = {str(run["steps"]) for run in runs}
    rates = {json.dumps(run["rates"]) for run in runs}
    files = of_case["files"]
    return [
        case,
        steps.pop() if len(steps) == 1 else "differ",
        "equal" if len(rates) == 1 else "differ",
        str(files["tensors"]),
        "differ" if files["tensors_that_differ"] else "equal",
        str(files["entries"]),
        ", ".join(files["theirs_alone"]) or "none",
    ]


def _cost(of_trainer: Mapping[str, Any]) -> list[float]:
    step = statistics.median(run["step_ms"] for run in of_trainer["runs"])
    return [step, *(of_trainer[name] for name in ("cpu_s", "wall_s", "peak_mb"))]


if __name__ == "__main__":
    main()
