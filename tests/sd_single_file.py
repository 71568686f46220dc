"""Writes a diffusers model as one file in Stable Diffusion's original layout, for tests."""

import re
from pathlib import Path

from safetensors.torch import save_file

from lorasweep.models import BaseModel


def write_single_file(base: BaseModel, path: Path) -> Path:
    """UNet, VAE and text encoder under the names of CompVis's checkpoints."""
    tensors = {}
    for name, tensor in base.unet.state_dict().items():
        tensors[f"model.diffusion_model.{_unet(name, base.unet.config.layers_per_block)}"] = tensor
    blocks = len(base.vae.config.block_out_channels)
    for name, tensor in base.vae.state_dict().items():
        new = _vae(name, blocks)
        is_attention = ".mid.attn_1." in new and tensor.dim() == 2
        tensors[f"first_stage_model.{new}"] = tensor[..., None, None] if is_attention else tensor
    inner = getattr(base.text_encoder, "text_model", base.text_encoder)
    for name, tensor in inner.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def _unet(name: str, layers: int) -> str:
    step = layers + 1  # blocks of a level: its layers and the down- or upsampler
    outer = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for old, new in outer.items():
        if name.startswith(f"{old}."):
            return name.replace(old, new, 1)
    if match := re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.", name):
        level, kind, layer = int(match[1]), match[2], int(match[3])
        place = 1 + level * step + (layers if kind == "downsamplers" else layer)
        inner = {"resnets": "0", "attentions": "1", "downsamplers": "0"}[kind]
        rest = name[match.end() :].replace("conv.", "op.") if kind == "downsamplers" else None
        return f"input_blocks.{place}.{inner}.{_resnet(rest or name[match.end() :], kind)}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.", name):
        place = {"resnets": {"0": 0, "1": 2}, "attentions": {"0": 1}}[match[1]][match[2]]
        return f"middle_block.{place}.{_resnet(name[match.end() :], match[1])}"
    match = re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.", name)
    assert match, name
    level, kind, layer = int(match[1]), match[2], int(match[3])
    if kind == "upsamplers":
        inner = "2" if level > 0 else "1"  # the first level has no attentions
        return f"output_blocks.{level * step + layers}.{inner}.{name[match.end() :]}"
    inner = {"resnets": "0", "attentions": "1"}[kind]
    return f"output_blocks.{level * step + layer}.{inner}.{_resnet(name[match.end() :], kind)}"


def _resnet(name: str, kind: str) -> str:
    if kind != "resnets":
        return name
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    first, _, rest = name.partition(".")
    return f"{names[first]}.{rest}"


def _vae(name: str, blocks: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(
        r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", name
    )
    name = re.sub(
        r"up_blocks\.(\d+)\.upsamplers\.0\.",
        lambda m: f"up.{blocks - 1 - int(m[1])}.upsample.",
        name,
    )
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
    for old, new in {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }.items():
        name = name.replace(f"attn_1.{old}.", f"attn_1.{new}.")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
