"""Do pictures agree before and after an export? So that a silent mismatch can't leave the house.

Before: our adapters attached to the base model. After: what was written, loaded by the library that
will use it. Both are drawn by diffusers' own pipeline from the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.export.attach_loras import Weighted, attached
from lorasweep.export.exported import ExportError
from lorasweep.judging import contact_sheet
from lorasweep.models.base_model import Precision
from lorasweep.models.load_model import hide_progress_bars
from lorasweep.models.model_files import quiet_libraries
from lorasweep.models.sdxl import Base, SDXLModel

if TYPE_CHECKING:
    from PIL import Image

PROMPT = "a picture of a fox, high contrast"
SEED = 7
NUM_STEPS = 8  # enough that an error shows: it grows from step to step
GUIDANCE = 4.0
NUDGED = GUIDANCE * (1 + 1e-6)
"""No picture changes with it, but one that the model's rounding decides."""
MAX_SIDE = 256  # pixels; SD1.5 draws it in seconds where 512 take a minute on a CPU


@dataclass(frozen=True)
class Tolerance:
    """How far two pictures may differ and still agree, in levels of 0..255."""

    mean: float
    largest: int


EXACT = Tolerance(mean=0.1, largest=3)
"""The same sums in another order: some pixels are rounded to the neighbouring level."""
TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": EXACT,
    "fp16": Tolerance(mean=1.0, largest=48),
    "bf16": Tolerance(mean=6.0, largest=255),
}
"""By the precision of the written weights, of which 11 and 8 bits are left.

Ten times and twice the mean measured on the embedded model with LoRAs that change the picture by 19
to 80 (0.14; 2.8). In bf16 an edge moves, so that single pixels say nothing.
"""

ROUNDED_SDXL = Tolerance(mean=12.0, largest=255)
"""SDXL's in fp16 or bf16, beside the tensors' own comparison, bit by bit.

On an SDXL of random weights fp16 changes a noise prediction by 0.0008 of its norm whatever the
LoRA, and eight steps make 4 to 9 levels of that; how it is with real weights wasn't measured.
"""


@dataclass(frozen=True)
class Agreement:
    """How two pictures compare, in levels of 0..255."""

    mean: float
    largest: int
    effect: float | None
    """Mean change that the adapters make to the bare model's picture; None: there are none."""
    tolerance: Tolerance

    @property
    def holds(self) -> bool:
        """Within the tolerance, and well below the adapters' own effect unless exact."""
        if self.mean > self.tolerance.mean or self.largest > self.tolerance.largest:
            return False
        return self.effect is None or self.mean <= max(EXACT.mean, self.effect / 4)

    def line(self, reader: str) -> str:
        """What a person is told; `reader` names the library and call that read the result."""
        verdict = "agree" if self.holds else "DISAGREE"
        allowed = f"allowed are {self.tolerance.mean:g} and {self.tolerance.largest}"
        return (
            f"The pictures before and after {verdict}: drawn by {reader}, {self._distance};"
            f" {allowed}.{_effect(self.effect)}"
        )

    def approximate_line(self, reader: str) -> str:
        """What a person is told of a result that is no copy; drawn by `reader`."""
        is_close = self.effect is None or self.mean <= self.effect / 4
        return (
            f"The pictures before and after are {'close' if is_close else 'NOT CLOSE'}: drawn by"
            f" {reader}, {self._distance}.{_effect(self.effect)}"
            f"{'' if is_close else ' A larger --rank keeps more.'}"
        )

    @property
    def _distance(self) -> str:
        return f"pixels differ by {self.mean:.3f} of 255 on average, {self.largest} at most"


@dataclass(frozen=True)
class Canvas:
    """What a picture of a base needs besides its modules, so that they can leave memory."""

    side: int
    """Pixels."""
    clip_skip: int
    scheduler_config: Mapping[str, Any]
    """The base's noise schedule."""
    sdxl_zeros: bool | None
    """SDXL's force_zeros_for_empty_prompt; None: it is Stable Diffusion 1.x."""

    @classmethod
    def of(cls, base: Base) -> Canvas:
        """For a model's own size, or less where that is large."""
        step = base.size_multiple
        zeros = None
        if isinstance(base, SDXLModel):
            zeros = bool(base.pipeline.config.force_zeros_for_empty_prompt)
        side = max(step, min(base.native_side, MAX_SIDE) // step * step)
        return cls(side, base.settings.clip_skip, dict(base.noise_schedule.config), zeros)

    def tolerance(self, precision: Precision) -> Tolerance:
        """How far a picture may be off that is drawn with weights rounded to a precision."""
        is_rounded_sdxl = self.sdxl_zeros is not None and precision != "fp32"
        return ROUNDED_SDXL if is_rounded_sdxl else TOLERANCES[precision]

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        """diffusers' text-to-image pipeline of these parts."""
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        if self.sdxl_zeros is None:
            return StableDiffusionPipeline(**parts, requires_safety_checker=False)
        return StableDiffusionXLPipeline(
            **parts, force_zeros_for_empty_prompt=self.sdxl_zeros, add_watermarker=False
        )


def draw(base: Base, adapters: Weighted = (), guidance: float = GUIDANCE) -> Image.Image:
    """The picture of our own adapters, at their weights, on the base; of the bare base without."""
    with attached(adapters):
        return draw_with(pipeline_of(base), Canvas.of(base), guidance=guidance)


def draw_with(
    pipeline: Any,
    canvas: Canvas,
    scheduler_config: Mapping[str, Any] | None = None,
    guidance: float = GUIDANCE,
) -> Image.Image:
    """The same picture from the parts of any pipeline of diffusers, however it was loaded.

    The noise schedule is the pipeline's own, or `scheduler_config` for a single file, which holds
    no whole one. Sampled by DDIM (arXiv 2010.02502), which adds no noise of its own.
    """
    import torch
    from diffusers import DDIMScheduler

    config = dict(scheduler_config or pipeline.scheduler.config)
    parts = {**pipeline.components, "scheduler": DDIMScheduler.from_config(config)}
    with quiet():
        pipeline = canvas.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    side, skip = canvas.side, canvas.clip_skip
    drawn = pipeline(
        PROMPT,
        width=side,
        height=side,
        num_inference_steps=NUM_STEPS,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(SEED),
        clip_skip=skip - 1 if skip > 1 else None,  # diffusers counts the layers left out
        output_type="np",
    )
    return _image(drawn.images[0])


def compare(
    before: Image.Image,
    after: Image.Image,
    bare: Image.Image | None = None,
    tolerance: Tolerance = EXACT,
) -> Agreement:
    """Compare the picture before an export with that of what was written.

    `bare` is the base model's without adapters, where there are any.
    """
    difference = _levels(before, after)
    return Agreement(
        mean=float(difference.mean()),
        largest=int(difference.max()),
        effect=None if bare is None else float(_levels(before, bare).mean()),
        tolerance=tolerance,
    )


def require(agreement: Agreement, reader: str) -> str:
    """The line for a person. Raises ExportError when the pictures disagree."""
    line = agreement.line(reader)
    if not agreement.holds:
        raise ExportError(f"{line} Nothing was kept; please report this with the LoRA's type")
    return line


def side_by_side(path: Path, bare: Image.Image, before: Image.Image, after: Image.Image) -> None:
    """Write the three pictures beside each other, for a person to look at."""
    columns = ["base model", "LoRA attached", "as exported"]
    contact_sheet.contact_sheet([(PROMPT[:24], [bare, before, after])], columns).save(path)


@contextmanager
def quiet() -> Iterator[None]:
    """Without bars, and without the libraries' notes on what we do on purpose."""
    hide_progress_bars()
    with quiet_libraries():
        yield


def pipeline_of(base: Base) -> Any:
    """diffusers' own pipeline over the base's modules, not copies of them."""
    if not isinstance(base, SDXLModel):
        return base.pipeline()
    parts = {**base.pipeline.components, "scheduler": base.noise_schedule.scheduler}
    return Canvas.of(base).pipeline(parts)


def _image(pixels: Any) -> Image.Image:
    """A picture of pixels (H, W, 3) in 0..1. Raises ExportError for NaN, which would be black."""
    import numpy as np
    from PIL import Image

    if not np.isfinite(pixels).all():
        raise ExportError("the model draws values that are not finite; try it in fp32")
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _levels(one: Image.Image, other: Image.Image) -> Any:
    import numpy as np

    return np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16))


def _effect(effect: float | None) -> str:
    if effect is None:
        return ""
    too_little = "" if effect > EXACT.mean else ", too little for a picture to tell"
    return f" The LoRA itself changes this picture by {effect:.2f}{too_little}."
