"""Names of Stable Diffusion's original layout: from any structure, both ways."""

import json
from pathlib import Path

import pytest
import torch

from lorasweep.export.single_file_names import ModelLayout, modern_name
from lorasweep.models.model_files import ModelError

DATA = Path(__file__).parents[1] / "recorded"
UNET = {"cross_attention_dim": 768}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
"""SD1.5's, where diffusers' own defaults differ from them."""
ODD_UNET = {
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 3,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
"""Three levels, the first without attention."""


def layout(unet=UNET, vae=VAE, num_text_layers=12):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        text = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=num_text_layers
        )
        modules = UNet2DConditionModel(**unet), AutoencoderKL(**vae), CLIPTextModel(text)
        return ModelLayout.from_modules(*modules)


@pytest.fixture(scope="module")
def small():
    return layout(ODD_UNET, {"block_out_channels": (32,)}, num_text_layers=1)


def filled(layout):
    """Weights of that layout, each tensor different."""
    names = [(part, name) for part, shapes in layout.shapes.items() for name in shapes]
    weights = {part: {} for part in layout.shapes}
    for number, (part, name) in enumerate(names):
        one = torch.full((1,), float(number))
        weights[part][name] = one.expand(layout.shapes[part][name])
    return weights


def test_names_and_shapes_are_the_original_ones_on_sd15():
    expected = json.loads((DATA / "sd15_checkpoint_original_format.json").read_text())
    own = layout()
    ours = {name: list(own.original_shape(*place)) for name, place in own.original.items()}
    assert ours == expected


def test_an_upsampler_stands_behind_attention_or_in_its_place(small):
    names = set(small.original)
    assert "model.diffusion_model.output_blocks.3.2.conv.weight" in names  # attention in level 0
    assert "model.diffusion_model.output_blocks.7.2.conv.weight" in names
    plain = layout(
        ODD_UNET | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")},
        {"block_out_channels": (32,)},
        num_text_layers=1,
    )
    assert "model.diffusion_model.output_blocks.3.1.conv.weight" in plain.original


def test_there_and_back_gives_every_tensor_its_name_and_shape_again(small):
    weights = filled(small)
    back, leftover = small.to_diffusers(small.to_original(weights))
    assert leftover == []
    for part, tensors in weights.items():
        assert set(back[part]) == set(tensors)
        assert all(torch.equal(back[part][name], tensor) for name, tensor in tensors.items())


def test_files_without_text_model_and_with_linear_vae_attention_are_read_too(small):
    original = small.to_original(filled(small))
    other = {
        name.replace("transformer.text_model.", "transformer."): (
            tensor.flatten(1) if ".attn_1." in name and tensor.dim() == 4 else tensor
        )
        for name, tensor in original.items()
    }
    assert set(other) != set(original)
    back, leftover = small.to_diffusers(other)
    small.check(back)
    assert leftover == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "encoder.mid_block.attentions.0.query.weight",
            "encoder.mid_block.attentions.0.to_q.weight",
        ),
        (
            "decoder.mid_block.attentions.0.proj_attn.bias",
            "decoder.mid_block.attentions.0.to_out.0.bias",
        ),
        ("decoder.mid_block.attentions.0.to_k.bias", "decoder.mid_block.attentions.0.to_k.bias"),
        ("encoder.conv_in.weight", "encoder.conv_in.weight"),
    ],
)
def test_old_names_of_the_vaes_attention_become_todays(old, new):
    assert modern_name("vae", old) == new


def test_a_missing_and_a_misshapen_tensor_are_named(small):
    weights = filled(small)
    weights["vae"].pop("quant_conv.bias")
    with pytest.raises(ModelError, match=r"1 of the vae's .* first quant_conv\.bias"):
        small.check(weights)
    weights = filled(small)
    weights["unet"]["conv_in.bias"] = torch.zeros(9)
    with pytest.raises(ModelError, match=r"unet's conv_in\.bias has the shape \(9,\)"):
        small.check(weights)


def test_stable_diffusion_2_is_refused():
    with pytest.raises(ModelError, match="Stable Diffusion 2"):
        layout(UNET | {"use_linear_projection": True}, num_text_layers=1)
