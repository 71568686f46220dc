"""`lorasweep info FILE`: say what a LoRA file is, whoever wrote it."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorasweep.cli.command_line import Commands, say_lines, show_examples


def add_parser(commands: Commands) -> None:
    """Add the command's words and flags; it takes no settings."""
    info = commands.add_parser("info", help="say what a LoRA file is, whoever wrote it")
    info.set_defaults(command=_info)
    info.add_argument("file", type=Path, help="a .safetensors file of kohya, LyCORIS, diffusers …")
    info.add_argument("--json", action="store_true", help="as JSON")
    show_examples(info, ["info style.safetensors", "info style.safetensors --json"])


def _info(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lorasweep.lora_files import info

    if kind := _whole_model(arguments.file):
        say_lines([kind])
        return 0
    found = info.inspect(arguments.file)
    if arguments.json:
        say_lines([found.as_json()])
    else:
        info.show(found, Console())
    return 0


def _whole_model(path: Path) -> str | None:
    """One line for a file of a whole model under the names of its first authors, or None."""
    from lorasweep.core import safetensors_header

    names = safetensors_header.read(path).shapes
    if "model.diffusion_model.input_blocks.0.0.weight" not in names:
        return None
    encoders = {
        "conditioner.embedders.": "Stable Diffusion XL",
        "cond_stage_model.model.": "Stable Diffusion 2.x",
        "cond_stage_model.transformer.": "Stable Diffusion 1.x",
    }
    found = (kind for start, kind in encoders.items() if any(n.startswith(start) for n in names))
    return (
        f"{path}: a whole model, {next(found, 'without a text encoder')}, and no LoRA: train on it"
        " by model.path, or take the LoRA out of it by lorasweep extract"
    )
