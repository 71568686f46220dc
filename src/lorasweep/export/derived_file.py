"""LoRA files made of others (resize) or of two models (extract), drawn before they appear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.adapters.pack import Pack
from lorasweep.config.compose import compose_without_images
from lorasweep.core.atomic_write import staged
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.settings import SettingsError
from lorasweep.export import find_lora, model_tensors, picture_check, sdxl
from lorasweep.export.convert_model import load_base
from lorasweep.export.diffusers_lora import approximation
from lorasweep.lora_files import extract, lora_file, resize
from lorasweep.models.load_model import Model
from lorasweep.models.model_files import ModelError
from lorasweep.tracking import TrackingError

if TYPE_CHECKING:
    from PIL.Image import Image

    from lorasweep.export.sdxl import Base

UNCHECKED = "Not checked by a picture"


@dataclass(frozen=True)
class _Before:
    """The picture of the LoRA as it came."""

    base: Base
    picture: Image


def resized(
    source: Path,
    target: Path,
    rank: int | None,
    energy: float | None,
    *,
    model: Model | None,
    overwrite: bool,
    say: Callable[[str], None],
) -> None:
    """Write `source` with another rank, draw it before and after, and say whether that is close.

    Without a `model` the base is found as `export` finds it, if it is on this machine; where it
    can't be had one sentence says why, and the file is written all the same. Raises
    CheckpointError, ModelError, TargetError.
    """
    lora_file.check_target(target, overwrite)
    resize.check(rank, energy)
    with picture_check.quiet():
        before = _before(source, load_base(model)) if model else _found(source, say)
    with picture_check.quiet(), staged(target, overwrite) as place:
        result = resize.resize(source, place, rank, energy)
        if isinstance(before, str):
            told = f"{UNCHECKED}: {before}"
        else:
            told = approximation(before.picture, before.base, place)
    for line in (*replace(result, path=target).lines(), told):
        say(line)


def extracted(
    models: tuple[Model, Model],
    target: Path,
    rank: int,
    conv_rank: int | None,
    targets: str,
    *,
    overwrite: bool,
    say: Callable[[str], None],
) -> None:
    """Write a LoRA of the difference of two `models`, the tuned and its base, drawn on both.

    Raises as `extract.extract` does, and TargetError.
    """
    extract.check_ranks(rank, conv_rank)
    lora_file.check_target(target, overwrite)
    with picture_check.quiet(), staged(target, overwrite) as place:
        tuned, base = (model.load() for model in models)
        result = extract.extract(tuned, base, place, rank, conv_rank, targets)
        told = approximation(picture_check.draw(tuned), base, place)
    for line in (*replace(result, path=target).lines(), told):
        say(line)


def _found(source: Path, say: Callable[[str], None]) -> _Before | str:
    """The picture on the base that the file was trained on, or why there is none."""
    cfg = compose_without_images([])
    try:
        found = find_lora.trained_on(source, cfg)
        if found is None:
            return f"{find_lora.unknown_base(source)}; --model PATH gives it"
        model, where = found
        say(where)
        local = _on_this_machine(model)
        if local is None:
            return (
                f"{model.path} is not on this machine, and nothing is downloaded for a picture;"
                " --model PATH gives a copy"
            )
        return _before(source, load_base(local))
    except (SettingsError, ModelError, TrackingError, CheckpointError) as error:
        lora_file.read(source)  # is it the file itself? Then that is what must be said
        return f"{error}; --model PATH gives the base"


def _before(source: Path, base: Base) -> _Before:
    """Raises CheckpointError for a base that the LoRA doesn't fit."""
    file = sdxl.read_lora(source, base)
    try:
        pack = Pack.from_files(base.parts, [file.tensors])
    except CheckpointError as error:
        raise CheckpointError(
            f"{source}: {error}. Is it of another base than {base.settings.path}?"
        ) from None
    return _Before(base, picture_check.draw(base, [(pack, 1.0)]))


def _on_this_machine(model: Model) -> Model | None:
    """The model by its folder or file here; None for a hub id without a copy."""
    if model.is_single_file:
        config_folder = model.config and model_tensors.downloaded(model.config, None)
        return replace(model, config=str(config_folder)) if config_folder else None
    folder = model_tensors.downloaded(model.path, model.revision)
    return replace(model, path=str(folder), revision=None) if folder else None
