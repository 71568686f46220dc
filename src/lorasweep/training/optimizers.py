"""The optimiser of one run: its class, its learning rates by part and block, clipping."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeFloat, PositiveFloat

from lorasweep.adapters.adapter import Site
from lorasweep.adapters.kohya_names import TEXT_ENCODERS
from lorasweep.adapters.unet_blocks import WAYS, BlockWeights, block_of, joined
from lorasweep.core.settings import Settings, SettingsError
from lorasweep.core.text import shown

if TYPE_CHECKING:
    import torch

KNOWN_PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "lion_pytorch": "lion-pytorch",
    "prodigyopt": "prodigyopt",
    "prodigyplus": "prodigy-plus-schedule-free",
    "dadaptation": "dadaptation",
    "schedulefree": "schedulefree",
    "pytorch_optimizer": "pytorch-optimizer",
}
"""The packages of conf/optimizer beside torch, and what pip calls them."""

KOHYAS_NAMES = {
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "PagedAdamW": "bitsandbytes.optim.PagedAdamW",
    "PagedAdamW8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "PagedAdamW32bit": "bitsandbytes.optim.PagedAdamW32bit",
    "Lion": "lion_pytorch.Lion",
    "Lion8bit": "bitsandbytes.optim.Lion8bit",
    "PagedLion8bit": "bitsandbytes.optim.PagedLion8bit",
    "Prodigy": "prodigyopt.Prodigy",
    "DAdaptAdam": "dadaptation.DAdaptAdam",
    "DAdaptAdaGrad": "dadaptation.DAdaptAdaGrad",
    "DAdaptAdan": "dadaptation.DAdaptAdan",
    "DAdaptLion": "dadaptation.DAdaptLion",
    "DAdaptSGD": "dadaptation.DAdaptSGD",
    "AdamWScheduleFree": "schedulefree.AdamWScheduleFree",
    "RAdamScheduleFree": "schedulefree.RAdamScheduleFree",
    "SGDScheduleFree": "schedulefree.SGDScheduleFree",
}
"""sd-scripts' names (library/train_util.py, get_optimizer) of classes of other packages.

Without those that torch.optim has too: Adafactor is torch's here, and that of transformers there.
"""


@dataclass(frozen=True, kw_only=True)
class Optimizer(Settings):
    """Which optimiser, its learning rates by part, and clipping."""

    type: str
    unet_lr: NonNegativeFloat
    text_encoder_lr: NonNegativeFloat | tuple[NonNegativeFloat, NonNegativeFloat]
    """One rate, or one for each of SDXL's text encoders."""
    block_lr_weights: BlockWeights | None
    loraplus_lr_ratio: PositiveFloat | None = None  # later than runs of older versions
    loraplus_unet_lr_ratio: PositiveFloat | None = None
    loraplus_text_encoder_lr_ratio: PositiveFloat | None = None
    max_grad_norm: NonNegativeFloat
    args: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.trained_parts:
            raise SettingsError(
                "optimizer.unet_lr and optimizer.text_encoder_lr are both 0, so nothing would be"
                " trained; give one of them, e.g. optimizer.unet_lr=1e-4"
            )
        if self.block_lr_weights is not None and self.unet_lr == 0:
            raise SettingsError(
                "optimizer.block_lr_weights multiply optimizer.unet_lr, which is 0; set it or leave"
                " them out"
            )

    @property
    def dotted_type(self) -> str:
        """`type` as a dotted path, but for a class of torch.optim."""
        return KOHYAS_NAMES.get(self.type, self.type)

    @property
    def part_rates(self) -> dict[str, float]:
        """The learning rate of every part that there may be, the text encoders' first."""
        given = self.text_encoder_lr
        rates = given if isinstance(given, tuple) else (given, given)
        return {**dict(zip(TEXT_ENCODERS, rates, strict=True)), "unet": self.unet_lr}

    @property
    def trained_parts(self) -> frozenset[str]:
        """unet and text encoders, where their learning rate is not zero."""
        return frozenset(part for part, rate in self.part_rates.items() if rate > 0)

    @property
    def main_rate(self) -> float:
        """The UNet's learning rate, or where that is 0 the first text encoder's that isn't."""
        return self.unet_lr or next(rate for rate in self.part_rates.values() if rate > 0)

    def trains(self, site: Site) -> bool:
        """Is the site's block trained? Not where its weight is 0."""
        block, weights = block_of(site), self.block_lr_weights
        return weights is None or block is None or weights.at(block) > 0

    @property
    def plus_ratios(self) -> dict[str, float]:
        """LoRA+ by part: how much faster a LoRA's second factors learn, where they do."""
        both = self.loraplus_lr_ratio
        of_text = self.loraplus_text_encoder_lr_ratio or both
        ratios = dict.fromkeys(TEXT_ENCODERS, of_text) | {
            "unet": self.loraplus_unet_lr_ratio or both
        }
        return {part: ratio for part, ratio in ratios.items() if ratio is not None}

    def group_of(self, site: Site, is_up: bool) -> str:
        """The group of a site's parameters: its part, or unet_x0.5 where a weight multiplies.

        That of the second factors of a LoRA is text_encoder_plus or unet_plus_x0.5 with LoRA+.
        """
        block = block_of(site)
        name = f"{site.part}_plus" if is_up and site.part in self.plus_ratios else site.part
        if self.block_lr_weights is None or block is None:
            return name
        return _weighted(name, self.block_lr_weights.at(block))

    def network_args(self, *, is_sdxl: bool = False) -> dict[str, str]:
        """kohya's network_args of LoRA+ and of the weights by block."""
        ratios = {
            name: getattr(self, name)
            for name in (
                "loraplus_lr_ratio",
                "loraplus_unet_lr_ratio",
                "loraplus_text_encoder_lr_ratio",
            )
        }
        plus = {name: str(ratio) for name, ratio in ratios.items() if ratio is not None}
        weights = self.block_lr_weights
        if weights is None:
            return plus
        by_way = {f"{way}_lr_weight": joined(weights.of_way(way, is_sdxl=is_sdxl)) for way in WAYS}
        return {**plus, **by_way}

    def check(self) -> torch.optim.Optimizer:
        """One that has made a step; SettingsError if it refuses, before anything else is done."""
        import torch

        groups = [name for name, rate in self._rates().items() if rate > 0]
        parameters = {group: [torch.nn.Parameter(torch.zeros(1))] for group in groups}
        optimizer = self.create(parameters)
        for (parameter,) in parameters.values():
            parameter.grad = torch.zeros(1)
        try:
            optimizer.step()
        except _REFUSALS as error:  # some check their settings only here
            raise SettingsError(f"optimizer.type={self.type} refuses to step: {error}") from None
        return optimizer

    def create(
        self, parameters: Mapping[str, Sequence[torch.nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """The optimiser with a group for each name of `group_of`, the text encoders' first.

        That is kohya's order. A schedule-free one is ready to train; `evaluated` gives its weights.
        Raises SettingsError if the class is not installed or refuses its arguments.
        """
        groups = [
            {"params": list(parameters[name]), "lr": rate, "name": name}
            for name, rate in self._rates().items()
            if parameters.get(name)
        ]
        cls = self._class()
        try:
            created: torch.optim.Optimizer = cls(groups, **self.args)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"optimizer.args: {self.type} refuses them: {error}") from None
        if self.block_lr_weights is not None and created.param_groups[0].get("relative_step"):
            raise SettingsError(
                "optimizer.block_lr_weights have no effect: with relative_step the optimizer finds"
                " its rates itself; set relative_step=false or leave the weights out"
            )
        # sd-scripts too gives the class its learning rate: polynomial ends at 1e-7 by it
        created.defaults["lr"] = self.main_rate
        if is_schedule_free(created):
            created.train()  # type: ignore[attr-defined]
        return created

    def _rates(self) -> dict[str, float]:
        """The learning rate of every group there may be, a part's second factors after the rest."""
        weights = self.block_lr_weights.given if self.block_lr_weights is not None else set()
        rates: dict[str, float] = {}
        for part, rate in self.part_rates.items():
            ratio = self.plus_ratios.get(part)
            for name, own in ((part, rate), (f"{part}_plus", rate * (ratio or 0))):
                rates[name] = own
                if part == "unet":
                    rates |= {_weighted(name, one): own * one for one in sorted(weights)}
        return rates

    def _class(self) -> Any:
        module_name, _, name = self.dotted_type.rpartition(".")
        try:
            found = getattr(importlib.import_module(module_name or "torch.optim"), name)
        except ImportError:
            package = module_name.partition(".")[0]
            # a name that a stranger's config made up is no package to install
            known = KNOWN_PACKAGES.get(package)
            remedy = f"pip install {known}" if known else "install what has it"
            raise SettingsError(
                f"optimizer.type={shown(self.type)}: {shown(package)} is not installed; {remedy},"
                " or take optimizer=adamw"
            ) from None
        except AttributeError:
            found = None
        from torch.optim import Optimizer as TorchOptimizer

        if not (isinstance(found, type) and issubclass(found, TorchOptimizer)):
            raise SettingsError(
                f"optimizer.type={self.type}: {module_name or 'torch.optim'} has no class"
                f" {name}; upper and lower case count, as in optimizer.type=AdamW"
            )
        closure = inspect.signature(found.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise SettingsError(
                f"optimizer.type={self.type}: it computes the loss several times a step (wants a"
                " closure), which is not done here; take another, such as optimizer=adamw"
            )
        return found


_REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError)
"""What optimisers raise in a step for settings that they don't take, or for want of a closure."""


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Does it train other weights than it is to be used with? (arXiv 2405.15682, schedulefree)"""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


@contextmanager
def evaluated(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within, a schedule-free optimiser's parameters are those to be used; others stay as is."""
    if not is_schedule_free(optimizer):
        yield
        return
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]


def _weighted(name: str, weight: float) -> str:
    return name if weight == 1 else f"{name}_x{weight}"
