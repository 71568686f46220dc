"""`lorasweep resume RUN|DIR`: go on with a run or a sweep that was broken off."""

from __future__ import annotations

import argparse
import os
import shlex

from lorasweep.cli.command_line import Commands, add_command, say_lines, tracking_settings
from lorasweep.cli.train_command import train_by_hydra


def add_parser(commands: Commands) -> None:
    """Add the command's words."""
    text = "go on with a run or a sweep that was broken off"
    add_command(
        commands, "resume", _resume, text, "RUN|DIR", "name or folder of a run or of a sweep"
    )


def _resume(arguments: argparse.Namespace) -> int:
    from lorasweep.config.compose import begun_by
    from lorasweep.runs import resume

    _, _, output_root = tracking_settings(arguments)
    argv, cwd = begun_by(resume.find(arguments.word, output_root), arguments.overrides)
    os.chdir(cwd)
    say_lines([f"lorasweep train {shlex.join(argv)}"])
    train_by_hydra(argv)
    return 0
