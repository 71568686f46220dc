"""What each rule's pick draws, beside the true pictures: to be looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from benchmarks.choice_rules import DEFAULT, RULES, Grid
from benchmarks.choice_scores import quick
from benchmarks.choice_styles import Drawing, make
from lorasweep.judging import load_pack
from lorasweep.judging.contact_sheet import contact_sheet
from lorasweep.judging.sampling import render

if TYPE_CHECKING:
    from lorasweep.config.run import Run

CONCEPTS = 8
SHOWN = ("loss", DEFAULT)
WIDTH = 900  # pixels of what is written


def sheet(name: str, recorded: Mapping[str, Any], work: Path, run: Run) -> Image.Image:
    """Rows of a sweep: true, base, the best by truth, each rule's pick."""
    style = name.partition("-")[0]
    drawings = make(style, work).drawings
    shown = drawings[:: max(1, len(drawings) // CONCEPTS)][:CONCEPTS]
    grid = Grid(recorded)
    truth = grid.truth[:, 0]
    chosen = {"best": int(truth.argmax())} | {
        rule: int(RULES[rule](grid).argmax()) for rule in SHOWN
    }
    files = [_file(work, name, grid.checkpoints[number]) for number in chosen.values()]
    rows = [("true", [Image.fromarray(one.true[0]) for one in shown])]
    drawn = _draw(run, shown, files)
    labels = [f"base {grid.base['truth'][0]:.2f}"]
    labels += [f"{label} {truth[number]:.2f}" for label, number in chosen.items()]
    rows += zip(labels, drawn, strict=True)
    return contact_sheet(rows, [one.label for one in shown])


def joined(sheets: Sequence[Image.Image]) -> Image.Image:
    """One below the other."""
    found = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    top = 0
    for one in sheets:
        found.paste(one, (found.width - one.width, top))
        top += one.height
    return found.resize(
        (WIDTH, round(found.height * WIDTH / found.width)), Image.Resampling.LANCZOS
    )


def _draw(run: Run, shown: Sequence[Drawing], files: Sequence[Path]) -> list[list[Image.Image]]:
    base = run.model.load("cpu", "fp32")
    prompts = tuple(one.prompt for one in shown)
    sampling = replace(quick(run.sampling), prompts=prompts)
    resolved = sampling.resolve(run.dataset.size, base.vae_scale_factor)
    of_base = render(base, None, resolved, sampling)
    return [*of_base, *render(base, load_pack(base, files), resolved, sampling)]


def _file(work: Path, name: str, checkpoint: Mapping[str, Any]) -> Path:
    run, style = checkpoint["run"], name.partition("-")[0]
    folder = work / "sweeps" / name / "sweep" / str(run)
    return folder / f"{style}-{run}-{checkpoint['epoch']:06d}.safetensors"
