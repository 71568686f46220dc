"""A LoRA file that diffusers' `load_lora_weights` takes and draws right, from one of any type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.adapters.adapter import Site
from lorasweep.adapters.kohya_names import every_site
from lorasweep.core.atomic_write import staged
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.text import shown
from lorasweep.export import picture_check, svd, whole_model
from lorasweep.export.attach_loras import Loras, attachable
from lorasweep.export.diffusers_lora_tensors import REMEDY, How, convert, diffusers_reads
from lorasweep.export.exported import Exported, ExportError
from lorasweep.export.picture_check import TOLERANCES, Canvas, Tolerance
from lorasweep.lora_files import checkpoint, read_lora_file
from lorasweep.lora_files.peft_config import METADATA_KEY
from lorasweep.lora_files.read_lora_file import FACTORED, LoRAFile
from lorasweep.models.base_model import BaseModel
from lorasweep.models.load_model import Model

if TYPE_CHECKING:
    from PIL import Image

    from lorasweep.models.sdxl import Base


def write_for_diffusers(
    base: Model, loras: Loras, target: Path, rank: int | None, *, overwrite: bool = False
) -> Exported:
    """As `lora_for_diffusers`, on the base model that these settings name.

    Raises ExportError for `loras` that no LoRA file can hold: several, or one of another strength.
    """
    (source, strength), *others = loras
    if others or strength != 1:
        raise ExportError(
            "a LoRA file holds one LoRA, as trained: --strength and --with need a whole model"
            " (--to merged, or --to offline-lora with --out FOLDER)"
        )
    with picture_check.quiet():
        loaded = whole_model.base_for_loras(base)
        return lora_for_diffusers(source, target, loaded, rank, overwrite=overwrite)


def lora_for_diffusers(
    source: Path,
    target: Path,
    base: Base,
    rank: int | None,
    *,
    overwrite: bool = False,
) -> Exported:
    """Write `source` so that diffusers draws with it what our own adapters draw.

    `rank` allows an approximation of what has no exact form. A picture is drawn before and after.
    Raises TargetError for a taken target, and ExportError, naming the remedy, for
    what can't be exported or is read otherwise by diffusers; nothing is written then.
    """
    file = read_lora_file.read(source, base)
    with staged(target, overwrite) as place:
        _check_fit(file, base)
        try:
            tensors, how, loss = convert(file, base, rank)
        except ExportError as error:
            raise ExportError(f"{source}: {error}") from None
        if rank is not None and loss is None:
            raise ExportError(f"--rank has no effect on {source}, which diffusers can hold exactly")
        checkpoint.write(place, tensors, _metadata(file, how))
        line = compare(_draw(file, base), base, place, file, how)
    return Exported(target, (_told(how, loss), line))


def _told(how: How, loss: svd.Loss | None) -> str:
    """What was done, and the error of the approximated modules."""
    told = {
        "as it is": "diffusers reads the file as it is: copied",
        "converted": "Converted exactly, to the names of PEFT",
        "approximated": "Approximated by SVD",
    }[how]
    if loss is None:
        return told
    return (
        f"{told}: relative error of the change of the weights {loss.error:.2%}, worst"
        f" {loss.worst_error:.2%} ({loss.worst_site}); kept energy {loss.total:.2%}"
    )


def compare(
    before: Image.Image,
    base: Base,
    written: Path,
    source: LoRAFile | None = None,
    how: How = "approximated",
) -> str:
    """The line on a written LoRA file and the picture `before`, of what it was made of.

    What was made for diffusers of a `source` must be read by diffusers as we read it, every module
    of the source; without a source diffusers is asked only where it reads kohya's names right.
    Raises ExportError otherwise.
    """
    file = read_lora_file.read(written, base)
    is_asked = source is not None or (isinstance(base, BaseModel) and diffusers_reads(file))
    reader = "diffusers' load_lora_weights" if is_asked else "the base with the LoRA"
    is_exact = how != "approximated"
    with picture_check.quiet():
        bare, own = picture_check.draw(base), before if is_exact else _draw(file, base)
        after = _draw_written(source or file, written, base) if is_asked else own
    must = picture_check.compare(own, after, bare, _tolerance(source or file))
    if not must.holds:
        told = f"{must.line(reader)} Nothing was written"
        raise ExportError(f"{source.path}: {told}; {REMEDY}" if source else told)
    if is_exact:
        return must.line(reader)
    return picture_check.compare(before, after, bare).approximate_line(reader)


def _check_fit(file: LoRAFile, base: Base) -> None:
    """Raise ExportError for a LoRA of another base, before any library is asked.

    Types that can't be exported are left for what refuses them by name.
    """
    held = {
        name: tensor
        for name, tensor in file.tensors.items()
        if file.algorithms[name.partition(".")[0]] in (*FACTORED, "dora", "full")
    }
    try:
        attachable(base, [(replace(file, tensors=held), 1.0)])
    except CheckpointError as error:
        raise ExportError(str(error)) from None


def _metadata(file: LoRAFile, how: How) -> dict[str, str]:
    """The source's; its description of PEFT's config would contradict the folded scales."""
    stale = ("sshs_", METADATA_KEY)
    carried = {key: value for key, value in file.metadata.items() if not key.startswith(stale)}
    if how == "as it is":
        return carried
    return {**carried, "ss_training_comment": f"{how} for diffusers from {file.path.name}"}


def _draw(file: LoRAFile, base: Base) -> Image.Image:
    return picture_check.draw(base, attachable(base, [(file, 1.0)]))


def _draw_written(file: LoRAFile, path: Path, base: Base) -> Image.Image:
    """The picture that diffusers draws with a LoRA file; the base is as before afterwards."""
    pipeline, known = picture_check.pipeline_of(base), every_site(base.parts)
    try:
        _load(pipeline, path)
        _require_adapted([known[key] for key in file.sites], base)
        return picture_check.draw_with(pipeline, Canvas.of(base))
    finally:
        pipeline.unload_lora_weights()


def _load(pipeline: Any, path: Path) -> None:
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
    except (ValueError, RuntimeError, KeyError) as error:
        cause = shown(str(error).splitlines()[0])
        raise ExportError(f"diffusers can't load it ({cause}): {REMEDY}") from None


def _require_adapted(sites: Sequence[Site], base: Base) -> None:
    """Raise ExportError for a module that diffusers has left bare, without a word of its own."""
    roots = {part: root for part, (_, root) in base.parts.items()}
    bare = [s for s in sites if not hasattr(roots[s.part].get_submodule(s.path), "lora_A")]
    if bare:
        raise ExportError(
            f"diffusers leaves {len(bare)} of the {len(sites)} modules out, first"
            f" {shown(bare[0].key)}: {REMEDY}"
        )


def _tolerance(file: LoRAFile) -> Tolerance:
    """By the type that the folded scales are rounded to."""
    names = {"torch.float16": "fp16", "torch.bfloat16": "bf16"}
    return TOLERANCES[names.get(str(svd.dtype_of(file.tensors)), "fp32")]
