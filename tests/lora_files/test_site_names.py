"""Every program's names lead to the same modules; other families are called by their own name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_tensors import dora, lora
from lorasweep.adapters.kohya_names import every_site, sites
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.export.attach_loras import attachable
from lorasweep.lora_files import info, read_lora_file
from lorasweep.lora_files.site_names import diffusers_path, parsed
from renamed_loras import (
    as_comfyui,
    as_kohya,
    as_lycoris,
    as_one_trainer,
    as_original,
    as_peft,
    as_te1,
    by_diffusers,
    without_text_model,
)

ORIGINAL = json.loads(
    (Path(__file__).parents[1] / "recorded/sd15_checkpoint_original_format.json").read_text()
)


def test_the_original_layout_of_sd15_is_read_as_diffusers_reads_it():
    """An oracle: diffusers' own conversion of a checkpoint, each tensor told by its value."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    prefix = "model.diffusion_model."
    names = [name for name in ORIGINAL if name.startswith(prefix)]
    numbered = {name: torch.tensor(float(number)) for number, name in enumerate(names)}
    theirs = convert_ldm_unet_checkpoint(dict(numbered), {"layers_per_block": 2})
    assert len(theirs) == len(names) > 650
    for name, number in theirs.items():
        given = names[int(number)].removeprefix(prefix).rpartition(".")[0].replace(".", "_")
        assert diffusers_path(given, 2) == name.rpartition(".")[0].replace(".", "_"), given


BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
SAME = {
    # kohya's and LyCORIS's
    f"lora_unet_{BLOCK}.lora_down.weight": f"lora_unet_{BLOCK}.lora_down.weight",
    f"lycoris_{BLOCK}.lokr_w1": f"lora_unet_{BLOCK}.lokr_w1",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": f"{TEXT}.alpha",
    "lora_te_encoder_layers_0_mlp_fc1.alpha": f"{TEXT}.alpha",
    # the original layout's
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.alpha": f"lora_unet_{BLOCK}.alpha",
    "lora_unet_input_blocks_3_0_op.alpha": "lora_unet_down_blocks_0_downsamplers_0_conv.alpha",
    "lora_unet_output_blocks_2_1_conv.alpha": "lora_unet_up_blocks_0_upsamplers_0_conv.alpha",
    "lora_unet_output_blocks_5_2_conv.alpha": "lora_unet_up_blocks_1_upsamplers_0_conv.alpha",
    "lora_unet_middle_block_1_proj_in.alpha": "lora_unet_mid_block_attentions_0_proj_in.alpha",
    "lora_unet_middle_block_2_in_layers_2.alpha": "lora_unet_mid_block_resnets_1_conv1.alpha",
    "lora_unet_time_embed_2.alpha": "lora_unet_time_embedding_linear_2.alpha",
    "lora_unet_out_2.alpha": "lora_unet_conv_out.alpha",
    # OneTrainer's
    "unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_up.weight": (
        f"lora_unet_{BLOCK}.lora_up.weight"
    ),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_down.weight": (
        f"lora_unet_{BLOCK}.lora_down.weight"
    ),
    "clip_l.text_model.encoder.layers.0.mlp.fc1.lora_up.weight": f"{TEXT}.lora_up.weight",
    "clip_l.encoder.layers.0.mlp.fc1.dora_scale": f"{TEXT}.dora_scale",
    # ComfyUI's
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_A.weight": (
        f"lora_unet_{BLOCK}.lora_down.weight"
    ),
    "diffusion_model.input_blocks.1.1.proj_in.diff": (
        "lora_unet_down_blocks_0_attentions_0_proj_in.diff"
    ),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight": (
        f"{TEXT}.lora_up.weight"
    ),
    # PEFT's magnitudes under kohya's names, and in diffusers' convert_state_dict_to_kohya
    f"lora_unet_{BLOCK}.lora_magnitude_vector": f"lora_unet_{BLOCK}.dora_scale",
    f"lora_unet_{BLOCK.removesuffix('_to_q')}.to_q.lora_magnitude_vector": (
        f"lora_unet_{BLOCK}.dora_scale"
    ),
}


@pytest.mark.parametrize(("theirs", "ours"), SAME.items())
def test_every_programs_names_become_kohyas(theirs, ours):
    found = parsed(theirs)
    assert found is not None and f"{found.key(layers=2)}.{found.role}" == ours


SCHEMES = [
    *(as_kohya, as_peft, as_one_trainer, as_te1, without_text_model, as_lycoris, as_original),
    *(as_comfyui, by_diffusers),
]


@pytest.mark.parametrize("make", [lora, dora])
@pytest.mark.parametrize("rename", SCHEMES)
def test_a_renamed_file_is_the_same_adapter(rename, make, base, tmp_path):
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"{site.key}.{role}": tensor
        for site in sites(base.parts, "conv")
        for role, tensor in {**make(site, draw), "alpha": torch.tensor(4.0)}.items()
    }
    save_file(rename(tensors, base), tmp_path / "a.safetensors")
    found = read_lora_file.read(tmp_path / "a.safetensors", base)
    assert set(found.tensors) == set(tensors)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    attachable(base, [(found, 1.0)])
    assert found.left_out == {}


def one(name, rank=2, width=768, out=4):
    return {
        f"{name}.lora_down.weight": torch.ones(rank, width),
        f"{name}.lora_up.weight": torch.ones(out, rank),
    }


def described(tensors, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    return info.inspect(tmp_path / "a.safetensors")


CROSS = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
BASES = {
    "te1 of SD1.x": (
        {**one("lora_te1_text_model_encoder_layers_0_mlp_fc1"), **one(f"lora_unet_{CROSS}")},
        "Stable Diffusion 1.x",
    ),
    "te1 of SDXL": (
        {
            **one("lora_te1_text_model_encoder_layers_0_mlp_fc1"),
            **one("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", width=2048),
        },
        "SDXL",
    ),
    "te2": (one("lora_te2_text_model_encoder_layers_0_mlp_fc1", width=1280), "SDXL"),
    "a block that only SDXL has": (
        one("lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q", width=1280),
        "SDXL",
    ),
    "one text encoder alone": (
        one("lora_te1_text_model_encoder_layers_0_self_attn_k_proj"),
        "Stable Diffusion 1.x or SDXL's first text encoder",
    ),
    "SD1.x in the original layout": (
        one("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"),
        "Stable Diffusion 1.x",
    ),
    "SD2.x": (one(f"lora_unet_{CROSS}", width=1024), "Stable Diffusion 2.x"),
}


@pytest.mark.parametrize("name", BASES)
def test_widths_decide_what_the_base_is(name, tmp_path):
    tensors, base = BASES[name]
    assert described(tensors, tmp_path).base == base


FAMILIES = {
    "lora_unet_double_blocks_0_img_attn_qkv": "Flux",
    "lora_unet_single_blocks_0_linear1": "Flux",
    "transformer.single_transformer_blocks.0.attn.to_q": "Flux",
    "diffusion_model.double_blocks.0.img_attn.proj": "Flux",
    "lora_unet_joint_blocks_0_context_block_attn_qkv": "Stable Diffusion 3",
    "transformer.transformer_blocks.0.attn.add_k_proj": "Stable Diffusion 3",
    "lora_unet_double_blocks_0_img_mlp_fc1": "HunyuanVideo",
    "diffusion_model.blocks.0.cross_attn.k": "Wan",
    "transformer.transformer_blocks.0.img_mlp.net.0.proj": "Qwen-Image",
    "lora_prior_unet_down_blocks_0_attn_to_q": "Stable Cascade",
    "transformer.transformer_blocks.0.attn1.to_q": "a diffusion transformer",
    "diffusion_model.transformer_blocks.0.attn1.to_q": "a diffusion transformer",  # LTX
    "lora_unet_blocks_0_attn1_Wqkv": "a diffusion transformer",  # Hunyuan DiT
    "lora_unet_blocks_0_self_attn_q_proj": "a diffusion transformer",  # Cosmos
    "transformer.joint_transformer_blocks.0.attn.to_q": "AuraFlow",
    "diffusion_model.double_stream_blocks.0.block.attn1.to_q": "HiDream",
    "unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q": "AnimateDiff",
    "base_model.model.model.layers.0.self_attn.q_proj": "a language model",
    "base_model.model.model.decoder.layers.0.self_attn.q_proj": "a language model",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "Stable Diffusion 3 or Flux",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_are_called_by_their_name(name, tmp_path):
    found = described(one(name, width=1536), tmp_path)
    assert found.base == FAMILIES[name] and found.type == "LoRA"
    with pytest.raises(CheckpointError, match=f"is a LoRA of {FAMILIES[name]}: only those of"):
        read_lora_file.read(tmp_path / "a.safetensors")


def test_of_attention_alone_widths_and_blocks_tell_flux_sd3_and_qwen_apart(tmp_path):
    name = "transformer.transformer_blocks.0.attn.to_q"
    last = "transformer.transformer_blocks.59.attn.to_q"
    assert described(one(last, width=3072), tmp_path).base == "Qwen-Image"
    assert described(one(name, width=3072), tmp_path).base == "Flux"
    assert described(one(name, width=1536), tmp_path).base == "Stable Diffusion 3"


def test_the_flux_text_encoders_do_not_make_it_sdxl(tmp_path):
    tensors = {
        **one("lora_unet_single_blocks_0_linear1", width=3072),
        **one("lora_te1_text_model_encoder_layers_0_mlp_fc1"),
    }
    assert described(tensors, tmp_path).base == "Flux"


def test_every_site_of_the_model_has_its_name(base):
    for key in every_site(base.parts):
        found = parsed(f"{key}.alpha")
        assert found is not None and found.key() == key
