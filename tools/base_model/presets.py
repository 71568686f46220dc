"""What is built and how long it trains: one preset for a CPU, one for a CUDA device."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how fast one stage trains."""

    samples: int
    batch: int
    muon_lr: float
    adam_lr: float
    autocast: bool
    """bfloat16 arithmetic over float32 weights."""

    @property
    def steps(self) -> int:
        return self.samples // self.batch


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of the three networks, in Stable Diffusion's own terms."""

    pixels: int
    vae_channels: tuple[int, ...]
    """One entry a resolution: three make factor 4, four make factor 8."""
    vae_groups: int
    unet_channels: tuple[int, int, int, int]
    unet_layers: int
    text_width: int
    text_layers: int
    vocabulary: int
    tokens: int
    """Length of a prompt: the tokenizer's model_max_length."""
    vae: Plan
    unet: Plan

    @property
    def factor(self) -> int:
        return int(2 ** (len(self.vae_channels) - 1))

    @property
    def latent_size(self) -> int:
        return self.pixels // self.factor


CPU = Preset(
    pixels=64,
    vae_channels=(24, 48, 64),
    vae_groups=2,
    unet_channels=(32, 64, 96, 128),
    unet_layers=1,
    text_width=128,
    text_layers=2,
    vocabulary=4096,
    tokens=32,
    vae=Plan(samples=20_800, batch=16, muon_lr=0.01, adam_lr=2e-3, autocast=True),
    unet=Plan(samples=112_000, batch=32, muon_lr=0.01, adam_lr=2e-3, autocast=False),
)

CUDA = Preset(
    pixels=128,
    vae_channels=(24, 48, 64, 96),
    vae_groups=2,
    unet_channels=(64, 96, 128, 128),
    unet_layers=2,
    text_width=192,
    text_layers=3,
    vocabulary=8192,
    tokens=32,
    vae=Plan(samples=600_000, batch=64, muon_lr=0.01, adam_lr=2e-3, autocast=True),
    unet=Plan(samples=3_000_000, batch=256, muon_lr=0.01, adam_lr=2e-3, autocast=True),
)

PRESETS = {"cpu": CPU, "cuda": CUDA}
