"""A LoRA file that diffusers' `load_lora_weights` takes and draws right, from one of any type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.adapters.adapter import Site
from lorasweep.adapters.kohya_names import every_site
from lorasweep.core.atomic_write import staged
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.text import shown
from lorasweep.export import module_check, picture_check, svd, whole_model
from lorasweep.export.attach_loras import Loras, attachable
from lorasweep.export.combine_loras import combine
from lorasweep.export.diffusers_lora_tensors import REMEDY, How, convert, diffusers_reads
from lorasweep.export.exported import Exported, ExportError
from lorasweep.export.picture_check import TOLERANCES, Canvas
from lorasweep.lora_files import checkpoint, read_lora_file
from lorasweep.lora_files.peft_config import METADATA_KEY
from lorasweep.lora_files.read_lora_file import FACTORED, LoRAFile
from lorasweep.models.base_model import Precision
from lorasweep.models.load_model import Model
from lorasweep.models.sdxl import SDXLModel

if TYPE_CHECKING:
    from PIL import Image
    from torch.nn import Module

    from lorasweep.models.sdxl import Base


READER = "diffusers' load_lora_weights"


def write_for_diffusers(
    base: Model, loras: Loras, target: Path, rank: int | None, *, overwrite: bool = False
) -> Exported:
    """As `lora_for_diffusers`, on the base model that these settings name.

    Several LoRAs, or one of another strength, become one first (`combine`). Raises ExportError.
    """
    with picture_check.quiet():
        loaded = whole_model.base_for_loras(base)
        (source, weight), *others = loras
        if not others and weight == 1:
            return lora_for_diffusers(source, target, loaded, rank, overwrite=overwrite)
        files = [(read_lora_file.read(path, loaded), weight) for path, weight in loras]
        given = attachable(loaded, files)
        combined = combine(loaded, files, rank)
        told = combined.compare(loaded, given, combined.file)
        left = rank if combined.loss is None else None
        done = _write(combined.file, target, loaded, left, overwrite=overwrite)
    return replace(done, lines=(combined.told, told, *done.lines))


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
    return _write(read_lora_file.read(source, base), target, base, rank, overwrite=overwrite)


def _write(
    file: LoRAFile, target: Path, base: Base, rank: int | None, *, overwrite: bool
) -> Exported:
    source = file.path
    with staged(target, overwrite) as place:
        _check_fit(file, base)
        try:
            tensors, how, loss = convert(file, base, rank)
        except ExportError as error:
            raise ExportError(f"{source}: {error}") from None
        if rank is not None and loss is None:
            raise ExportError(f"--rank has no effect on {source}, which diffusers can hold exactly")
        checkpoint.write(place, tensors, _metadata(file, how))
        try:
            line = compare(_draw(file, base), base, place, file, how)
        except ExportError as error:
            remedy = "" if REMEDY in str(error) else f" Or {REMEDY}"
            raise ExportError(f"{source}: {error}{remedy}") from None
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
    is_asked = source is not None or (not isinstance(base, SDXLModel) and diffusers_reads(file))
    is_exact = how != "approximated"
    with picture_check.quiet():
        bare, own = picture_check.draw(base), before if is_exact else _draw(file, base)
        if not is_asked:
            told = picture_check.compare(before, own, bare)
            return told.approximate_line("the base with the LoRA")
        meant = (source or file) if is_exact else file
        after, line = _require_read(meant, written, base, bare, own)
    if is_exact:
        return line
    return picture_check.compare(before, after, bare).approximate_line(READER)


def _require_read(
    meant: LoRAFile, written: Path, base: Base, bare: Image.Image, own: Image.Image
) -> tuple[Image.Image, str]:
    """The picture that diffusers draws with a written file, and the line that it is `own`.

    Raises ExportError unless diffusers reads each module of what is `meant` as we do.
    """
    known = every_site(base.parts)
    sites = [known[key] for key in meant.sites]
    ours = module_check.outputs_with(base, attachable(base, [(meant, 1.0)]))
    precision = _precision(meant)
    with _loaded(written, base) as pipeline:
        found = _adapted(sites, base)
        draw = partial(picture_check.draw_with, pipeline, Canvas.of(base))
        after = draw()
        line = module_check.require_same(
            picture_check.compare(own, after, bare, TOLERANCES[precision]),
            READER,
            after,
            redraw=lambda: draw(guidance=picture_check.NUDGED),
            modules=lambda: module_check.require(ours, module_check.outputs(found), precision),
        )
        return after, line


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


@contextmanager
def _loaded(path: Path, base: Base) -> Iterator[Any]:
    """diffusers' pipeline with a LoRA file loaded; the base is as before afterwards."""
    pipeline = picture_check.pipeline_of(base)
    try:
        _load(pipeline, path)
        yield pipeline
    finally:
        pipeline.unload_lora_weights()


def _load(pipeline: Any, path: Path) -> None:
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
    except (ValueError, RuntimeError, KeyError) as error:
        cause = shown(str(error).splitlines()[0])
        raise ExportError(f"diffusers can't load it ({cause}): {REMEDY}") from None


def _adapted(sites: Sequence[Site], base: Base) -> dict[str, Module]:
    """What diffusers has put in the sites' places, by part and dotted path.

    Raises ExportError for a module that it has left bare, without a word of its own.
    """
    roots = {part: root for part, (_, root) in base.parts.items()}
    found = {f"{s.part}.{s.path}": roots[s.part].get_submodule(s.path) for s in sites}
    bare = [name for name, module in found.items() if not hasattr(module, "lora_A")]
    if bare:
        raise ExportError(
            f"diffusers leaves {len(bare)} of the {len(sites)} modules out, first"
            f" {shown(bare[0])}: {REMEDY}"
        )
    return found


def _precision(file: LoRAFile) -> Precision:
    """The type that the folded scales are rounded to."""
    names: dict[str, Precision] = {"torch.float16": "fp16", "torch.bfloat16": "bf16"}
    return names.get(str(svd.dtype_of(file.tensors)), "fp32")
