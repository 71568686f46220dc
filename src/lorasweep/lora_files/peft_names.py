"""A LoRA under PEFT's names, which diffusers loads. The way back is in site_names.py.

kohya: lora_unet_down_blocks_0_…_attn1_to_q.lora_down.weight, alpha beside it
PEFT:  unet.down_blocks.0.….attn1.to_q.lora_A.weight, alpha in the file's metadata

The libraries' converters aren't exact: diffusers' convert_state_dict_to_kohya takes the rank for
every alpha and calls SD1.x's text encoder lora_te1; its way back drops dora_scale, and alphas that
differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorasweep.adapters.kohya_names import by_site
from lorasweep.adapters.weight_deltas import scale_of
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.text import shown

if TYPE_CHECKING:
    from torch import Tensor

_WORDS = (
    "down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out"
    " time_emb_proj conv_shortcut conv_in conv_out time_embedding add_embedding linear_1 linear_2"
    " text_model self_attn q_proj k_proj v_proj out_proj text_projection"
)
_PIECE = re.compile(r"(?:%s)(?=_|$)|[^_]+" % "|".join(_WORDS.split()))  # noqa: UP031
_PARTS = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
}


def to_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA or DoRA of kohya's names under PEFT's, which diffusers loads; scales are folded in.

    Magnitudes must be of outputs, (out, 1) or (out, 1, 1, 1). The scale goes into lora_B in fp32
    and is rounded back to the file's type; raises CheckpointError where that overflows.
    """
    found: dict[str, Tensor] = {}
    for key, site in by_site(tensors).items():
        name = peft_path(key)
        down, up = site["lora_down.weight"], site["lora_up.weight"]
        found[f"{name}.lora_A.weight"] = down
        scaled = (up.float() * scale_of(site)).to(up.dtype)
        if not bool(scaled.isfinite().all()):
            raise CheckpointError(f"{key}: scaled by alpha / rank it is too large for {up.dtype}")
        found[f"{name}.lora_B.weight"] = scaled
        if "dora_scale" in site:
            magnitude = site["dora_scale"].flatten()
            is_conv = down.dim() == 4
            shape = (1, -1, 1, 1) if is_conv else (-1,)
            found[f"{name}.lora_magnitude_vector.weight"] = magnitude.reshape(shape)
    return found


def peft_path(key: str) -> str:
    """unet.down_blocks.0.… of lora_unet_down_blocks_0_…; raises CheckpointError for others."""
    prefix = next((p for p in sorted(_PARTS, reverse=True) if key.startswith(f"{p}_")), None)
    if prefix is None:
        raise CheckpointError(f"{shown(key)} is no name of Stable Diffusion's modules")
    rest = key.removeprefix(f"{prefix}_")
    return f"{_PARTS[prefix]}.{'.'.join(_PIECE.findall(rest))}"
