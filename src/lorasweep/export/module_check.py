"""Do single modules compute the same? For models in which a picture can't tell.

A LoRA can be so strong that the model amplifies the last bit of a sum to another picture. A module
alone amplifies nothing, so what it makes of fixed inputs tells rounding from a mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from lorasweep.adapters.kohya_names import every_norm, every_site
from lorasweep.core.rng import generator
from lorasweep.core.text import shown
from lorasweep.export import picture_check
from lorasweep.export.attach_loras import Weighted, attached
from lorasweep.export.exported import ExportError
from lorasweep.export.picture_check import Agreement
from lorasweep.models.base_model import BaseModel, Precision

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from torch.nn import Module

LARGEST_ERRORS: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 2e-2}
"""Largest relative difference of a module's outputs, by the precision of the written weights."""


def require_same(
    pictures: Agreement,
    reader: str,
    after: Image,
    redraw: Callable[[], Image],
    modules: Callable[[], str],
) -> str:
    """The line for a person. Raises ExportError where the pictures, or else the modules, disagree.

    `redraw` draws `after` with `picture_check.NUDGED`: where that alone is another picture,
    `modules` decides (`require`).
    """
    if not pictures.holds:
        nudged = picture_check.compare(after, redraw(), tolerance=pictures.tolerance)
        if not nudged.holds:
            return modules()
    return picture_check.require(pictures, reader)


def outputs_with(
    base: BaseModel, adapters: Weighted, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """`outputs` of modules with the adapters, by part and dotted path.

    Without `names` they are those that the adapters change.
    """
    if names is None:
        sites = [entry.site for pack, _ in adapters for entry in pack.entries]
    else:
        known = (every_site(base.parts) | every_norm(base.parts)).values()
        sites = [site for site in known if f"{site.part}.{site.path}" in names]
    with attached(adapters):
        return outputs({f"{site.part}.{site.path}": site.module for site in sites})


def outputs(modules: Mapping[str, Module]) -> dict[str, Tensor]:
    """What each Linear, convolution or norm, hooks at work, makes of inputs that its name decides.

    Modules may be what PEFT has put in the place of one.
    """
    import torch

    found = {}
    for key, module in modules.items():
        weight = module.get_parameter("weight")
        is_image = weight.dim() == 4 or isinstance(module, torch.nn.GroupNorm)
        channels = weight.shape[1] if weight.dim() > 1 else weight.shape[0]  # of a norm
        shape = (4, channels, *([3, 3] if is_image else []))
        given = torch.randn(shape, generator=generator(0, "module_check", key))
        with torch.no_grad():
            found[key] = module(given.to(weight))
    return found


def require(before: Mapping[str, Tensor], after: Mapping[str, Tensor], precision: Precision) -> str:
    """The line for a person, where all outputs agree. Raises ExportError otherwise."""
    errors = {
        key: float(
            (after[key].double() - own.double()).norm() / own.double().norm().clamp(min=1e-30)
        )
        for key, own in before.items()
    }
    # NaN is below no bound, and first in this order
    worst = max(errors, key=lambda key: (errors[key] != errors[key], errors[key]))
    if not errors[worst] <= LARGEST_ERRORS[precision]:
        raise ExportError(
            f"{shown(worst)} computes otherwise than before: its outputs differ by"
            f" {errors[worst]:.2%}. Nothing was kept; please report this with the LoRA's type"
        )
    return (
        f"The LoRA is so strong that rounding alone changes the picture, so all {len(errors)}"
        f" modules were compared one by one: their outputs agree to {errors[worst]:.1e}."
    )
