"""What was written, loaded by diffusers as its user loads it: the tensors and the picture again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.export import module_check, picture_check
from lorasweep.export.exported import ExportError, is_file
from lorasweep.export.picture_check import Canvas, Tolerance
from lorasweep.export.single_file_names import Weights, prefixed
from lorasweep.export.whole_model import WholeModel
from lorasweep.models import file_schedule

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from torch.nn import Module


def check(
    place: Path,
    model: WholeModel,
    canvas: Canvas,
    before: Image,
    bare: Image | None = None,
    *,
    tolerance: Tolerance | None = None,
    pipeline_class: str | None = None,
    variant: str | None = None,
    outputs: Mapping[str, Tensor] | None = None,
) -> tuple[Image, list[str]]:
    """The picture that diffusers draws of `model` as it was written, and the lines for a person.

    Raises ExportError unless it reads every tensor bit by bit and draws `before`, as
    `picture_check.compare` has it; without a `tolerance`, within that of the tensors' precision.
    `outputs` are those of the changed modules (module_check), by part and path, for where the
    picture can't tell. Be `quiet` (picture_check).
    """
    usual = "AutoPipelineForText2Image" if model.layout.is_sdxl else "StableDiffusionPipeline"
    name = pipeline_class or usual
    pipeline = load(place, model.configs, name, variant)
    same_tensors = _require_weights(pipeline, model.weights)
    schedule = _said_schedule(place, canvas) if is_file(place) else None
    draw = partial(picture_check.draw_with, pipeline, canvas, scheduler_config=schedule)
    after = draw()
    allowed = tolerance or canvas.tolerance(model.precision)
    agreement = picture_check.compare(before, after, bare, allowed)
    call = "from_single_file" if is_file(place) else "from_pretrained"
    with_variant = f" with variant={variant!r}" if variant else ""
    reader = f"diffusers' {name}.{call}{with_variant}"
    if outputs is None:
        return after, [same_tensors, picture_check.require(agreement, reader)]

    def modules() -> str:
        theirs = module_check.outputs({name: _module(pipeline, name) for name in outputs})
        return module_check.require(outputs, theirs, model.precision)

    redraw = partial(draw, guidance=picture_check.NUDGED)
    return after, [
        same_tensors,
        module_check.require_same(agreement, reader, after, redraw, modules),
    ]


def load(place: Path, configs: Path, pipeline_class: str, variant: str | None = None) -> Any:
    """diffusers' pipeline of a written folder or file, as one loads it who asks for no type: fp32.

    A file is loaded with the configs of a diffusers folder.
    """
    import diffusers
    import torch

    if not is_file(place):
        asked = {"variant": variant} if variant else {}
        return getattr(diffusers, pipeline_class).from_pretrained(
            place, use_safetensors=True, local_files_only=True, **asked
        )
    return diffusers.StableDiffusionPipeline.from_single_file(
        str(place),
        config=str(configs),
        local_files_only=True,
        safety_checker=None,
        feature_extractor=None,
        torch_dtype=torch.float32,
    )


def _said_schedule(place: Path, canvas: Canvas) -> dict[str, Any]:
    """The schedule of those who know no more of a file than it says, but the model's betas."""
    plain = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    return {**canvas.scheduler_config, **plain, **file_schedule.of_file(place)}


def _module(pipeline: Any, name: str) -> Module:
    """A module of a pipeline by its part and dotted path, text_model. left out."""
    part, _, path = name.partition(".")
    root = getattr(pipeline, part)
    if part == "text_encoder":
        root = getattr(root, "text_model", root)
    module: Module = root.get_submodule(path)
    return module


def _require_weights(pipeline: Any, weights: Weights) -> str:
    """The line for a person. Raises ExportError unless the pipeline holds just these tensors.

    Pictures can't see everything: the VAE's encoder draws none of them.
    """
    import torch

    for part, expected in weights.items():
        found = getattr(pipeline, part).state_dict()
        named = {prefixed(n): t for n, t in found.items()} if part == "text_encoder" else found
        for name, tensor in expected.items():
            if not torch.equal(named[name], tensor.to(named[name])):
                raise ExportError(
                    f"diffusers reads the {part}'s {name} otherwise than it was written. Nothing"
                    " was kept; please report this"
                )
    return f"diffusers read back all {sum(map(len, weights.values()))} tensors, bit by bit."
