"""A LoRA merged into its base model: W + sum of weight * delta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.adapters.differences import bias_delta
from lorasweep.adapters.kohya_names import every_norm, every_site
from lorasweep.adapters.pack import file_delta
from lorasweep.core.atomic_write import staged
from lorasweep.export import diffusers_folder, module_check, picture_check, read_back, whole_model
from lorasweep.export.attach_loras import Loras, attachable
from lorasweep.export.diffusers_folder import VARIANT
from lorasweep.export.exported import Exported, ExportError, is_file
from lorasweep.export.lora_weights import Weight, weight_at
from lorasweep.export.picture_check import Canvas
from lorasweep.lora_files import read_lora_file
from lorasweep.lora_files.read_lora_file import LoRAFile
from lorasweep.models.base_model import BaseModel, Precision
from lorasweep.models.load_model import Model

if TYPE_CHECKING:
    from PIL.Image import Image

    from lorasweep.export.whole_model import WholeModel


def merged(
    settings: Model,
    loras: Loras,
    target: Path,
    *,
    precision: Precision | None = None,
    vae: str | None = None,
    overwrite: bool = False,
    pipeline_class: str | None = None,
    fp16_variant: bool = False,
) -> Exported:
    """Write the base model with the LoRAs added, each delta times its weight, computed in fp32.

    A `target` ending in .safetensors is a single file in the original layout, any other a diffusers
    folder. Tensors keep the base's type unless a `precision` is given. Every delta is that of the
    bare weights, so the order of several LoRAs doesn't matter. `vae` is as `whole_model.read` has
    it. The picture of what was written,
    loaded by diffusers' `pipeline_class`, must be that of the attached LoRAs; raises ExportError
    otherwise, TargetError for a taken target. `fp16_variant` adds SDXL's variant to a folder.
    """
    if is_file(target) and diffusers_folder.is_sdxl(settings.path, settings.revision):
        raise ExportError(f"{target}: SDXL as a single file comes later; give a folder's name")
    with picture_check.quiet(), staged(target, overwrite) as place:
        model = whole_model.read(
            settings.path,
            settings.config,
            settings.revision,
            sdxl=True,
            told=settings.told_schedule,
            vae=vae,
        )
        base = whole_model.as_base(settings, model)
        for path, multiplier in settings.merged_weights:  # the LoRA was trained on their sum
            model = merge(base, model, [(read_lora_file.read(path, base), multiplier)])
            base = whole_model.as_base(settings, model)
        files = [(read_lora_file.read(path, base), weight) for path, weight in loras]
        adapters = attachable(base, files)
        bare, before = picture_check.draw(base), picture_check.draw(base, adapters)
        outputs = module_check.outputs_with(base, adapters)
        result = merge(base, model, files, precision)
        canvas = Canvas.of(base)
        del base, adapters, files  # a large model doesn't fit twice

        result.write(place)
        after, lines = read_back.check(
            place, result, canvas, before, bare, pipeline_class=pipeline_class, outputs=outputs
        )
        if fp16_variant:
            lines += _add_variant(place, result, pipeline_class, canvas, before)
    picture = target.with_name(f"{target.name}-check.png")
    picture_check.side_by_side(picture, bare, before, after)
    return Exported(target, (*model.notes_of(target), *lines, f"Side by side: {picture}"))


def merge(
    base: BaseModel,
    model: WholeModel,
    files: Sequence[tuple[LoRAFile, Weight]],
    precision: Precision | None = None,
) -> WholeModel:
    """The model's tensors with the sum of all weighted deltas added in fp32, rounded once.

    `base` is the same model, bare: a DoRA's delta depends on its weights.
    """
    result, known = model.cast(precision), every_site(base.parts) | every_norm(base.parts)
    weights = {part: dict(tensors) for part, tensors in result.weights.items()}
    changed = {key: known[key] for file, _ in files for key in file.sites}
    for key, site in changed.items():
        own = [(file.sites[key], weight_at(w, site)) for file, w in files if key in file.sites]
        changes = {"weight": [(file_delta(site, tensors), weight) for tensors, weight in own]}
        if biases := [(b, weight) for t, weight in own if (b := bias_delta(t)) is not None]:
            changes["bias"] = biases
        for parameter, deltas in changes.items():
            name = whole_model.parameter_name(site, parameter)
            total = model.weights[site.part][name].float()
            for delta, weight in deltas:
                total = total + weight * delta
            rounded = total.to(weights[site.part][name].dtype)
            if not bool(rounded.isfinite().all()):
                raise ExportError(
                    f"{site.key}: the merged {parameter} is too large for {rounded.dtype}; give"
                    " --dtype fp32 or bf16"
                )
            weights[site.part][name] = rounded
    return replace(result, weights=weights)


def _add_variant(
    place: Path, result: WholeModel, pipeline_class: str | None, canvas: Canvas, before: Image
) -> list[str]:
    """Write SDXL's variant fp16 into the folder, read back and drawn as the plain weights were."""
    weights = diffusers_folder.write_variant(place, result.weights)
    for part, tensors in weights.items():
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ExportError(
                    f"the {part}'s {name} is too large for the variant fp16, which generic"
                    " diffusion feature loads: it can't have this model as a folder"
                )
    rounded = replace(result, weights=weights)
    # no part of the LoRA can be missing, for the tensors are the plain ones, rounded
    _, (same_tensors, same_picture) = read_back.check(
        place, rounded, canvas, before, pipeline_class=pipeline_class, variant=VARIANT
    )
    return [f"Variant fp16: {same_tensors}", same_picture]
