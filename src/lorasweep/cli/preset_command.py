"""`lorasweep preset FILE --as NAME`: settings of kohya's programs as ours, and the reverse."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorasweep.cli.command_line import Commands, add_command, show_examples, tracking_settings


def add_parser(commands: Commands) -> None:
    """Add the command's words and flags."""
    words_help = (
        "a kohya_ss preset (.json), a TOML of sd-scripts or kohya_ss, or a LoRA's .safetensors"
        " file; with --to-kohya a run's folder, its name or MLflow id"
    )
    text = "take over the settings of kohya_ss and sd-scripts, or give them a run's"
    preset = add_command(commands, "preset", _preset, text, "FILE|RUN", words_help)
    preset.add_argument("--as", dest="name", metavar="NAME", help="becomes experiment=NAME")
    preset.add_argument("--to-kohya", action="store_true", help="write the TOML of a run")
    preset.add_argument("--out", type=Path, metavar="FILE", help="of that TOML; default: RUN.toml")
    show_examples(
        preset,
        [
            "preset 'sd15 - EDG_LoConOptiSettings.json' --as mine",
            "preset config_lora.toml --as mine --config-dir options",
            "preset --to-kohya photos-3 --out photos.toml",
        ],
        settings="with --to-kohya where things are: model.path, output_root, tracking.*",
    )


def _preset(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lorasweep.core.settings import SettingsError
    from lorasweep.reproduce import preset

    console = Console()
    if arguments.to_kohya:
        if arguments.name is not None:
            raise SettingsError("--as names an experiment; with --to-kohya give --out FILE")
        _, settings, output_root = tracking_settings(arguments)
        uri = settings.resolve(output_root)
        out, places = arguments.out, arguments.overrides
        return preset.to_kohya(arguments.word, uri, settings.experiment, out, places, console)
    if arguments.overrides:
        raise SettingsError(
            f"{arguments.overrides[0]}: settings are given to the training of the experiment, not"
            " here"
        )
    if arguments.name is None:
        raise SettingsError("give the experiment a name: --as NAME")
    folder = arguments.config_dir or Path("conf")
    return preset.from_file(Path(arguments.word), arguments.name, folder, console)
