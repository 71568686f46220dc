"""LoRA files attached to a base model, each with a weight of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.adapters.kohya_names import every_site
from lorasweep.adapters.pack import Pack
from lorasweep.adapters.stack import Stack
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.export.lora_weights import Weight, weight_at
from lorasweep.lora_files.read_lora_file import LoRAFile, weight_shape
from lorasweep.models.sdxl import Base

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Loras = Sequence[tuple[Path, Weight]]
"""LoRA files and the weight of each one's delta; 1 is as trained."""
Weighted = Sequence[tuple[Pack, Weight]]
"""Packs of one adapter each, and the weight of its delta."""
GIVE_ITS_BASE = "Give the one it was trained on by model=OPTION or model.path=FOLDER"


def attachable(
    base: Base, files: Sequence[tuple[LoRAFile, Weight]], remedy: str = GIVE_ITS_BASE
) -> Weighted:
    """LoRA files as packs of one on this base. Raises CheckpointError, with a remedy, for a misfit.

    The files' tensors are under the keys of the base's sites (`read_lora_file.read`).
    """
    found = []
    for file, weight in files:
        try:
            found.append((Pack.from_files(base.parts, [file.tensors]), weight))
        except CheckpointError as error:
            question = f". Is it of another base than {base.settings.path}? {remedy}"
            told = question.rstrip() if _is_of_another_width(base, file) else ""
            raise CheckpointError(f"{file.path}: {error}{told}") from None
    return found


def _is_of_another_width(base: Base, file: LoRAFile) -> bool:
    """Do the shapes of a file that doesn't fit say that it belongs to another base?"""
    known = every_site(base.parts)
    shapes = ((key, weight_shape(site)) for key, site in file.sites.items())
    found = {key: math.prod(shape) for key, shape in shapes if shape is not None}
    if any(size != known[key].weight.numel() for key, size in found.items() if key in known):
        return True
    return file.text_width not in (None, base.text_width)


@contextmanager
def attached(adapters: Weighted) -> Iterator[None]:
    """Within, the base computes with the sum of all deltas, each times its weight.

    Each delta is taken of the bare weights, so a DoRA's doesn't depend on what else is attached.
    """
    members: dict[torch.nn.Module, list[tuple[Stack, float]]] = {}
    for pack, weight in adapters:
        assert len(pack) == 1, "one adapter a pack"
        for entry in pack.entries:
            members.setdefault(entry.site.module, []).append(
                (entry.stack, weight_at(weight, entry.site))
            )
    handles = [
        module.register_forward_hook(partial(_add_weighted, own)) for module, own in members.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_weighted(
    members: Sequence[tuple[Stack, float]],
    module: torch.nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    total = output
    for stack, weight in members:
        total = total + weight * (stack.forward(args[0], output, None) - output)
    return total
