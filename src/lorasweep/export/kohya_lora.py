"""A LoRA file under kohya's names, which A1111, ComfyUI, sd-scripts and diffusers read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.core.atomic_write import staged
from lorasweep.export import picture_check, whole_model
from lorasweep.export.attach_loras import Loras, attachable
from lorasweep.export.combine_loras import combine
from lorasweep.export.exported import Exported
from lorasweep.lora_files import checkpoint, read_lora_file
from lorasweep.lora_files.kohya_form import with_kohya_names
from lorasweep.models.base_model import BaseModel, Precision, torch_dtype
from lorasweep.models.load_model import Model

if TYPE_CHECKING:
    from torch import Tensor

    from lorasweep.lora_files.read_lora_file import LoRAFile


def write_for_kohya(
    settings: Model,
    loras: Loras,
    target: Path,
    rank: int | None = None,
    *,
    precision: Precision | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write the weighted sum of LoRA files of any type as one file under kohya's names.

    It is exact unless a `rank` allows an approximation by SVD (`combine`); tensors keep their type
    where they keep their values, unless a `precision` is given. A picture is drawn before and
    after. Raises ExportError, CheckpointError, TargetError.
    """
    read_lora_file.check_target(target, overwrite)
    with picture_check.quiet(), staged(target, overwrite) as place:
        base = whole_model.base_for_loras(settings)
        files = [(read_lora_file.read(path, base), weight) for path, weight in loras]
        given = attachable(base, files)
        combined = combine(base, files, rank)
        checkpoint.write(place, _named(combined.file, base, precision), combined.file.metadata)
        line = combined.compare(base, given, read_lora_file.read(place, base), precision or "fp32")
    return Exported(target, (combined.told, line))


def _named(file: LoRAFile, base: BaseModel, precision: Precision | None) -> dict[str, Tensor]:
    """The file's tensors by kohya's names, of alphas alone in their own type."""
    found = {}
    for name, tensor in with_kohya_names(file.tensors, base).items():
        is_weight = not name.endswith(".alpha")  # which no narrow type can hold
        wanted = torch_dtype(precision) if precision and is_weight else tensor.dtype
        found[name] = tensor.to(wanted)
    return found
