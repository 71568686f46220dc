"""Which rule chooses the checkpoint whose pictures are best? `python -m benchmarks.choice …`

- record: for each style a sweep is trained by the public trainer, and its checkpoints are measured:
  pictures of concepts that no run saw against the true ones, and every loss that rules choose by.
  Each sweep goes to --record once it is measured; those that are there are left alone.
- replay: tables of every rule over the recorded sweeps. Nothing is trained or drawn.
- measure: record a sweep of your own, of any base model, by a folder of images it hasn't seen.
- sheet: what the picks of a recorded sweep draw, if its files are still in --work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEBP_QUALITY = 75
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
    replay, sheet = commands.add_parser("replay"), commands.add_parser("sheet")
    sheet.add_argument("--work", type=Path, required=True, help="where sweeps were trained")
    sheet.add_argument("--out", type=Path, required=True, help="a picture to write")
    sheet.add_argument("sweeps", nargs="+", help="their names, one below the other")
    own = commands.add_parser("measure")
    own.add_argument("--name", required=True, help="the sweep's, in the record")
    own.add_argument("--sweep", type=Path, required=True, help="the folder of its runs")
    own.add_argument("--unseen", type=Path, required=True, help="images with captions, NAME.txt")
    own.add_argument("--features", type=Path, help="a folder of a CLIP or DINO; else EfficientNet")
    own.add_argument("--arm", default="kosmos", help="whose captions are swapped")
    own.add_argument("overrides", nargs="*", help="the sweep's settings: model=sd15 …")
    for command in (record, replay, sheet, own):
        default = Path("benchmarks/choice.json")
        command.add_argument("--record", type=Path, default=default)
    given = parser.parse_args()
    if given.command == "replay":
        from benchmarks.choice_rules import replay as show_rules

        show_rules(json.loads(given.record.read_text()))
        return
    if given.command == "measure":
        _add(given.record, given.name, _measure(given))
        return
    if given.command == "sheet":
        _sheet(given.sweeps, json.loads(given.record.read_text()), given.work, given.out)
        return
    for sweep in SWEEPS:
        recorded = json.loads(given.record.read_text()) if given.record.is_file() else {}
        if sweep.name not in recorded and sweep.name.startswith(given.only):
            _add(given.record, sweep.name, _record(sweep, given.work))


def _add(record: Path, name: str, found: Mapping[str, Any]) -> None:
    recorded = json.loads(record.read_text()) if record.is_file() else {}
    recorded[name] = found
    record.write_text(json.dumps(recorded, separators=(",", ":")))
    print(f"{name}: {len(found['checkpoints'])} checkpoints", flush=True)


def _measure(given: argparse.Namespace) -> Mapping[str, Any]:
    from benchmarks.choice_folder import LocalFeatures, measure
    from benchmarks.choice_scores import Features
    from lorasweep.config.build_run import build_run
    from lorasweep.config.compose import compose
    from lorasweep.models.devices import resolve_device

    run = build_run(compose(given.overrides), output_dir=given.sweep)
    device = resolve_device(run.trainer.device)
    features = LocalFeatures(given.features, device) if given.features else Features()
    return measure(run, given.sweep, given.unseen, features, given.arm)


def _sheet(names: Sequence[str], recorded: Mapping[str, Any], work: Path, out: Path) -> None:
    from benchmarks.choice_sheet import joined, sheet
    from lorasweep.config.build_run import build_run
    from lorasweep.config.compose import compose

    run = build_run(compose(["experiment=demo"]), output_dir=work)
    picture = joined([sheet(name, recorded[name], work, run) for name in names])
    picture.save(out, quality=WEBP_QUALITY)
    print(f"{out}: {picture.width} x {picture.height}, {out.stat().st_size / 1024:.0f} KB")


def _record(sweep: Sweep, work: Path) -> dict[str, Any]:
    """Train a sweep, unless it is trained, and measure its checkpoints."""
    from benchmarks import choice_styles
    from benchmarks.choice_scores import Features, Recorder, load, train_loss
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
            train = train_loss(one.parent, epoch)
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
