"""Names of a UNet's modules in the original layout, CompVis's, which diffusers has renamed.

Single files have it (A1111, ComfyUI, kohya), and of SDXL kohya's LoRA files too.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",  # SDXL's
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_INDEX = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}
"""A module's index in its block."""


def plain_up_levels(names: Collection[str]) -> frozenset[int]:
    """The up levels without attention, where the upsampler moves up a place.

    `names` are diffusers' of all its modules or tensors.
    """
    found = [re.match(r"up_blocks\.(\d+)\.(\w+)", name) for name in names]
    levels = {(int(match[1]), match[2]) for match in found if match}
    return frozenset(level for level, _ in levels if (level, "attentions") not in levels)


def original_name(name: str, layers: int, plain_up_levels: frozenset[int]) -> str | None:
    """The original name of a module or tensor of a UNet with `layers` residual blocks a level.

    None for a name that has no place there.
    """
    for ours, original in _OUTER.items():
        if f"{name}.".startswith(f"{ours}."):
            return name.replace(ours, original, 1)
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+?)\.(\d+)\.(.+)", name)
    if match is None or match[3] not in _INDEX:
        return None
    side, kind, number, rest = match[1], match[3], int(match[4]), _inner(match[3], match[5])
    if rest is None:
        return None
    index = _INDEX[kind]
    if side == "mid":  # a residual block, attention, a residual block
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
    level = int(match[2])
    if kind.endswith("samplers"):  # down: a block of its own; up: the end of the level's last
        number = layers
        index -= level in plain_up_levels and side == "up"
    block = level * (layers + 1) + number
    if side == "down":
        return f"input_blocks.{1 + block}.{index}.{rest}"
    return f"output_blocks.{block}.{index}.{rest}"


def _inner(kind: str, name: str) -> str | None:
    first, dot, last = name.partition(".")
    if kind == "resnets":
        return f"{_RESNET[first]}{dot}{last}" if first in _RESNET else None
    return f"op{dot}{last}" if kind == "downsamplers" and first == "conv" else name
