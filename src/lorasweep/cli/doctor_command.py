"""`lorasweep doctor`: does this machine have what the configured run needs?"""

from __future__ import annotations

import argparse

from lorasweep.cli.command_line import Commands, add_command, show_examples


def add_parser(commands: Commands) -> None:
    """Add the command's words."""
    text = "check devices, disk, models, weights and tracking"
    doctor = add_command(commands, "doctor", _doctor, text)
    show_examples(
        doctor,
        ["doctor", "doctor experiment=guide dataset.image_dir=photos model.path=sd15"],
        settings="those that you would give to train",
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from lorasweep.config.compose import compose
    from lorasweep.runs import doctor

    return doctor.examine(compose(arguments.overrides, arguments.config_dir), arguments.overrides)
