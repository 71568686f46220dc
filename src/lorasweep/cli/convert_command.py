"""`lorasweep convert SOURCE TARGET`: between a diffusers folder and a single file."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorasweep.cli.command_line import Commands, add_command, say_lines, show_examples
from lorasweep.models.base_model import PRECISIONS

_WORDS = (
    "SOURCE: a diffusers folder, hub id or .safetensors file, or embedded for the demo's model;"
    " TARGET: what to write, a name in .safetensors for a file"
)


def add_parser(commands: Commands) -> None:
    """Add the command's words and flags."""
    text = "diffusers folder <-> single .safetensors"
    convert = add_command(commands, "convert", _convert, text, "SOURCE TARGET", _WORDS)
    convert.add_argument("--config", help="folder or hub id of a single file's configs, tokenizer")
    convert.add_argument("--vae", help="a VAE's file or folder, for a file without one or instead")
    convert.add_argument("--dtype", choices=PRECISIONS, help="precision (default: as it is)")
    convert.add_argument("--overwrite", action="store_true", help="replace an existing TARGET")
    show_examples(
        convert,
        ["convert v1-5.safetensors sd15", "convert sd15 sd15-fp16.safetensors --dtype fp16"],
        settings="model.config, model.prediction_type",
    )


def _convert(arguments: argparse.Namespace) -> int:
    from lorasweep.cli.model_argument import model_path
    from lorasweep.config.compose import compose_without_images
    from lorasweep.export import convert_model

    source, target = arguments.words
    cfg = compose_without_images(arguments.overrides, arguments.config_dir)
    done = convert_model.convert(
        model_path(source),
        Path(target),
        config=model_path(arguments.config) if arguments.config else cfg.model.config,
        prediction_type=cfg.model.prediction_type,
        vae=arguments.vae,
        precision=arguments.dtype,
        overwrite=arguments.overwrite,
    )
    say_lines([f"Written: {done.path}", *done.lines])
    return 0
