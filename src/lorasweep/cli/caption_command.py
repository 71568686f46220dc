"""`lorasweep caption DIR`: caption a folder of images into kohya's folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorasweep.cli.command_line import Commands, add_command, say_lines, show_examples


def add_parser(commands: Commands) -> None:
    """Add the command's words."""
    text = "caption a folder of images into kohya's folders"
    caption = add_command(commands, "caption", _caption, text, "[DIR]", "DIR: folder of images")
    show_examples(
        caption,
        ["caption photos", "caption photos captions=[empty,wd14] dataset.num_images=all"],
        settings="dataset.*, captions.*, model.*, output_root",
    )


def _caption(arguments: argparse.Namespace) -> int:
    from lorasweep.config.build_run import build_run
    from lorasweep.config.compose import compose, quoted
    from lorasweep.core.settings import SettingsError

    overrides: list[str] = arguments.overrides
    if arguments.word is not None:
        given = [one for one in overrides if one.lstrip("+").startswith("dataset.image_dir=")]
        if given:
            raise SettingsError(f"{arguments.word} and {given[0]}: give one folder of images")
        overrides = [*overrides, f"dataset.image_dir={quoted(arguments.word)}"]
    run = build_run(compose(overrides, arguments.config_dir), output_dir=Path())
    from lorasweep.runs.prepare import write_folders

    say_lines(
        [
            f"Captions are in {write_folders(run)}",
            "Edit them there: training with the same dataset and captions settings takes them so.",
        ]
    )
    return 0
