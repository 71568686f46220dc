"""How a run's predictions are judged in training: kohya's losses and weights, by kohya's names.

What each does was read from sd-scripts' library/train_util.py (conditional_loss,
get_huber_threshold_if_needed) and library/custom_train_functions.py of February 2026.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, PositiveFloat

from lorasweep.core.settings import Settings, SettingsError
from lorasweep.models.noise_schedule import NoiseSchedule

if TYPE_CHECKING:
    from torch import Tensor

HUBER = ("huber", "smooth_l1")
_MAX_SNR = 1000.0
"""Larger ones, near timestep 0, count as this."""


@dataclass(frozen=True, kw_only=True)
class TrainingLoss(Settings):
    """Which loss a run lowers, and what a timestep's weighs."""

    loss_type: Literal["l1", "l2", "huber", "smooth_l1"] = "l2"  # later than runs of old versions
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    huber_c: PositiveFloat = 0.1
    huber_scale: PositiveFloat = 1.0
    min_snr_gamma: PositiveFloat | None
    debiased_estimation_loss: bool = False
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: NonNegativeFloat = 0.0

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """Raise SettingsError for what has no meaning for a model of this noise schedule."""
        is_v = schedule.prediction_type == "v_prediction"
        if self.scale_v_pred_loss_like_noise_pred and not is_v:
            raise SettingsError(
                "trainer.scale_v_pred_loss_like_noise_pred is for models of v_prediction, and this"
                " one predicts the noise; set it to false"
            )
        if self.v_pred_like_loss and is_v:
            raise SettingsError(
                "trainer.v_pred_like_loss is for models that predict the noise, and this one is of"
                " v_prediction; set it to 0"
            )
        divides = self.debiased_estimation_loss or self.v_pred_like_loss
        if divides and not is_v and schedule.is_zero_terminal_snr:
            name = (
                "debiased_estimation_loss" if self.debiased_estimation_loss else "v_pred_like_loss"
            )
            raise SettingsError(
                f"trainer.{name} divides by the signal at a timestep, of which this noise schedule"
                " leaves none at the last; set trainer.max_timestep=999, or leave it off"
            )

    def errors(
        self, prediction: Tensor, target: Tensor, timesteps: Tensor, schedule: NoiseSchedule
    ) -> Tensor:
        """The loss of each value (rows, C, h, w) of predictions at timesteps (rows,)."""
        difference = prediction - target
        if self.loss_type == "l2":
            return difference.square()
        if self.loss_type == "l1":
            return difference.abs()
        c = self._huber_c(timesteps, schedule).view(-1, 1, 1, 1)
        smooth = 2 * ((difference.square() + c.square()).sqrt() - c)
        return c * smooth if self.loss_type == "huber" else smooth

    def weighted(self, losses: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Losses (rows,) at timesteps (rows,), each times its timestep's weight."""
        if self.min_snr_gamma is not None:
            losses = losses * schedule.min_snr_weight(timesteps, self.min_snr_gamma)
        if self.scale_v_pred_loss_like_noise_pred:
            snr = schedule.snr(timesteps).clamp(max=_MAX_SNR)
            losses = losses * (snr / (snr + 1))
        if self.v_pred_like_loss:
            snr = schedule.snr(timesteps).clamp(max=_MAX_SNR)
            losses = losses * (1 + self.v_pred_like_loss * (snr + 1) / snr)
        if self.debiased_estimation_loss:  # arXiv 2310.08442
            snr = schedule.snr(timesteps).clamp(max=_MAX_SNR)
            is_v = schedule.prediction_type == "v_prediction"
            losses = losses / (snr + 1 if is_v else snr.sqrt())
        return losses

    def _huber_c(self, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
        """By timestep (rows,), from which difference on the loss grows in proportion to it."""
        import torch

        if self.huber_schedule == "constant":
            return torch.full(timesteps.shape, self.huber_c * self.huber_scale).to(timesteps.device)
        if self.huber_schedule == "exponential":
            decay = -math.log(self.huber_c) / schedule.num_train_timesteps
            return torch.exp(-decay * timesteps) * self.huber_scale
        sigmas = schedule.snr(timesteps).rsqrt()  # kohya scales this one by nothing
        return (1 - self.huber_c) / (1 + sigmas).square() + self.huber_c
