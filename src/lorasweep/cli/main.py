"""The command line: `lorasweep train | sweep | caption | pick | export | …`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence

from lorasweep import __version__
from lorasweep.cli import (
    caption_command,
    convert_command,
    doctor_command,
    export_command,
    extract_command,
    info_command,
    pick_command,
    preset_command,
    reproduce_command,
    resize_command,
    resume_command,
    sweep_command,
    sync_command,
    train_command,
    ui_command,
)
from lorasweep.cli.command_line import Commands, OneLineParser, end_with, parse
from lorasweep.cli.completion import answer_shell
from lorasweep.core.text import shown

_EPILOG = """\
Settings are Hydra overrides (KEY=VALUE); `lorasweep train --cfg job` shows them all.

  lorasweep train experiment=demo                         the embedded demo, one run
  lorasweep train experiment=guide dataset.image_dir=DIR  the guide's recipe on your images
  lorasweep train -m dataset.image_dir=DIR adapter.rank=4,8,16 optimizer.unet_lr=1e-4,3e-4
  lorasweep sweep rank_lr dataset.image_dir=DIR           search with Optuna; again = go on
  lorasweep pick                                          choose among the last sweep's checkpoints
  lorasweep reproduce RUN                                 make a logged run again, and compare
  lorasweep export RUN --to merged                        the base model with the LoRA in it
  lorasweep ui                                            look at everything in MLflow
  lorasweep sync                                          send MLflow what it could not take before
"""
COMMANDS = (
    train_command,
    sweep_command,
    resume_command,
    caption_command,
    pick_command,
    reproduce_command,
    preset_command,
    export_command,
    convert_command,
    ui_command,
    sync_command,
    info_command,
    resize_command,
    extract_command,
    doctor_command,
)
"""One file a command, in the order of `lorasweep --help`."""
_HYDRA_APPS = {"train": train_command.train, "sweep": sweep_command.sweep}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; mistakes of the user end with one line and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # threads that wait by spinning make every step several times slower where a core is shared
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # what CUDA's matrix products need to be the same each time, where trainer.deterministic asks it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        if argv and argv[0] in _HYDRA_APPS:  # Hydra reads the rest, its own flags included
            _HYDRA_APPS[argv[0]](argv[1:])
            return
        parser, commands = _parser()
        if "_ARGCOMPLETE" in os.environ:
            answer_shell(parser)
        if argv:
            _refuse_unknown(argv[0], commands.choices)
        arguments = parse(parser, argv)
        sys.exit(arguments.command(arguments))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        end_with(error)


def _parser() -> tuple[OneLineParser, Commands]:
    """The parser, and its commands by name."""
    parser = OneLineParser(
        prog="lorasweep",
        description="Train, compare and choose LoRAs of Stable Diffusion.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lorasweep {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser, commands


def _refuse_unknown(command: str, known: Iterable[str]) -> None:
    """argparse would list all the commands, and not the one that was meant."""
    from lorasweep.core.settings import SettingsError
    from lorasweep.core.trainer_words import meant

    if command.startswith("-") or command in (names := sorted(known)):
        return
    close = meant(command, names)
    hint = f"did you mean {close}?" if close in names else f"there are {', '.join(names)}"
    raise SettingsError(f"{shown(command)}: there is no such command; {hint}")
