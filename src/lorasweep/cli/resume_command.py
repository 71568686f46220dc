"""`lorasweep resume RUN|DIR`: go on with a run or a sweep that was broken off."""

from __future__ import annotations

import argparse
import os

from lorasweep.cli.command_line import Commands, add_command, say_lines, show_examples
from lorasweep.cli.train_command import train_by_hydra


def add_parser(commands: Commands) -> None:
    """Add the command's words."""
    text = "go on with a run or a sweep that was broken off"
    resume = add_command(
        commands,
        "resume",
        _resume,
        text,
        "[RUN|DIR]",
        "name or folder of a run or of a sweep; without: list what was broken off",
    )
    show_examples(
        resume,
        ["resume", "resume outputs/photos/20261128-101500 trainer.max_train_epochs=200"],
        settings="more trainer.max_train_epochs, trainer.device, tracking.*, output_root",
    )


def _resume(arguments: argparse.Namespace) -> int:
    from lorasweep.config.begun_command import begun_by
    from lorasweep.config.build_run import absolute_folder
    from lorasweep.config.compose import compose_without_images
    from lorasweep.core.settings import build
    from lorasweep.runs import resume
    from lorasweep.runs.run_folder import as_typed

    places = [word for word in arguments.overrides if word.startswith("output_root=")]
    cfg = compose_without_images(places, arguments.config_dir)
    said = [word for word in arguments.overrides if word not in places]
    output_root = absolute_folder(cfg.output_root, "output_root")
    if arguments.word is None:
        found = resume.broken_off(output_root)
        say_lines([f"lorasweep resume {as_typed(folder)}" for folder in found])
        say_lines([] if found else [f"Nothing in {as_typed(output_root)} was broken off."])
        return 0
    folder = resume.find(arguments.word, output_root, also_ended=bool(said))
    begun = begun_by(folder, said)
    if begun.longer is not None:
        resume.check_longer_runs(folder, build(begun.longer.lr_scheduler, "lr_scheduler"))
    os.chdir(begun.cwd)
    say_lines([f"Going on in {as_typed(folder)}"])
    train_by_hydra(begun.argv)
    return 0
