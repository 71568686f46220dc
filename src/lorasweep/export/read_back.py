"""What was written, loaded by diffusers as its user loads it: every tensor must be there again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.export.exported import ExportError, is_file
from lorasweep.export.single_file_names import Weights, prefixed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasweep.models.sdxl import Base

TEXT_TO_IMAGE = "StableDiffusionPipeline"


def load(
    place: Path, configs: Path, pipeline_class: str = TEXT_TO_IMAGE, variant: str | None = None
) -> Any:
    """diffusers' pipeline of a written folder or file, as one loads it who asks for no type: fp32.

    A file is loaded with the configs of a diffusers folder. Be `quiet` (picture_check).
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


def require_weights(pipeline: Any, weights: Weights) -> str:
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


def schedule(base: Base, place: Path) -> Mapping[str, Any] | None:
    """The noise schedule to draw with: a file has none, and its user gives it."""
    return base.scheduler_config if is_file(place) else None


def call(place: Path, pipeline_class: str = TEXT_TO_IMAGE, variant: str | None = None) -> str:
    """What loaded it, in words."""
    name = "from_single_file" if is_file(place) else "from_pretrained"
    with_variant = f" with variant={variant!r}" if variant else ""
    return f"diffusers' {pipeline_class}.{name}{with_variant}"
