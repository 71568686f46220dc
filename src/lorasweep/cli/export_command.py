"""`lorasweep export CHECKPOINT|RUN`: take a LoRA to other programs."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from lorasweep.cli.command_line import Commands, add_command, say_lines, show_examples
from lorasweep.core.text import shown
from lorasweep.models.base_model import PRECISIONS

FORMATS = ("merged", "kohya", "diffusers-lora", "offline-lora")


def add_parser(commands: Commands) -> None:
    """Add the command's words and flags."""
    words_help = "a LoRA's .safetensors file, a run's name, or a checkpoint's (RUN-e012)"
    text = "take a LoRA to other programs"
    export = add_command(commands, "export", _export, text, "CHECKPOINT|RUN", words_help)
    export.add_argument(
        "--to",
        required=True,
        type=_form,
        metavar="FORM|PROGRAM",
        help="merged: the whole model with the LoRA in it; kohya: a LoRA file under kohya's names"
        " (or say a1111, forge, comfyui); diffusers-lora (or diffusers): for load_lora_weights;"
        " offline-lora: for generic diffusion feature",
    )
    export.add_argument("--out", type=Path, help="where to; ending in .safetensors: a single file")
    export.add_argument(
        "--strength",
        default="1",
        help="1 (default) is as trained; or by part and block: unet:0.8,te:0.5,down4:0",
    )
    export.add_argument(
        "--with",
        dest="others",
        action="append",
        default=[],
        metavar="FILE=WEIGHT",
        help="merge a further LoRA too; may be given several times",
    )
    export.add_argument("--unet-only", action="store_true", help="leave the text encoder as it is")
    export.add_argument("--rank", type=int, help="of the approximation, where one is needed")
    export.add_argument("--dtype", choices=PRECISIONS, help="precision (default: the base's)")
    export.add_argument("--vae", help="a VAE's file or folder, for a base without one or instead")
    export.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read .ckpt and .pt LoRAs too: only those that you trust, for they can run any code",
    )
    export.add_argument("--overwrite", action="store_true", help="replace what is there")
    show_examples(
        export,
        [
            "export photos-3-e012 --to comfyui",
            "export photos-3 --to merged --out merged.safetensors",
        ],
        settings="model=…, model.path, output_root, tracking.*",
    )


def _form(word: str) -> str:
    """A form, or the one that a program reads."""
    from lorasweep.core.trainer_words import EXPORT_OF, meant

    form = EXPORT_OF.get(word.lower(), word)
    if form in FORMATS:
        return form
    known = [*FORMATS, *EXPORT_OF]
    close = meant(word, known)
    hint = f"did you mean {close}?" if close in known else f"choose one of {', '.join(known)}"
    raise argparse.ArgumentTypeError(f"{shown(word)}: there is no such form or program; {hint}")


def _export(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        if arguments.allow_pickle:
            arguments.word = _unpickled(arguments.word, Path(folder, "0"))
            others = (text.rpartition("=") for text in arguments.others)
            arguments.others = [
                f"{_unpickled(file, Path(folder, str(number)))}={weight}"
                for number, (file, _, weight) in enumerate(others, start=1)
            ]
        return _exported(arguments)


def _unpickled(word: str, folder: Path) -> str:
    """The file that stands for a pickled LoRA; any other word as it is."""
    from lorasweep.lora_files import pickled_lora
    from lorasweep.models.model_settings import PICKLED

    if Path(word).suffix.lower() not in PICKLED:
        return word
    folder.mkdir()
    return str(pickled_lora.as_safetensors(Path(word), folder))


def _exported(arguments: argparse.Namespace) -> int:
    from lorasweep.export import export_lora, find_lora, lora_weights

    found = find_lora.find(arguments.word, arguments.overrides, arguments.config_dir)
    say_lines(found.lines)
    done = export_lora.export(
        found,
        arguments.to,
        out=arguments.out,
        strength=lora_weights.parsed(arguments.strength, f"--strength {arguments.strength}"),
        others=arguments.others,
        unet_only=arguments.unet_only,
        rank=arguments.rank,
        precision=arguments.dtype,
        vae=arguments.vae,
        overwrite=arguments.overwrite,
    )
    say_lines([f"Written: {done.path}", *done.lines])
    return 0
