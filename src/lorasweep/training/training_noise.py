"""The noise of a training step and its timesteps: kohya's options, by kohya's names.

What each does was read from sd-scripts' code of February 2026: library/train_util.py
(get_noise_noisy_latents_and_timesteps) and library/custom_train_functions.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat

from lorasweep.core import rng
from lorasweep.core.settings import Settings, SettingsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DrawnNoise:
    """What one run's batch is noised with, on the CPU."""

    target: Tensor
    """(rows, C, h, w): what the model is to find."""
    on_input: Tensor
    """(rows, C, h, w): what its input is noised with; the same but for ip_noise_gamma."""
    timesteps: Tensor
    """(rows,)"""


@dataclass(frozen=True, kw_only=True)
class TrainingNoise(Settings):
    """Which noise a run trains on, and at which timesteps."""

    noise_offset: NonNegativeFloat
    noise_offset_random_strength: bool = False  # these are later than runs of older versions
    adaptive_noise_scale: float = 0.0
    multires_noise_iterations: Annotated[int, Field(ge=0, le=100)] = 0
    multires_noise_discount: NonNegativeFloat = 0.3
    ip_noise_gamma: NonNegativeFloat = 0.0
    ip_noise_gamma_random_strength: bool = False
    min_timestep: Annotated[int, Field(ge=0, lt=1000)] = 0
    max_timestep: Annotated[int, Field(gt=0, le=1000)] = 1000

    def __post_init__(self) -> None:
        if self.min_timestep >= self.max_timestep:
            raise SettingsError(
                f"trainer.min_timestep={self.min_timestep}: give a number below"
                f" trainer.max_timestep={self.max_timestep}, which itself is not drawn"
            )
        if self.adaptive_noise_scale and not self.noise_offset:
            raise SettingsError(
                f"trainer.adaptive_noise_scale={self.adaptive_noise_scale:g} is added to"
                " trainer.noise_offset, which is 0, so both are off; give it too"
            )

    def draw(self, seed: int, step: int, latents: Tensor, num_timesteps: int) -> DrawnNoise:
        """Draw for a run's latents (rows, C, h, w) of a micro step, of a schedule so long."""
        import torch

        draw, shape = rng.generator(seed, "noise", step), latents.shape
        noise = torch.randn(shape, generator=draw)
        if self.noise_offset > 0:  # kohya: the offset noise is the target too
            noise += self._offset(latents, draw) * torch.randn(*shape[:2], 1, 1, generator=draw)
        if self.multires_noise_iterations > 0:
            noise = self._with_pyramid(noise, draw, rng.python_random(seed, "multires", step))
        on_input = noise
        if self.ip_noise_gamma > 0:  # arXiv 2301.11706
            random = self.ip_noise_gamma_random_strength
            gamma = self.ip_noise_gamma * (torch.rand(1, generator=draw) if random else 1)
            on_input = noise + gamma * torch.randn(shape, generator=draw)
        draw = rng.generator(seed, "timesteps", step)
        last = min(self.max_timestep, num_timesteps)
        timesteps = torch.randint(self.min_timestep, last, shape[:1], generator=draw)
        return DrawnNoise(target=noise, on_input=on_input, timesteps=timesteps)

    def _offset(self, latents: Tensor, draw: torch.Generator) -> Tensor | float:
        """How much of each channel's own noise is added."""
        import torch

        offset: Tensor | float = self.noise_offset
        if self.noise_offset_random_strength:
            offset = offset * torch.rand(1, generator=draw)
        if self.adaptive_noise_scale:
            means = latents.mean(dim=(2, 3), keepdim=True).abs().cpu()
            offset = (offset + self.adaptive_noise_scale * means).clamp(min=0)
        return offset

    def _with_pyramid(self, noise: Tensor, draw: torch.Generator, sizes: Random) -> Tensor:
        """Noise of ever coarser grids added, and the batch scaled to unit variance again."""
        import torch
        from torch.nn import functional

        rows, channels, *full = noise.shape
        for iteration in range(self.multires_noise_iterations):
            shrink = (sizes.random() * 2 + 2) ** iteration
            coarse = [max(1, int(side / shrink)) for side in full]
            drawn = torch.randn(rows, channels, *coarse, generator=draw)
            enlarged = functional.interpolate(drawn, size=full, mode="bilinear")
            noise = noise + enlarged * self.multires_noise_discount**iteration
            if 1 in coarse:
                break
        return noise / noise.std()
