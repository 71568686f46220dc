"""`lorasweep reproduce RUN|FILE`: make a logged run again, and compare."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorasweep.cli.command_line import Commands, add_command, show_examples, tracking_settings


def add_parser(commands: Commands) -> None:
    """Add the command's words and flags."""
    words_help = "a run's name or MLflow id, or a LoRA's .safetensors file"
    again = add_command(
        commands, "reproduce", _reproduce, "make a logged run again", "RUN|FILE", words_help
    )
    again.add_argument("--strict", action="store_true", help="stop if anything is not as it was")
    again.add_argument("--same-pack", action="store_true", help="with the runs it trained with")
    again.add_argument("--recaption", action="store_true", help="make the captions again too")
    again.add_argument(
        "--override",
        dest="variation",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="train a variation; may be given several times",
    )
    again.add_argument(
        "--as-config", type=Path, metavar="DIR", help="only write a folder for train --config-dir"
    )
    show_examples(
        again,
        ["reproduce photos-3", "reproduce photos-3 --override trainer.max_train_epochs=20"],
        settings="where things are: model.path, dataset.image_dir, output_root, tracking.*",
    )


def _reproduce(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lorasweep.reproduce import reproduce
    from lorasweep.reproduce.reproduce_run import Options

    _, settings, output_root = tracking_settings(arguments)
    options = Options(
        places=arguments.overrides,
        overrides=arguments.variation,
        same_pack=arguments.same_pack,
        recaption=arguments.recaption,
        strict=arguments.strict,
        as_config=arguments.as_config,
    )
    uri = settings.resolve(output_root)
    return reproduce.execute(arguments.word, uri, settings.experiment, options, Console())
