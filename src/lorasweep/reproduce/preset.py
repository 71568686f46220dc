"""What `lorasweep preset` does: another trainer's file becomes an experiment, a run its TOML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lorasweep.reproduce.experiment_file import write_experiment
from lorasweep.reproduce.preset_file import read_preset
from lorasweep.reproduce.printed import say, say_config, table
from lorasweep.reproduce.run_as_toml import write_toml

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


def to_kohya(
    word: str,
    uri: str,
    experiment: str,
    out: Path | None,
    places: Sequence[str],
    console: Console,
) -> int:
    """Write the TOML of a run, and say what it can't say."""
    written = write_toml(word, uri, experiment, out, places)
    say(console, written.lines)
    say(console, [f"Written: {written.path}"])
    say(console, [f"Train it: accelerate launch train_network.py --config_file {written.path}"])
    return 0
