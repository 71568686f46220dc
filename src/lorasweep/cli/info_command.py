"""`lorasweep info FILE`: say what a LoRA file is, whoever wrote it."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorasweep.cli.command_line import Commands, say_lines


def add_parser(commands: Commands) -> None:
    """Add the command's words and flags; it takes no settings."""
    info = commands.add_parser("info", help="say what a LoRA file is, whoever wrote it")
    info.set_defaults(command=_info)
    info.add_argument("file", type=Path, help="a .safetensors file of kohya, LyCORIS, diffusers …")
    info.add_argument("--json", action="store_true", help="as JSON")


def _info(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lorasweep.lora_files import info

    found = info.inspect(arguments.file)
    if arguments.json:
        say_lines([found.as_json()])
    else:
        info.show(found, Console())
    return 0
