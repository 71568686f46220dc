"""`lorasweep preset FILE --as NAME`: what somebody trains with elsewhere, as an experiment."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorasweep.cli.command_line import Commands, add_command, show_examples


def add_parser(commands: Commands) -> None:
    """Add the command's words and flags."""
    words_help = (
        "a kohya_ss preset (.json), a TOML of sd-scripts or kohya_ss, or a LoRA's .safetensors file"
    )
    text = "take over the settings of kohya_ss and sd-scripts"
    preset = add_command(commands, "preset", _preset, text, "FILE", words_help)
    preset.add_argument("--as", dest="name", required=True, metavar="NAME", help="experiment=NAME")
    show_examples(
        preset,
        [
            "preset 'sd15 - EDG_LoConOptiSettings.json' --as mine",
            "preset config_lora.toml --as mine --config-dir options",
        ],
    )


def _preset(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lorasweep.core.settings import SettingsError
    from lorasweep.reproduce import preset

    if arguments.overrides:
        raise SettingsError(
            f"{arguments.overrides[0]}: settings are given to the training of the experiment, not"
            " here"
        )
    folder = arguments.config_dir or Path("conf")
    return preset.from_file(Path(arguments.word), arguments.name, folder, Console())
