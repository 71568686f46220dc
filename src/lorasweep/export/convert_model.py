"""Between a diffusers folder and a single file in the original Stable Diffusion layout."""

from __future__ import annotations

from pathlib import Path

from lorasweep.core.atomic_write import staged
from lorasweep.export import picture_check, read_back, whole_model
from lorasweep.export.exported import Exported, ExportError, is_file
from lorasweep.export.picture_check import EXACT, Canvas
from lorasweep.models.base_model import Precision
from lorasweep.models.load_model import Model


def convert(
    source: str,
    target: Path,
    *,
    config: str | None,
    prediction_type: str | None = None,
    vae: str | None = None,
    precision: Precision | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a single file as a diffusers folder, or a folder (or hub id) as a single file.

    A `target` ending in .safetensors is a file. `config` is the diffusers folder or hub id whose
    configs and tokenizer a single file is read with. Noise schedule and VAE are the source's
    unless a `prediction_type` or a `vae` is given, and each tensor keeps its bits unless a
    `precision` is. What was written is loaded by diffusers and must draw the source's picture.
    Raises ExportError otherwise, ModelError for what can't be read, TargetError.
    """
    if (Path(source).is_file() or is_file(Path(source))) == is_file(target):
        kind = "a single file" if is_file(target) else "a folder"
        raise ExportError(
            f"{source} and {target} are both {kind}: one is to end in .safetensors, the other not"
        )
    with picture_check.quiet(), staged(target, overwrite) as place:
        names = ("SOURCE", "--config")
        told = {"prediction_type": prediction_type} if prediction_type else {}
        model = whole_model.read(source, config, names=names, told=told, vae=vae)
        base = whole_model.as_base(_settings(source), model)
        before = picture_check.draw(base)
        result = model.cast(precision)
        result.write(place)
        tolerance = None if precision else EXACT
        _, lines = read_back.check(place, result, Canvas.of(base), before, tolerance=tolerance)
    return Exported(target, (*model.notes_of(target), *lines))


def _settings(source: str) -> Model:
    return Model(
        path=source,
        revision=None,
        config=None,
        allow_pickle=False,
        clip_skip=1,
        prediction_type=None,
    )
