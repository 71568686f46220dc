"""The diffusion loss of single samples: what training lowers and the held-out loss measures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasweep.models.base_model import BaseModel
from lorasweep.models.conditioning import Conditioning

if TYPE_CHECKING:
    from torch import Tensor


def squared_errors(
    base: BaseModel,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
) -> Tensor:
    """Losses (N,) in fp32 of the base's predictions for noised latents.

    Noise prediction as in DDPM (arXiv 2006.11239) or v-prediction (arXiv 2202.00512), averaged over
    channels and pixels, not weighted. Latents and noise are (N, C, h, w), timesteps (N,), rows of
    conditioning N; call it within `base.autocast()`.
    """
    schedule = base.noise_schedule
    noisy_latents = schedule.add_noise(latents, noise, timesteps)
    prediction = base.predict(noisy_latents, timesteps, conditioning).float()
    target = schedule.training_target(latents, noise, timesteps)
    return (prediction - target).square().mean(dim=(1, 2, 3))
