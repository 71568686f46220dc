"""Take a LoRA with you: merged into its base model, or as generic diffusion feature loads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.adapters.pack import Pack
from lorasweep.core.atomic_write import staged
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.export import model_tensors, sdxl
from lorasweep.export import picture_check as export_check
from lorasweep.export.convert_model import is_file, load, load_base, reader, schedule, write
from lorasweep.export.generic_diffusion_feature import SD15, SDXL, Loader, paste
from lorasweep.export.original_layout import Weights, prefixed
from lorasweep.export.part_files import VARIANT
from lorasweep.export.picture_check import TEXT_TO_IMAGE, Canvas, ExportError, Weighted
from lorasweep.models.base_model import Precision
from lorasweep.models.load_model import Model

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from lorasweep.export.find_lora import Origin
    from lorasweep.export.model_tensors import WholeModel
    from lorasweep.export.sdxl import Base

OTHER_BASE = "Give the one it was trained on by model=OPTION or model.path=FOLDER"
Loras = Sequence[tuple[Path, float]]
"""LoRA files and the weight of each one's delta; 1 is as trained."""


AUTO = "AutoPipelineForText2Image"
V_NOTE = (
    "The model predicts v, which a single file can't say: tell your program (A1111: a .yaml beside"
    " it; ComfyUI: the node ModelSamplingDiscrete; kohya: --v_parameterization)"
)


@dataclass(frozen=True)
class Export:
    """What was written, and what a person is told of it."""

    path: Path
    lines: tuple[str, ...]


def export(
    origin: Origin,
    to: str,
    *,
    out: Path | None = None,
    strength: float = 1.0,
    others: Sequence[str] = (),
    rank: int | None = None,
    precision: Precision | None = None,
    overwrite: bool = False,
) -> Export:
    """Export a LoRA `to` merged, diffusers-lora or offline-lora, as the command line asks.

    Without `out` it goes to `origin.exports`. `others` are further LoRAs, FILE=WEIGHT. Raises
    ExportError for what has no effect there, and what the exports themselves raise.
    """
    target = out or origin.exports / _default_name(origin.name, to)
    if not math.isfinite(strength):
        raise ExportError(f"--strength {strength}: give a number")
    loras = [(origin.path, strength), *(_weighted(text) for text in others)]
    if rank is not None and (to == "merged" or (to == "offline-lora" and not is_file(target))):
        raise ExportError("--rank has no effect: a whole model is exact and has no rank")
    if to == "merged":
        return merged(origin.model, loras, target, precision=precision, overwrite=overwrite)
    if precision is not None and is_file(target):
        raise ExportError("--dtype has no effect on a LoRA file: it keeps the checkpoint's")
    if to == "offline-lora":
        return offline_lora(
            origin.model, loras, target, rank=rank, precision=precision, overwrite=overwrite
        )
    if not is_file(target):
        raise ExportError(f"--out {target}: a LoRA file's name ends in .safetensors")
    return _lora_file(origin.model, loras, target, rank, overwrite)


def merged(
    base: Model,
    loras: Loras,
    target: Path,
    *,
    precision: Precision | None = None,
    overwrite: bool = False,
) -> Export:
    """Write the base model with the LoRAs added: W + sum of weight * delta, computed in fp32.

    A `target` ending in .safetensors is a single file in the original layout, any other a diffusers
    folder. Tensors keep the base's type unless a `precision` is given. Every delta is that of the
    bare weights, so the order of several LoRAs doesn't matter. The picture of what was written must
    be that of the attached LoRAs; raises ExportError otherwise, TargetError for a taken target.
    """
    return _merged(base, loras, target, precision, overwrite)


def offline_lora(
    base: Model,
    loras: Loras,
    target: Path,
    *,
    rank: int | None = None,
    precision: Precision | None = None,
    overwrite: bool = False,
) -> Export:
    """Write what generic diffusion feature (arXiv 2410.03558) loads, with the lines to paste.

    A `target` ending in .safetensors is a LoRA file that diffusers loads, for `offline_lora` and
    `offline_lora_filename`; it is attached to SD1.5 or SDXL then. Any other is a whole model
    folder, for `offline_lora` alone; of SDXL it holds the variant fp16 too, which is what is
    loaded. Raises as `merged` and `diffusers_lora` do.
    """
    loader = SDXL if model_tensors.is_sdxl(base.path, base.revision) else SD15
    if is_file(target):
        return _offline_file(base, loras, target, rank, overwrite, loader)
    export = _merged(base, loras, target, precision, overwrite, loader)
    arguments = f"offline_lora={str(target.absolute())!r}"
    return replace(export, lines=(*export.lines, *paste(arguments, loader)))


def merge(
    base: Base, model: WholeModel, adapters: Weighted, precision: Precision | None = None
) -> WholeModel:
    """The model's tensors with the sum of all weighted deltas added in fp32, rounded once.

    `base` is the same model, loaded and bare: a DoRA's delta depends on its weights.
    """
    result = model.cast(precision)
    weights = {part: dict(tensors) for part, tensors in result.weights.items()}
    for site, members in export_check.stacks_by_site(adapters):
        path = prefixed(site.path) if site.part == "text_encoder" else site.path
        name = f"{path}.weight"
        total = model.weights[site.part][name].float()
        for stack, weight in members:
            total = total + weight * stack.delta_weight(0).float()
        weights[site.part][name] = _finite(total.to(weights[site.part][name].dtype), site.key)
    return replace(result, weights=weights)


def attachable(base: Base, loras: Loras) -> Weighted:
    """The LoRA files as packs of one on this base. Raises CheckpointError for a misfit."""
    found = []
    for path, weight in loras:
        tensors = sdxl.read_lora(path, base).tensors
        try:
            found.append((Pack.from_files(base.parts, [tensors]), weight))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}; is it of another base? {OTHER_BASE}") from None
    return found


def _merged(
    settings: Model,
    loras: Loras,
    target: Path,
    precision: Precision | None,
    overwrite: bool,
    feature: Loader | None = None,
) -> Export:
    """`feature`: how generic diffusion feature will load it, which is then what reads it back."""
    if is_file(target) and model_tensors.is_sdxl(settings.path, settings.revision):
        raise ExportError(f"{target}: SDXL as a single file comes later; give a folder's name")
    with export_check.quiet(), staged(target, overwrite) as place:
        model = model_tensors.read(settings.path, settings.config, settings.revision, sdxl=True)
        base = load(settings, model)
        adapters = attachable(base, loras)
        bare, before = export_check.draw(base), export_check.draw(base, adapters)
        whole = merge(base, model, adapters, precision)
        canvas, noise = export_check.Canvas.of(base), schedule(base, place)
        notes = [*model.notes, *_note(base, place)]
        del base, adapters  # a large model doesn't fit twice
        plain = AUTO if model.layout.is_sdxl else TEXT_TO_IMAGE
        kind = feature.pipeline if feature else plain
        written, read_back = write(whole, place, settings.prediction_type, kind)
        after = export_check.draw_with(written, canvas, scheduler_config=noise)
        tolerance = canvas.tolerance(model_tensors.precision_of(whole))
        agreement = export_check.compare(before, after, bare, tolerance)
        lines = [read_back, export_check.require(agreement, reader(place, kind))]
        if feature and model.layout.is_sdxl:
            lines += _variant(whole, place, kind, canvas, before)
    picture = target.with_name(f"{target.name}-check.png")
    export_check.side_by_side(picture, bare, before, after)
    return Export(target, (*notes, *lines, f"Side by side: {picture}"))


def _note(base: Base, place: Path) -> list[str]:
    return [V_NOTE] if is_file(place) and base.prediction_type == "v_prediction" else []


def _variant(whole: WholeModel, place: Path, kind: str, canvas: Canvas, before: Image) -> list[str]:
    """Write SDXL's variant fp16 into the folder, read back and drawn as the plain weights were."""
    weights = model_tensors.write_variant(whole, place).weights
    _require_finite(weights)
    written = export_check.load_folder(place, kind, VARIANT)
    read_back = export_check.require_weights(written, weights)
    after = export_check.draw_with(written, canvas)
    # no part of the LoRA can be missing, for the tensors are the plain ones, rounded
    agreement = export_check.compare(before, after, tolerance=canvas.tolerance(VARIANT))
    line = export_check.require(agreement, reader(place, kind, VARIANT))
    return [f"Variant fp16: {read_back}", line]


def _offline_file(
    base: Model,
    loras: Loras,
    target: Path,
    rank: int | None,
    overwrite: bool,
    loader: Loader,
) -> Export:
    written = _lora_file(base, loras, target, rank, overwrite)
    folder, name = str(target.absolute().parent), target.name
    arguments = f"offline_lora={folder!r}, offline_lora_filename={name!r}"
    note = (
        f"With a file, generic diffusion feature takes {loader.base} as the base; this LoRA's is"
        f" {base.path}. A whole model folder (--out without .safetensors) holds its own base."
    )
    notes = () if base.path == loader.base else (note,)
    return Export(target, (*written.lines, *notes, *paste(arguments, loader)))


def _lora_file(
    base: Model, loras: Loras, target: Path, rank: int | None, overwrite: bool
) -> Export:
    from lorasweep.export.diffusers_lora import diffusers_lora

    (source, strength), *others = loras
    if others or strength != 1:
        raise ExportError(
            "a LoRA file holds one LoRA, as trained: --strength and --with need a whole model"
            " (--to merged, or --to offline-lora with --out FOLDER)"
        )
    with export_check.quiet():
        written = diffusers_lora(source, target, load_base(base), rank, overwrite=overwrite)
    return Export(target, tuple(written.lines))


def _default_name(name: str, to: str) -> str:
    return f"{name}-diffusers.safetensors" if to == "diffusers-lora" else f"{name}-{to}"


def _weighted(text: str) -> tuple[Path, float]:
    """FILE=WEIGHT of the command line."""
    file, _, weight = text.rpartition("=")
    try:
        if not math.isfinite(float(weight)):
            raise ValueError
        return Path(file), float(weight)
    except ValueError:
        raise ExportError(f"--with {text}: give FILE=WEIGHT, e.g. other.safetensors=0.5") from None


def _require_finite(weights: Weights) -> None:
    for part, tensors in weights.items():
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ExportError(
                    f"the {part}'s {name} is too large for the variant fp16, which generic"
                    " diffusion feature loads: it can't have this model as a folder"
                )


def _finite(weight: Tensor, key: str) -> Tensor:
    if not bool(weight.isfinite().all()):
        raise ExportError(
            f"{key}: the merged weight is too large for {weight.dtype}; give --dtype fp32 or bf16"
        )
    return weight
