"""The learning-rate schedule of one run, with kohya's names and meanings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from lorasweep.core.settings import Probability, Settings, SettingsError

if TYPE_CHECKING:
    import torch

_COSINES = ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay")
READ_BY: dict[str, tuple[object, tuple[str, ...]]] = {
    "num_cycles": (1, _COSINES),
    "power": (1, ("polynomial",)),
    "min_lr_ratio": (None, ("cosine_with_min_lr", "warmup_stable_decay", "polynomial")),
    "decay": (None, ("warmup_stable_decay",)),
    "timescale": (None, ("inverse_sqrt",)),
    "step_rules": (None, ("piecewise_constant",)),
}
"""Setting -> its value where it says nothing, and the types that read it."""
_RELATIVE = (
    "optimizer.args.relative_step=true: Adafactor finds its learning rate itself and reads none;"
    " take lr_scheduler=adafactor, which logs it, or ++optimizer.args.relative_step=false"
)
_NOT_RELATIVE = (
    "lr_scheduler=adafactor logs the rate that Adafactor finds itself: take"
    " optimizer.type=transformers.optimization.Adafactor with ++optimizer.args.relative_step=true,"
    " or another lr_scheduler"
)
_RULES = re.compile(r"([\d.e-]+:\d+,)+[\d.e-]+")


@dataclass(frozen=True, kw_only=True)
class LRScheduler(Settings):
    """A schedule over all steps of a run, of transformers.optimization or diffusers."""

    type: Literal[
        "constant",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
        "piecewise_constant",
        "adafactor",
    ]
    warmup: NonNegativeFloat
    num_cycles: PositiveInt
    power: PositiveFloat
    min_lr_ratio: Probability | None = None
    decay: NonNegativeFloat | None = None
    timescale: PositiveInt | None = None
    step_rules: str | None = None

    def __post_init__(self) -> None:
        for name, (neutral, types) in READ_BY.items():
            value = getattr(self, name)
            if value != neutral and self.type not in types:
                shown = value if isinstance(value, str) else f"{value:g}"
                raise SettingsError(
                    f"lr_scheduler.{name}={shown} has no effect on {self.type}; use"
                    f" lr_scheduler={' or '.join(types)} or set it to {neutral or 'null'}"
                )
        for name in ("warmup", "decay"):
            value = getattr(self, name) or 0
            if value >= 1 and value != int(value):
                raise SettingsError(
                    f"lr_scheduler.{name}={value}: give a whole number of steps, or a fraction"
                    " below 1 of all steps"
                )
        if self.warmup and self.type in ("piecewise_constant", "adafactor"):
            raise SettingsError(
                f"lr_scheduler.warmup={self.warmup:g} has no effect on {self.type}; set it to 0"
            )
        if self.type == "cosine_with_min_lr" and self.min_lr_ratio is None:
            raise SettingsError("lr_scheduler.min_lr_ratio is missing: give it, or take cosine")
        if self.type == "piecewise_constant" and not _RULES.fullmatch(self.step_rules or ""):
            raise SettingsError(
                f"lr_scheduler.step_rules={self.step_rules}: give FACTOR:STEP,…,FACTOR, as in"
                " 'lr_scheduler.step_rules=\"1:500,0.1:1000,0.01\"'"
            )

    @property
    def follows_the_end(self) -> str | None:
        """The setting by which the rate depends on how many steps there are in all, if any does."""
        if self.type not in ("constant", "inverse_sqrt", "piecewise_constant", "adafactor"):
            return f"lr_scheduler.type={self.type}"
        return f"lr_scheduler.warmup={self.warmup:g}" if 0 < self.warmup < 1 else None

    @property
    def warmup_as_given(self) -> int | float:
        """kohya's lr_warmup_steps: a whole number of steps, or a fraction of all."""
        return self.warmup if 0 < self.warmup < 1 else int(self.warmup)

    def warmup_steps(self, num_steps: int) -> int:
        """Steps of warm-up in a run of `num_steps`."""
        return _steps(self.warmup, num_steps)

    def create(
        self, optimizer: torch.optim.Optimizer, num_steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule, to be stepped once an optimiser step, for `num_steps` in all.

        Raises SettingsError where the optimiser or the number of steps doesn't allow it.
        """
        relative = any(group.get("relative_step") for group in optimizer.param_groups)
        if relative != (self.type == "adafactor"):
            raise SettingsError(_RELATIVE if relative else _NOT_RELATIVE)
        if relative:
            from transformers.optimization import Adafactor, AdafactorSchedule

            if not isinstance(optimizer, Adafactor):
                raise SettingsError(_NOT_RELATIVE)
            return AdafactorSchedule(optimizer)
        if self.type == "piecewise_constant":
            from diffusers.optimization import get_piecewise_constant_schedule

            scheduler: torch.optim.lr_scheduler.LRScheduler = get_piecewise_constant_schedule(
                optimizer, step_rules=self.step_rules
            )
            return scheduler
        from transformers import get_scheduler

        warmup = self.warmup_steps(num_steps)
        name = "constant_with_warmup" if self.type == "constant" and warmup else self.type
        try:
            scheduler = get_scheduler(
                name,
                optimizer,
                num_warmup_steps=warmup,
                num_training_steps=num_steps,
                scheduler_specific_kwargs=self._own_arguments(optimizer, num_steps),
            )
        except ValueError as error:  # polynomial: its end lies above its beginning
            raise SettingsError(f"lr_scheduler.type={self.type}: {error}") from None
        return scheduler

    def _own_arguments(self, optimizer: torch.optim.Optimizer, num_steps: int) -> dict[str, Any]:
        """What the type alone takes, as sd-scripts gives it."""
        ratio = self.min_lr_ratio or 0.0
        match self.type:
            case "cosine_with_restarts":
                return {"num_cycles": self.num_cycles}
            case "cosine_with_min_lr":
                return {"num_cycles": self.num_cycles / 2, "min_lr_rate": ratio}
            case "polynomial":
                end = {"lr_end": ratio * optimizer.defaults["lr"]} if ratio else {}
                return {"power": self.power, **end}
            case "inverse_sqrt":
                return {"timescale": self.timescale}
            case "warmup_stable_decay":
                warmup, decay = self.warmup_steps(num_steps), _steps(self.decay or 0, num_steps)
                if warmup + decay > num_steps:
                    raise SettingsError(
                        f"lr_scheduler.warmup and decay take {warmup} and {decay} steps, and the"
                        f" run has {num_steps}; shorten one of them"
                    )
                return {
                    "num_cycles": self.num_cycles / 2,
                    "min_lr_ratio": ratio,
                    "num_decay_steps": decay,
                }
        return {}


def _steps(value: float, num_steps: int) -> int:
    return int(value if value >= 1 else value * num_steps)
