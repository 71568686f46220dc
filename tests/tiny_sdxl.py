"""A tiny SDXL of random weights, and SDXL's full topology without any."""

from dataclasses import fields

import torch

from lorasweep.models.sdxl import SDXL

TINY = {
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4, 4],
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
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


def write(target, tokenizer):
    """A tiny SDXL of random weights, as diffusers saves it, with the embedded model's words."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.13025,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_of("CLIPTextModel", 32, 2, 2, 4096),
        text_encoder_2=text_of("CLIPTextModelWithProjection", 32, 2, 2, 4096),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet_of(TINY),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_end=0.012),
        add_watermarker=False,
    )
    pipeline.save_pretrained(target)


def full_sdxl():
    """SDXL on torch's meta device."""
    with torch.device("meta"):
        unet, first = unet_of(FULL), text_of("CLIPTextModel", 768, 12, 12, 49408)
        second = text_of("CLIPTextModelWithProjection", 1280, 32, 20, 49408)
    rest = dict.fromkeys(field.name for field in fields(SDXL))
    return SDXL(**{**rest, "unet": unet, "text_encoder": first, "text_encoder_2": second})
