"""The finished folder: a plain fp16 StableDiffusionPipeline, and checkpoints made into one."""

import copy
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file
from tools.base_model import text, unet
from tools.base_model.presets import Preset
from transformers import CLIPTokenizer


def checkpoints(work: Path) -> list[Path]:
    """The averaged weights kept on the way, oldest first."""
    return sorted((work / "checkpoints").glob("*.safetensors"))


def from_checkpoint(
    preset: Preset, work: Path, autoencoder: AutoencoderKL, checkpoint: Path, folder: Path
) -> Path:
    """Make a pipeline folder of a checkpoint."""
    tokenizer = text.make_tokenizer(preset, work)
    model = unet.build(preset, tokenizer, seed=0)
    model.load_state_dict(load_file(checkpoint), strict=False)
    save(autoencoder, model.eval(), tokenizer, folder)
    return folder


def save(
    autoencoder: AutoencoderKL, model: unet.Denoiser, tokenizer: CLIPTokenizer, folder: Path
) -> None:
    """Write a pipeline folder in fp16, whole or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipe = StableDiffusionPipeline(
        vae=copy.deepcopy(autoencoder).to("cpu", torch.float16),
        unet=copy.deepcopy(model.unet).to("cpu", torch.float16),
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        scheduler=unet.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(part, safe_serialization=True)
    text.save_encoder(model.text_encoder, part / "text_encoder")
    text.save_tokenizer(tokenizer, part / "tokenizer")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def megabytes(folder: Path) -> float:
    """Size of a folder in MB of 10^6 bytes."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6
