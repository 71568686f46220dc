"""`lorasweep resize FILE`: give a LoRA file another rank."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorasweep.cli.command_line import Commands, show_examples


def add_parser(commands: Commands) -> None:
    """Add the command's words and flags; it takes no settings."""
    resize = commands.add_parser("resize", help="give a LoRA file another rank")
    resize.set_defaults(command=_resize)
    resize.add_argument("file", type=Path, help="a LoRA, LoCon, DoRA, LoHa or LoKr")
    resize.add_argument("--rank", type=int, help="the new rank; with --energy, the largest")
    resize.add_argument("--conv-rank", type=int, help="of 3x3 convolutions (default: --rank)")
    resize.add_argument("--energy", type=float, help="share to keep; each module gets its own rank")
    resize.add_argument("--out", type=Path, help="file to write (default: beside, NAME-resized)")
    resize.add_argument(
        "--model",
        help="base model to draw a picture with, before and after: an option's name (sd15,"
        " embedded), folder, file or hub id (default: the one it was trained on, if it is here)",
    )
    resize.add_argument("--config", help="for a single file: diffusers folder or hub id of configs")
    resize.add_argument("--overwrite", action="store_true", help="replace the file to write")
    show_examples(
        resize,
        [
            "resize style.safetensors --rank 8",
            "resize style.safetensors --energy 0.95 --model sd15",
        ],
    )


def _resize(arguments: argparse.Namespace) -> int:
    from lorasweep.cli.model_argument import model_of
    from lorasweep.core.progress import say
    from lorasweep.export import resize
    from lorasweep.export.svd_ranks import SvdRanks

    source: Path = arguments.file
    resize.resize_and_draw(
        source,
        arguments.out or source.with_name(f"{source.stem}-resized.safetensors"),
        SvdRanks(arguments.rank, arguments.conv_rank, arguments.energy),
        model=model_of(arguments.model, arguments.config) if arguments.model else None,
        overwrite=arguments.overwrite,
        say=say,
    )
    return 0
