"""Between a diffusers folder and a single file in the original Stable Diffusion layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.core.atomic_write import staged
from lorasweep.export import model_tensors, sdxl
from lorasweep.export import picture_check as export_check
from lorasweep.export.picture_check import EXACT, TEXT_TO_IMAGE, TOLERANCES, ExportError, Tolerance
from lorasweep.models.base_model import Precision
from lorasweep.models.load_model import Model

if TYPE_CHECKING:
    from lorasweep.export.model_tensors import WholeModel
    from lorasweep.export.sdxl import Base


@dataclass(frozen=True)
class Conversion:
    """What was written, and what a person is told of it."""

    path: Path
    lines: tuple[str, ...]


def convert(
    source: str,
    target: Path,
    *,
    config: str | None,
    precision: Precision | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write a single file as a diffusers folder, or a folder (or hub id) as a single file.

    A `target` ending in .safetensors is a file. `config` is the diffusers folder or hub id whose
    configs and tokenizer a single file is read with. Each tensor keeps its bits unless a
    `precision` is given. What was written is loaded by diffusers and must draw the source's
    picture. Raises ExportError otherwise, ModelError for what can't be read, TargetError.
    """
    if (Path(source).is_file() or is_file(Path(source))) == is_file(target):
        kind = "a single file" if is_file(target) else "a folder"
        raise ExportError(
            f"{source} and {target} are both {kind}: one is to end in .safetensors, the other not"
        )
    with export_check.quiet(), staged(target, overwrite) as place:
        model = model_tensors.read(source, config, names=("SOURCE", "--config"))
        before = load(_settings(source), model)
        picture = export_check.draw(before)
        written, read_back = write(model.cast(precision), place)
        canvas, noise = export_check.Canvas.of(before), schedule(before, place)
        after = export_check.draw_with(written, canvas, scheduler_config=noise)
        agreement = export_check.compare(picture, after, tolerance=_tolerance(precision))
        line = export_check.require(agreement, reader(place))
    return Conversion(target, (*model.notes, read_back, line))


def is_file(target: Path) -> bool:
    """Is a single file to be written there, not a folder?"""
    return target.suffix == ".safetensors"


def write(
    model: WholeModel,
    place: Path,
    prediction_type: str | None = None,
    kind: str = TEXT_TO_IMAGE,
) -> tuple[Any, str]:
    """Write the layout that `place`'s name tells, and read it back as diffusers does.

    Returns diffusers' pipeline, and a line that says that it holds every tensor as it was.
    """
    if is_file(place):
        model_tensors.write_file(model, place)
        pipeline = export_check.load_file(place, model.configs)
    else:
        changes = {"prediction_type": prediction_type} if prediction_type else None
        model_tensors.write_folder(model, place, changes)
        pipeline = export_check.load_folder(place, kind)
    return pipeline, export_check.require_weights(pipeline, model.weights)


def schedule(base: Base, place: Path) -> dict[str, Any] | None:
    """The noise schedule to draw with: a file has none, and its user gives it."""
    return dict(base.scheduler_config) if is_file(place) else None


def reader(place: Path, kind: str = TEXT_TO_IMAGE, variant: str | None = None) -> str:
    """What loaded it, in words."""
    call = "from_single_file" if is_file(place) else "from_pretrained"
    return f"diffusers' {kind}.{call}" + (f" with variant={variant!r}" if variant else "")


def load(settings: Model, model: WholeModel) -> Base:
    """The model as lorasweep computes with it, from the files on this machine that were read."""
    if model.layout.is_sdxl:
        return sdxl.load(settings, model)
    path = settings.path if settings.is_single_file else str(model.configs)
    return replace(settings, path=path, config=str(model.configs), revision=None).load()


def load_base(settings: Model) -> Base:
    """The model that exports attach LoRAs to, whatever its architecture. Raises ModelError."""
    if not model_tensors.is_sdxl(settings.path, settings.revision):
        return settings.load()
    return load(settings, model_tensors.read(settings.path, None, settings.revision, sdxl=True))


def _settings(source: str) -> Model:
    return Model(
        path=source,
        revision=None,
        config=None,
        allow_pickle=False,
        clip_skip=1,
        prediction_type=None,
    )


def _tolerance(precision: Precision | None) -> Tolerance:
    return EXACT if precision is None else TOLERANCES[precision]
