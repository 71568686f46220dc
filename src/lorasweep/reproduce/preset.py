"""What `lorasweep preset` does: a file of another trainer's becomes an experiment."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lorasweep.reproduce.experiment_file import write_experiment
from lorasweep.reproduce.preset_file import read_preset
from lorasweep.reproduce.printed import say, say_config, table

_ORDER = ("taken as", "left out", "unknown", "no effect")


def from_file(path: Path, name: str, folder: Path, console: Console) -> int:
    """Write `folder`/experiment/`name`.yaml and say what became of each key of the file."""
    found = read_preset(path, name)
    file = write_experiment(found, folder, f"Made by lorasweep preset of {path.name}")
    rows = sorted(found.rows, key=lambda row: _ORDER.index(row.verdict))
    console.print(table(f"{path.name} as experiment={name}", ("in the file", "", "here"), rows))
    say(console, found.notes)
    say_config(console, file, folder, ["dataset.image_dir=FOLDER"])
    return 0
