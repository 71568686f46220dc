"""The denoiser: UNet and text encoder, trained together on cached latents of the concepts."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from safetensors.torch import save_file
from tools.base_model import captions, data, icons, text, vae
from tools.base_model.loop import fit, streams
from tools.base_model.optim import zero_outputs
from tools.base_model.presets import Preset
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

STAGE = 2  # its number in the random streams
OFTEN, OFTEN_STYLES = 2.0, ("3d", "noto")  # the demo's styles are drawn twice as often
WHITE_SHARE = 0.3  # of the pictures; the other colours share the rest
CHECKPOINT_STEPS = 500
HELD_OUT_STYLES = ("gradient", "flat", "blob", "firefox")  # not those that the evaluation draws


@dataclass(frozen=True)
class Picture:
    """One rendering of a concept."""

    style: str
    label: str
    tags: tuple[str, ...]
    rgba: NDArray[np.uint8]


@dataclass(frozen=True)
class Latents:
    """The training set: `latents` (N, colours, 4, S/f, S/f) of N pictures, scaled."""

    pictures: list[Picture]
    latents: Tensor


class Denoiser(nn.Module):
    """UNet and text encoder as one model, so that one optimizer trains both."""

    def __init__(self, unet: UNet2DConditionModel, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = encoder

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        words = self.text_encoder(ids)[0]
        drawn: Tensor = self.unet(noisy, t, words).sample
        return drawn


def build(preset: Preset, tokenizer: CLIPTokenizer, seed: int) -> Denoiser:
    """A new UNet of Stable Diffusion 1.5's topology, with its text encoder."""
    encoder = text.build(preset, tokenizer, seed)
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=preset.latent_size,
        block_out_channels=preset.unet_channels,
        layers_per_block=preset.unet_layers,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=preset.text_width,
        attention_head_dim=4,  # SD1.5's misnomer: the number of heads
        norm_num_groups=16,
    )
    zero_outputs(unet)
    return Denoiser(unet, encoder)


def scheduler() -> DDIMScheduler:
    """v-prediction down to zero signal, so that dark and bright pictures are both reachable."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def train(
    preset: Preset, seed: int, device: str, work: Path, autoencoder: AutoencoderKL
) -> Denoiser:
    """Train or resume it; returns it with averaged weights."""
    tokenizer = text.make_tokenizer(preset, work)
    model = build(preset, tokenizer, seed).to(device)
    model.unet.to(memory_format=torch.channels_last)
    cached = cache(preset, seed, work, autoencoder)
    noiser = scheduler()

    def loss_at(step: int) -> Tensor:
        rng, noise = streams(seed, STAGE, step)
        clean, texts = draw(rng, cached, preset.unet.batch)
        eps = torch.randn(clean.shape, generator=noise)
        t = stratified(noise, len(clean))
        noisy, target = noiser.add_noise(clean, eps, t), noiser.get_velocity(clean, eps, t)
        ids = text.token_ids(tokenizer, texts)
        noisy = noisy.to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=preset.unet.autocast):
            drawn = model(noisy, t.to(device), ids.to(device))
        return (drawn.float() - target.to(device)).square().mean()

    def keep(step: int, average: dict[str, Tensor]) -> None:
        if step % CHECKPOINT_STEPS == 0 or step == preset.unet.steps:
            folder = work / "checkpoints"
            folder.mkdir(exist_ok=True)
            half = {name: value.half().contiguous().cpu() for name, value in average.items()}
            save_file(half, folder / f"{step:06d}.safetensors")

    average = fit(model, loss_at, preset.unet, work / "unet.state", on_step=keep)
    model.load_state_dict(average, strict=False)
    return model.requires_grad_(False).eval()


def draw(rng: np.random.Generator, cached: Latents, size: int) -> tuple[Tensor, list[str]]:
    """A batch of latents (size, 4, S/f, S/f) and their captions."""
    names = list(data.COLOURS)
    share = np.full(len(names), (1 - WHITE_SHARE) / (len(names) - 1))
    share[names.index("white")] = WHITE_SHARE
    weight = np.array([OFTEN if p.style in OFTEN_STYLES else 1.0 for p in cached.pictures])
    which = rng.choice(len(weight), size=size, p=weight / weight.sum())
    colour = rng.choice(len(names), size=size, p=share)
    texts = []
    for i, c in zip(which, colour, strict=True):
        p = cached.pictures[i]
        texts.append(captions.draw(rng, p.style, p.label, p.tags, names[c]))
    return cached.latents[which, colour], texts


def stratified(noise: torch.Generator, size: int) -> Tensor:
    """(size,) time steps, one in each of `size` equal parts of the 1000."""
    spread = (torch.randperm(size, generator=noise) + torch.rand(size, generator=noise)) / size
    return (spread * 1000).long().clamp(max=999)


def cache(preset: Preset, seed: int, work: Path, autoencoder: AutoencoderKL) -> Latents:
    """Encode the trained pictures on every colour, once."""
    pictures, _ = split(preset, seed, work)
    path = work / "latents.pt"
    if not path.exists():
        rgba = np.stack([p.rgba for p in pictures])
        factor = autoencoder.config.scaling_factor
        each = [
            vae.encode(autoencoder, torch.from_numpy(data.on_colour(rgba, colour))) * factor
            for colour in data.COLOURS
        ]
        part = path.with_suffix(".part")
        torch.save(torch.stack(each, dim=1), part)
        part.rename(path)
    return Latents(pictures, torch.load(path, weights_only=True))


def split(preset: Preset, seed: int, work: Path) -> tuple[list[Picture], list[Picture]]:
    """The concepts' renderings: those trained on, and one a concept held out for the evaluation."""
    rng = np.random.default_rng(seed)
    everything = list(renderings(preset, work))
    trained, held = [], []
    for concept in icons.concepts():
        own = [p for p in everything if p.label == concept]
        spare = [p.style for p in own if p.style in HELD_OUT_STYLES]
        style = spare[rng.integers(len(spare))]
        held += [p for p in own if p.style == style]
        trained += [p for p in own if p.style != style]
    return trained, held


def renderings(preset: Preset, work: Path) -> list[Picture]:
    """Every set's picture of every concept it has."""
    wanted = set(icons.concepts())
    found = []
    for style, name in icons.STYLES.items():
        rendered = icons.load(work / f"icons{preset.pixels}", name, preset.pixels)
        rows = zip(rendered.labels, rendered.tags, rendered.rgba, strict=True)
        found += [Picture(style, *row) for row in rows if row[0] in wanted]
    return found
