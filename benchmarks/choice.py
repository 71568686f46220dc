"""Which rule chooses the checkpoint whose pictures are best? `python -m benchmarks.choice …`

- record: for each style a sweep is trained by the public trainer, and its checkpoints are measured:
  pictures of concepts that no run saw against the true ones, and every loss that rules choose by.
  Each sweep goes to --record once it is measured; those that are there are left alone.
- replay: tables of every rule over the recorded sweeps. Nothing is trained or drawn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHORT, LONG = (1, 3, 5, 7, 10), (3, 6, 10, 15, 20, 30, 45, 60)
"""Epochs whose checkpoints are measured."""


@dataclass(frozen=True)
class Sweep:
    """One sweep of a style; the seed draws the images, the noise and the weights."""

    style: str
    kind: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.style}-{self.kind}-{self.seed}"

    @property
    def epochs(self) -> tuple[int, ...]:
        return LONG if self.kind == "long" else SHORT

    @property
    def overrides(self) -> list[str]:
        if self.kind == "long":
            return ["adapter.rank=16,32", "optimizer.unet_lr=2e-3,5e-3"]
        return ["adapter.rank=4,16", "optimizer.unet_lr=5e-4,1e-3,2e-3,4e-3"]


SWEEPS = tuple(
    Sweep(style, kind, seed)
    for seed in (0, 1, 2)
    for style in ("ink", "blueprint", "thread", "hero", "neon", "poster")
    for kind in ("short", "long")
    if kind == "short" or (style in ("ink", "blueprint") and seed < 2)
)
"""Those of seed 0 are what the rules were thought of with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record")
    record.add_argument("--work", type=Path, required=True, help="where sweeps are trained")
    record.add_argument("--only", default="", help="a sweep's name, or its beginning")
    replay = commands.add_parser("replay")
    for command in (record, replay):
        default = Path("benchmarks/choice.json")
        command.add_argument("--record", type=Path, default=default)
    given = parser.parse_args()
    if given.command == "replay":
        from benchmarks.choice_rules import replay as show_rules

        show_rules(json.loads(given.record.read_text()))
        return
    for sweep in SWEEPS:
        recorded = json.loads(given.record.read_text()) if given.record.is_file() else {}
        if sweep.name not in recorded and sweep.name.startswith(given.only):
            found = _record(sweep, given.work)
            recorded = json.loads(given.record.read_text()) if given.record.is_file() else {}
            recorded[sweep.name] = found
            given.record.write_text(json.dumps(recorded, separators=(",", ":")))
            print(f"{sweep.name}: {len(found['checkpoints'])} checkpoints", flush=True)


def _record(sweep: Sweep, work: Path) -> dict[str, Any]:
    """Train a sweep, unless it is trained, and measure its checkpoints."""
    from benchmarks import choice_styles
    from benchmarks.choice_scores import Features, Recorder, load
    from lorasweep.config.build_run import build_run
    from lorasweep.config.compose import compose

    style = choice_styles.make(sweep.style, work)
    folder = work / "sweeps" / sweep.name
    overrides = _train(sweep, style.folder, folder)
    runs = sorted((folder / "sweep").glob("*/epochs"), key=lambda one: int(one.parent.name))
    run = build_run(compose(overrides), output_dir=folder / "measured")
    recorder = Recorder(run, style, Features())
    checkpoints = []
    for epoch in sweep.epochs:
        files = [
            one.parent / f"{sweep.style}-{one.parent.name}-{epoch:06d}.safetensors" for one in runs
        ]
        measured = recorder.measure(load(files, recorder.base))
        for number, (one, values) in enumerate(zip(runs, measured, strict=True)):
            steps = json.loads((one / f"{epoch:06d}.json").read_text())["steps"]
            losses = [values["train/loss"] for _, _, values in steps if "train/loss" in values]
            train = round(sum(losses) / len(losses), 4)
            checkpoints.append({"run": number, "epoch": epoch, "train": train, **values})
    return {"base": recorder.measure(None)[0], "checkpoints": checkpoints}


def _train(sweep: Sweep, images: Path, folder: Path) -> list[str]:
    """Run the sweep to its end; the overrides that its runs have in common."""
    captions = images / "captions.jsonl"
    common = [
        "experiment=demo",
        f"name={sweep.style}",
        f"seed={sweep.seed}",
        f"dataset.seed={sweep.seed}",
        f"dataset.image_dir={images}",
        *(f"captions.{arm}.jsonl={captions}" for arm in ("wd", "kosmos")),
        "dataset.num_holdout=16",
        "sampling.every_n_epochs=0",
        f"trainer.max_train_epochs={sweep.epochs[-1]}",
        f"output_root={folder}",
        f"cache_dir={folder.parent.parent / 'cache'}",
    ]
    cheap = [
        *("metrics.validation.max_tuples=6", "metrics.validation.num_timesteps=2"),
        *("metrics.validation.num_probe_images=1", "metrics.prior_drift.num_timesteps=1"),
        f"hydra.sweep.dir={folder / 'sweep'}",
    ]
    if not (folder / "done").exists():
        command = [sys.executable, "-m", "lorasweep", "train", "-m", *common, *cheap]
        subprocess.run([*command, *sweep.overrides], check=True, stdout=subprocess.DEVNULL)
        (folder / "done").touch()
    return common


if __name__ == "__main__":
    main()
