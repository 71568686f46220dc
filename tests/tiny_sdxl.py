"""A tiny SDXL and a tiny Stable Diffusion 2 of random weights, and the full SDXL without any."""

from copy import deepcopy
from dataclasses import fields
from functools import cache

import torch

from lorasweep.export.single_file_names import ModelLayout, prefixed
from lorasweep.models.sdxl import SDXL

TINY = {
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4, 4],
    "cross_attention_dim": 32 + 48,  # the encoders are told apart by their widths
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 48,
    "sample_size": 8,
}
FULL = {
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
    "sample_size": 128,
}


def unet_of(sizes):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **sizes,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        use_linear_projection=True,
    )


def text_of(name, width, layers, heads, vocabulary):
    import transformers

    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        vocab_size=vocabulary,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return getattr(transformers, name)(config)


def tiny_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.13025,
    )


def write(target, tokenizer):
    """A tiny SDXL of random weights, as diffusers saves it, with the embedded model's words."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=text_of("CLIPTextModel", 32, 2, 2, 4096),
        text_encoder_2=text_of("CLIPTextModelWithProjection", 48, 2, 2, 4096),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet_of(TINY),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_end=0.012),
        add_watermarker=False,
    )
    pipeline.save_pretrained(target)


def write_sd2(target, tokenizer):
    """A tiny Stable Diffusion 2.1: Linear projections, another padding, v-prediction."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    tokenizer = deepcopy(tokenizer)
    tokenizer.pad_token = "!"  # as OpenCLIP pads
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=[2, 4],
        cross_attention_dim=48,
        use_linear_projection=True,
        upcast_attention=True,
        sample_size=8,
    )
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=text_of("CLIPTextModel", 48, 2, 2, 4096),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_end=0.012,
            prediction_type="v_prediction",
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(target)


def write_single_file(base, file, told=()):
    """The model under the names of ldm's files, as people share SDXL's descendants.

    `told` are names of empty tensors, by which a file says what it predicts.
    """
    from safetensors.torch import save_file

    modules = (base.unet, base.vae, base.text_encoder, base.text_encoder_2)
    layout = ModelLayout.from_modules(*modules)
    layout.shapes.pop("text_encoder_2")
    first = {prefixed(name): t for name, t in base.text_encoder.state_dict().items()}
    parts = {"unet": base.unet.state_dict(), "vae": base.vae.state_dict(), "text_encoder": first}
    old, new = "cond_stage_model.transformer.", "conditioner.embedders.0.transformer."
    tensors = {name.replace(old, new): t for name, t in layout.to_original(parts).items()}
    second = base.text_encoder_2.state_dict()
    for name, tensor in second.items():
        if "_proj." in name and "self_attn" in name and "out_proj" not in name:
            continue
        clip = name.removeprefix("text_model.")
        for theirs, ours in OPEN_CLIP.items():
            clip = clip.replace(theirs, ours)
        if name == "text_projection.weight":
            clip, tensor = "text_projection", tensor.T
        tensors[f"conditioner.embedders.1.model.{clip}"] = tensor
    for layer in range(base.text_encoder_2.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            at = f"text_model.encoder.layers.{layer}.self_attn"
            three = [second[f"{at}.{one}_proj.{kind}"] for one in "qkv"]
            key = f"conditioner.embedders.1.model.transformer.resblocks.{layer}.attn.in_proj_{kind}"
            tensors[key] = torch.cat(three)
    tensors |= {name: torch.zeros(0) for name in told}
    save_file({name: t.contiguous() for name, t in tensors.items()}, file)


OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "final_layer_norm": "ln_final",
}


@cache
def full_sdxl():
    """SDXL on torch's meta device."""
    with torch.device("meta"):
        unet, first = unet_of(FULL), text_of("CLIPTextModel", 768, 12, 12, 49408)
        second = text_of("CLIPTextModelWithProjection", 1280, 32, 20, 49408)
    rest = dict.fromkeys(field.name for field in fields(SDXL))
    return SDXL(**{**rest, "unet": unet, "text_encoder": first, "text_encoder_2": second})
