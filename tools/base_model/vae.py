"""The autoencoder: an AutoencoderKL trained from nothing on the coloured sets."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from tools.base_model import data, icons
from tools.base_model.loop import fit, streams
from tools.base_model.optim import zero_outputs
from tools.base_model.presets import Preset
from torch import Tensor

STAGE = 1  # its number in the random streams
KL_WEIGHT = 1e-3  # latents near unit variance, with some noise that the decoder learns to bear


def build(preset: Preset, seed: int) -> AutoencoderKL:
    """A new autoencoder with the preset's channels."""
    torch.manual_seed(seed)
    stages = len(preset.vae_channels)
    vae = AutoencoderKL(
        sample_size=preset.pixels,
        block_out_channels=preset.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=preset.vae_groups,
    )
    zero_outputs(vae)
    return vae


def train(preset: Preset, seed: int, device: str, work: Path) -> AutoencoderKL:
    """Train or resume it; returns it with averaged weights and its scaling factor measured."""
    vae = build(preset, seed).to(device, memory_format=torch.channels_last)
    pictures = data.VaePictures(work / f"icons{preset.pixels}", preset.pixels)

    def loss_at(step: int) -> Tensor:
        rng, noise = streams(seed, STAGE, step)
        batch = torch.from_numpy(pictures.batch(rng, preset.vae.batch))
        shape = (len(batch), 4, preset.latent_size, preset.latent_size)
        eps = torch.randn(shape, generator=noise).to(device)
        batch = batch.to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=preset.vae.autocast):
            posterior = vae.encode(batch).latent_dist
            latents = posterior.mean + posterior.std * eps
            drawn = vae.decode(latents).sample
        error = drawn.float() - batch
        kl = posterior.kl() / latents[0].numel()
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * kl.mean()

    average = fit(vae, loss_at, preset.vae, work / "vae.state")
    vae.load_state_dict(average, strict=False)
    vae.requires_grad_(False).eval()
    vae.register_to_config(scaling_factor=scaling_factor(vae, preset, work))
    return vae


def load(folder: Path) -> AutoencoderKL:
    """Read a trained one; unlike `from_pretrained` it does not note the folder in its config."""
    vae = AutoencoderKL.from_config(json.loads((folder / "config.json").read_text()))
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return vae.requires_grad_(False).eval()


def scaling_factor(vae: AutoencoderKL, preset: Preset, work: Path) -> float:
    """The factor that gives the concepts' latents unit variance."""
    folder = work / f"icons{preset.pixels}"
    rgba = data.style_pictures(folder, preset.pixels, list(icons.STYLES.values()))
    both = [encode(vae, torch.from_numpy(data.on_colour(rgba, c))) for c in ("white", "blue")]
    return 1 / float(torch.cat(both).std())


def fidelity(vae: AutoencoderKL, preset: Preset, work: Path) -> dict[str, float]:
    """PSNR in dB of the concepts in each set, the unseen one too, on white."""
    found = {}
    for name in (*icons.STYLES.values(), icons.UNSEEN):
        rgba = data.style_pictures(work / f"icons{preset.pixels}", preset.pixels, [name])
        pictures = data.on_colour(rgba, "white")
        found[name] = data.psnr(roundtrip(vae, torch.from_numpy(pictures)).numpy(), pictures)
    return found


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, batch: int = 64) -> Tensor:
    """Posterior means (N, 4, S/f, S/f), unscaled, on the CPU."""
    parts = [vae.encode(p.to(vae.device)).latent_dist.mean.cpu() for p in pictures.split(batch)]
    return torch.cat(parts)


@torch.no_grad()
def roundtrip(vae: AutoencoderKL, pictures: Tensor, batch: int = 64) -> Tensor:
    """What comes back of pictures."""
    latents = encode(vae, pictures, batch)
    parts = [vae.decode(z.to(vae.device)).sample.cpu() for z in latents.split(batch)]
    return torch.cat(parts)
