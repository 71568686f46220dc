"""The learning-rate schedule of one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from lorasweep.core.settings import Settings, SettingsError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class LRScheduler(Settings):
    """A schedule of diffusers.optimization over all steps of a run."""

    type: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    warmup: NonNegativeFloat
    num_cycles: PositiveInt
    power: PositiveFloat

    def __post_init__(self) -> None:
        unused = {"num_cycles": "cosine_with_restarts", "power": "polynomial"}
        for name, needed in unused.items():
            if getattr(self, name) != 1 and self.type != needed:
                raise SettingsError(
                    f"lr_scheduler.{name}={getattr(self, name):g} has no effect on"
                    f" {self.type}; use lr_scheduler={needed} or set it to 1"
                )
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise SettingsError(
                f"lr_scheduler.warmup={self.warmup}: give a whole number of steps, or a fraction"
                " below 1 of all steps"
            )

    def warmup_steps(self, num_steps: int) -> int:
        """Steps of warm-up in a run of `num_steps`."""
        return int(self.warmup if self.warmup >= 1 else self.warmup * num_steps)

    def create(
        self, optimizer: torch.optim.Optimizer, num_steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule, to be stepped once an optimiser step, for `num_steps` in all."""
        from diffusers.optimization import get_scheduler

        warmup = self.warmup_steps(num_steps)
        name = "constant_with_warmup" if self.type == "constant" and warmup else self.type
        scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=num_steps,
            num_cycles=self.num_cycles,
            power=self.power,
        )
        return scheduler
