"""What the base predicts for noised latents, and how far off it is: the held-out loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasweep.models.base_model import BaseModel
from lorasweep.models.conditioning import Conditioning

if TYPE_CHECKING:
    from torch import Tensor


def prediction_and_target(
    base: BaseModel,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    noise_on_input: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the base predicts for noised latents, and what it should: (N, C, h, w) in fp32.

    That is the noise as in DDPM (arXiv 2006.11239), or v (arXiv 2202.00512). Latents and noise are
    (N, C, h, w), timesteps (N,), rows of conditioning N; `noise_on_input` noises the latents in
    place of the noise that is to be found. Call it within `base.autocast()`.
    """
    schedule = base.noise_schedule
    added = noise if noise_on_input is None else noise_on_input
    noisy_latents = schedule.add_noise(latents, added, timesteps)
    prediction = base.predict(noisy_latents, timesteps, conditioning).float()
    return prediction, schedule.training_target(latents, noise, timesteps)


def squared_errors(
    base: BaseModel,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    masks: Tensor | None = None,
) -> Tensor:
    """Losses (N,) of the predictions, averaged over channels and pixels, not weighted.

    Masks (N, 1, h, w) weigh the errors before the mean, as with kohya: a masked image has a smaller
    loss.
    """
    prediction, target = prediction_and_target(base, latents, noise, timesteps, conditioning)
    errors = (prediction - target).square()
    return (errors if masks is None else errors * masks).mean(dim=(1, 2, 3))
