"""The noise schedule that a base model was trained with: noise, targets and weights by timestep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import TYPE_CHECKING, Any

from lorasweep.core.settings import SettingsError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler
    from torch import Tensor

_DECIDES = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
"""Keys that a sampler must know -> the value that one without the key has."""


@dataclass(frozen=True)
class NoiseSchedule:
    """Adds noise in training, and makes the samplers that take it away again."""

    config: Mapping[str, Any]
    """What scheduler_config.json holds, as the settings change it."""

    @property
    def prediction_type(self) -> str:
        """What the model predicts: epsilon (the noise) or v_prediction."""
        return str(self.config.get("prediction_type", "epsilon"))

    @property
    def modelspec_word(self) -> str:
        """What the model predicts, as metadata of files call it."""
        return "v" if self.prediction_type == "v_prediction" else "epsilon"

    @property
    def is_zero_terminal_snr(self) -> bool:
        """Is nothing of the image left at its last timestep? (arXiv 2305.08891)"""
        return bool(self.config.get("rescale_betas_zero_snr", False))

    @cached_property
    def scheduler(self) -> DDPMScheduler:
        """diffusers' training schedule: adds noise and knows alphas_cumprod."""
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(dict(self.config))

    @property
    def num_train_timesteps(self) -> int:
        """Length of the schedule."""
        return int(self.scheduler.config.num_train_timesteps)

    def sampler(self, name: str) -> Any:
        """The diffusers scheduler of the class `name`, on this schedule.

        Raises SettingsError for one that would pass over what the model predicts or where it ends,
        and so draw noise.
        """
        import diffusers

        cls = getattr(diffusers, name)
        unknown = self.config.keys() & _DECIDES.keys() - signature(cls.__init__).parameters.keys()
        for key in sorted(unknown):
            if self.config[key] != _DECIDES[key]:
                raise SettingsError(
                    f"sampling.scheduler={name} can't draw with this base model, whose"
                    f" scheduler_config.json says {key}={self.config[key]}; give e.g. DDIMScheduler"
                    " or EulerDiscreteScheduler"
                )
        return cls.from_config(dict(self.config))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents (N, C, h, w) at timesteps (N,)."""
        noisy: Tensor = self.scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict: the noise, or v (arXiv 2202.00512)."""
        if self.prediction_type == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
            return velocity
        return noise

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal to noise of timesteps (N,), 0 where nothing of the image is left."""
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        return alphas / (1 - alphas)

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR weights (arXiv 2303.09556) of timesteps, for what the model predicts.

        Finite also where nothing of the image is left (an SNR of 0): there the noise weighs 1.
        """
        snr = self.snr(timesteps)
        if self.prediction_type == "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        return (gamma / snr).clamp(max=1)  # min(snr, gamma) / snr, which would be 0/0
