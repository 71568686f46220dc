"""`lorasweep export`: a found LoRA to the form that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorasweep.export import merge
from lorasweep.export.diffusers_lora import write_for_diffusers
from lorasweep.export.exported import Exported, ExportError, is_file
from lorasweep.export.find_lora import FoundLoRA
from lorasweep.export.generic_diffusion_feature import offline_lora
from lorasweep.export.kohya_lora import write_for_kohya
from lorasweep.export.lora_weights import Weight, parsed, unet_alone
from lorasweep.models.base_model import Precision


def export(
    lora: FoundLoRA,
    to: str,
    *,
    out: Path | None = None,
    strength: Weight = 1.0,
    others: Sequence[str] = (),
    unet_only: bool = False,
    rank: int | None = None,
    precision: Precision | None = None,
    vae: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export a LoRA `to` merged, kohya, diffusers-lora or offline-lora, as the command line asks.

    Without `out` it goes to `lora.exports`. `others` are further LoRAs, FILE=WEIGHT. With
    `unet_only` nothing of the text encoder is taken. Raises ExportError for what has no effect
    there, and what the exports themselves raise.
    """
    ending = {"diffusers-lora": "diffusers.safetensors", "kohya": "kohya.safetensors"}.get(to, to)
    target = out or lora.exports / f"{lora.name}-{ending}"
    loras = [(lora.path, strength), *(_weighted(text) for text in others)]
    if unet_only:
        loras = [(path, unet_alone(weight)) for path, weight in loras]
    is_whole_model = to == "merged" or (to == "offline-lora" and not is_file(target))
    if rank is not None and is_whole_model:
        raise ExportError("--rank has no effect: a whole model is exact and has no rank")
    if vae is not None and not is_whole_model:
        raise ExportError("--vae has no effect on a LoRA file: only a whole model has one")
    if to == "merged":
        return merge.merged(
            lora.model, loras, target, precision=precision, vae=vae, overwrite=overwrite
        )
    if to == "kohya":
        return write_for_kohya(
            lora.model, loras, target, rank, precision=precision, overwrite=overwrite
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


def _weighted(text: str) -> tuple[Path, Weight]:
    """FILE=WEIGHT of the command line."""
    file, _, weight = text.rpartition("=")
    if not file:
        raise ExportError(f"--with {text}: give FILE=WEIGHT, e.g. other.safetensors=0.5")
    return Path(file), parsed(weight, f"--with {text}")
