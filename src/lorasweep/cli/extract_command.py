"""`lorasweep extract TUNED BASE`: make a LoRA of the difference of two models."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorasweep.cli.command_line import Commands, show_examples
from lorasweep.models.base_model import PRECISIONS


def add_parser(commands: Commands) -> None:
    """Add the command's words and flags; it takes no settings."""
    extract = commands.add_parser("extract", help="make a LoRA of the difference of two models")
    extract.set_defaults(command=_extract)
    extract.add_argument("tuned", help="the tuned model: a diffusers folder, file or hub id")
    extract.add_argument("base", help="the model it was tuned from, or embedded for the demo's")
    extract.add_argument("--rank", type=int, help="rank of the LoRA; with --energy, the largest")
    extract.add_argument("--conv-rank", type=int, help="of 3x3 convolutions (default: --rank)")
    extract.add_argument(
        "--energy", type=float, help="share to keep; each module gets its own rank"
    )
    extract.add_argument("--dtype", choices=PRECISIONS, default="fp32", help="default: fp32")
    extract.add_argument(
        "--targets", default="attn-mlp", help="attn-mlp (default), conv, full, unet-only"
    )
    extract.add_argument("--config", help="for single files: diffusers folder or hub id of configs")
    extract.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    extract.add_argument("--overwrite", action="store_true", help="replace the file to write")
    show_examples(
        extract,
        [
            "extract tuned.safetensors v1-5.safetensors --rank 64 --out tuned-lora.safetensors",
            "extract tuned sd15 --energy 0.95 --targets full --out tuned-lora.safetensors",
        ],
    )


def _extract(arguments: argparse.Namespace) -> int:
    from lorasweep.cli.model_argument import model_of
    from lorasweep.core.progress import say
    from lorasweep.export import extract
    from lorasweep.export.svd_ranks import SvdRanks

    tuned, base = (model_of(path, arguments.config) for path in (arguments.tuned, arguments.base))
    extract.extract_and_draw(
        (tuned, base),
        arguments.out,
        SvdRanks(arguments.rank, arguments.conv_rank, arguments.energy),
        arguments.targets,
        arguments.dtype,
        overwrite=arguments.overwrite,
        say=say,
    )
    return 0
