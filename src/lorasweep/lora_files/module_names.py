"""Where in a model a site is, told from its name in files alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

_BLOCK = re.compile(
    r"_(down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks)_(\d+)"
)
_LDM_LAYERS = 3  # of the original layout's blocks, those that make up one of diffusers'


def part_of(key: str) -> str:
    """unet, text encoder, or text encoder 2, of a site's name in files."""
    if key.startswith("lora_unet_"):
        return "unet"
    return "text encoder 2" if key.startswith("lora_te2_") else "text encoder"


def block_of(key: str) -> str:
    """text encoder, down 0-3, mid, up 0-3, or `in, out, time` for the UNet's outer modules."""
    if part_of(key) != "unet":
        return part_of(key)
    if "_mid_block_" in key or "_middle_block_" in key:
        return "mid"
    match = _BLOCK.search(key)
    if match is None:
        return "in, out, time"
    name, number = match[1], int(match[2])
    if name == "input_blocks":  # the first is conv_in
        return f"down {(number - 1) // _LDM_LAYERS}" if number else "in, out, time"
    if name == "output_blocks":
        return f"up {number // _LDM_LAYERS}"
    return f"{name.removesuffix('_blocks')} {number}"


def targets_of(sites: Iterable[str]) -> str:
    """The preset that the names belong to, or what they are of."""
    kinds = {_target_kind(key) for key in sites}
    presets = {
        frozenset({"text encoder", "transformer blocks"}): "attn-mlp",
        frozenset({"transformer blocks"}): "unet-only",
        frozenset({"text encoder", "transformer blocks", "convolutions"}): "conv",
        frozenset({"text encoder", "transformer blocks", "convolutions", "outer modules"}): "full",
    }
    return presets.get(frozenset(kinds), " + ".join(sorted(kinds)))


def _target_kind(key: str) -> str:
    if part_of(key) != "unet":
        return "text encoder"
    if block_of(key) == "in, out, time":
        return "outer modules"
    if "_attentions_" in key or "transformer_blocks" in key or "_proj_" in key:
        return "transformer blocks"
    return "convolutions"


def order_of(block: str) -> tuple[int, str]:
    """In the order in which the model computes them."""
    order = ("text", "in,", "down", "mid", "up")
    return order.index(block.split()[0]), block
