"""The safetensors files of a diffusers folder's parts: whole, in pieces, or the variant fp16."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.models.base_model import Precision
from lorasweep.models.model_files import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILES = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder_2": "model.safetensors",  # SDXL's
}
"""A folder's weights by part."""
VARIANT: Precision = "fp16"
"""The variant that SDXL's folders have beside, or instead of, their plain weights."""


def load_part(folder: Path, part: str) -> Mapping[str, Tensor]:
    """A part's tensors: in one piece, in those that diffusers cuts large ones into, or in fp16."""
    path = folder / part / FILES[part]
    variant = variant_of(path)
    pieces = _pieces(path) or ([variant] if variant.is_file() else [])
    if not pieces:
        raise ModelError(
            f"{path} is missing; only safetensors are read (in pieces too, or {variant.name}), not"
            " pickles (.bin)"
        )
    return {name: tensor for piece in pieces for name, tensor in load(piece).items()}


def _pieces(path: Path) -> list[Path]:
    """The file, or the pieces that the index beside it names; none where there is neither."""
    if path.is_file():
        return [path]
    index = path.with_name(f"{path.name}.index.json")
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} can't be read: give a whole diffusers folder") from None
    if stray := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ModelError(f"{index} names {stray[0]!r}, which is no file beside it")
    return [path.with_name(name) for name in sorted(names)]


def variant_of(path: Path) -> Path:
    """Where the variant of a plain file lies."""
    return path.with_name(f"{path.stem}.{VARIANT}{path.suffix}")


def link(path: Path, target: Path) -> bool:
    """Give a file a second name, where the file system can."""
    try:
        os.link(path, target)
    except OSError:
        return False
    return True


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises ModelError for what isn't whole safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise ModelError(f"{path}: only .safetensors files are read, for others can run any code")
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: give a whole diffusers folder") from None
    except SafetensorError as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}") from None


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as diffusers does. Raises OSError where the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, in its words
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def has_variant_only(folder: Path) -> bool:
    """Does a diffusers folder hold a part's weights in fp16, under a variant's name, alone?"""
    return any(
        variant_of(folder / part / name).is_file() and not _pieces(folder / part / name)
        for part, name in FILES.items()
    )


def dtype_of(precision: Precision) -> torch.dtype:
    """torch's name of a precision."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
