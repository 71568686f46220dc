"""`lorasweep export`: a found LoRA to the form that is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lorasweep.export import merge
from lorasweep.export.diffusers_lora import write_for_diffusers
from lorasweep.export.exported import Exported, ExportError, is_file
from lorasweep.export.find_lora import FoundLoRA
from lorasweep.export.generic_diffusion_feature import offline_lora
from lorasweep.models.base_model import Precision


def export(
    lora: FoundLoRA,
    to: str,
    *,
    out: Path | None = None,
    strength: float = 1.0,
    others: Sequence[str] = (),
    rank: int | None = None,
    precision: Precision | None = None,
    vae: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export a LoRA `to` merged, diffusers-lora or offline-lora, as the command line asks.

    Without `out` it goes to `lora.exports`. `others` are further LoRAs, FILE=WEIGHT. Raises
    ExportError for what has no effect there, and what the exports themselves raise.
    """
    ending = "diffusers.safetensors" if to == "diffusers-lora" else to
    target = out or lora.exports / f"{lora.name}-{ending}"
    if not math.isfinite(strength):
        raise ExportError(f"--strength {strength}: give a number")
    loras = [(lora.path, strength), *(_weighted(text) for text in others)]
    is_whole_model = to == "merged" or (to == "offline-lora" and not is_file(target))
    if rank is not None and is_whole_model:
        raise ExportError("--rank has no effect: a whole model is exact and has no rank")
    if vae is not None and not is_whole_model:
        raise ExportError("--vae has no effect on a LoRA file: only a whole model has one")
    if to == "merged":
        return merge.merged(
            lora.model, loras, target, precision=precision, vae=vae, overwrite=overwrite
        )
    if precision is not None and is_file(target):
        raise ExportError("--dtype has no effect on a LoRA file: it keeps the checkpoint's")
    if to == "offline-lora":
        return offline_lora(
            lora.model,
            loras,
            target,
            rank=rank,
            precision=precision,
            vae=vae,
            overwrite=overwrite,
        )
    if not is_file(target):
        raise ExportError(f"--out {target}: a LoRA file's name ends in .safetensors")
    return write_for_diffusers(lora.model, loras, target, rank, overwrite=overwrite)


def _weighted(text: str) -> tuple[Path, float]:
    """FILE=WEIGHT of the command line."""
    file, _, weight = text.rpartition("=")
    try:
        if not math.isfinite(float(weight)):
            raise ValueError
        return Path(file), float(weight)
    except ValueError:
        raise ExportError(f"--with {text}: give FILE=WEIGHT, e.g. other.safetensors=0.5") from None
