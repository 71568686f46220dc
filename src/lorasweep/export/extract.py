"""A LoRA from the difference of two models of one architecture: the tuned one and its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep import __version__
from lorasweep.adapters.kohya_names import PRESETS, sites
from lorasweep.core.atomic_write import staged
from lorasweep.export import diffusers_lora, picture_check, svd, whole_model
from lorasweep.export.svd_ranks import SvdRanks, has_kernel, metadata
from lorasweep.export.whole_model import WholeModel, as_base, parameter_name
from lorasweep.lora_files import checkpoint, read_lora_file
from lorasweep.models.base_model import BaseModel, Precision, torch_dtype
from lorasweep.models.model_files import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from lorasweep.models.load_model import Model


PARTS = ("text_encoder", "unet")
"""Parts that a LoRA can change."""


@dataclass(frozen=True)
class Extracted:
    """A written LoRA and how much of the difference it holds."""

    path: Path
    num_modules: int
    identical: int
    """Modules among the targets whose weights are the same in both models, but for rounding."""
    untouched: int
    """Parameters that differ, but that no LoRA of these targets holds."""
    kept: svd.Loss

    def lines(self) -> list[str]:
        """What a person is told."""
        told = [f"{self.num_modules} modules differ; {self.identical} identical ones are left out"]
        if self.untouched:
            told.append(
                f"{self.untouched} other parameters differ too (biases, norms, or modules outside"
                " of the targets): the LoRA can't hold them"
            )
        share = f"Kept energy: {self.kept.total:.2%} of the difference's squared norm"
        return [
            *told,
            f"{share}; worst {self.kept.worst:.2%}, {self.kept.worst_site}",
            f"Wrote {self.path}",
        ]


def extract_and_draw(
    models: tuple[Model, Model],
    target: Path,
    ranks: SvdRanks,
    targets: str,
    precision: Precision = "fp32",
    *,
    overwrite: bool,
    say: Callable[[str], None],
) -> None:
    """Write a LoRA of the difference of two `models`, the tuned and its base, drawn on both.

    Raises as `extract` does, and TargetError.
    """
    read_lora_file.check_target(target, overwrite)
    _check_targets(targets)
    with picture_check.quiet(), staged(target, overwrite) as place:
        tuned, original = (_read(model) for model in models)
        _check_same(tuned, original)
        before = picture_check.draw(as_base(models[0], tuned))  # gone before the next is made
        base = as_base(models[1], original)
        name = Path(models[0].path).name
        result = extract(tuned, original, base, place, ranks, targets, precision, name)
        told = diffusers_lora.compare(before, base, place)
    for line in (*replace(result, path=target).lines(), told):
        say(line)


def extract(
    tuned: WholeModel,
    original: WholeModel,
    base: BaseModel,
    target: Path,
    ranks: SvdRanks,
    targets: str = "attn-mlp",
    precision: Precision = "fp32",
    source: str = "a tuned model",
) -> Extracted:
    """Write a LoRA of these ranks that turns the `original`, the model of `base`, into `tuned`.

    A weight that differs by no more than the rounding to the type that it was saved in is the
    same. The metadata call the tuned model `source`.
    Raises ModelError for models that differ in architecture or don't differ in the targets.
    """
    _check_targets(targets)
    _check_same(tuned, original)
    chosen = sites(base.parts, targets)
    kept: dict[str, tuple[float, float]] = {}
    tensors: dict[str, Tensor] = {}
    written = set()
    for site in chosen:
        theirs, own = tuned.weight_of(site), original.weight_of(site)
        if _is_same(theirs, own):
            continue
        found = svd.of_matrix((theirs.float() - own.float()).flatten(1))
        rank = ranks.of(found, own.shape)
        lora = found.as_lora(rank, own.shape, torch_dtype(precision), pad=ranks.is_fixed)
        tensors |= {f"{site.key}.{name}": tensor for name, tensor in lora.items()}
        kept[site.key] = (found.squared(rank), found.squared())
        written.add((int(lora["lora_down.weight"].shape[0]), has_kernel(own.shape)))
    if not kept:
        raise ModelError("the two models have the same weights in all targets: nothing to extract")
    checkpoint.write(target, tensors, _metadata(base, source, metadata(written, ranks.is_fixed)))
    others = _differing(tuned, original) - {
        (site.part, parameter_name(site, "weight")) for site in chosen
    }
    return Extracted(target, len(kept), len(chosen) - len(kept), len(others), svd.Loss.of(kept))


def _read(model: Model) -> WholeModel:
    model.check()
    return whole_model.read(model.path, model.config, model.revision, told=model.told_schedule)


def _check_targets(targets: str) -> None:
    if targets not in PRESETS:
        raise ModelError(f"--targets {targets}: choose one of {', '.join(sorted(PRESETS))}")


def _check_same(tuned: WholeModel, original: WholeModel) -> None:
    shapes = [_shapes(model) for model in (tuned, original)]
    if shapes[0] == shapes[1]:
        return
    names = set(shapes[0]) ^ set(shapes[1]) or {
        name for name in shapes[0] if shapes[0][name] != shapes[1][name]
    }
    raise ModelError(
        f"the two models are of different architectures: {len(names)} tensors differ in name or"
        f" shape, first {min(names)}"
    )


def _shapes(model: WholeModel) -> dict[str, tuple[int, ...]]:
    return {
        f"{part}.{name}": tuple(tensor.shape)
        for part in PARTS
        for name, tensor in model.weights[part].items()
    }


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Are two weights equal, but for the rounding to the types that they were saved in?

    One of fp32 rounded to bf16 is off by up to half of bf16's last place, and one that had been
    rounded to fp16 before by half of fp16's too.
    """
    import torch

    near, far = one.float(), other.float()
    if one.dtype == other.dtype:
        return torch.equal(near, far)
    _, exponent = torch.frexp(torch.maximum(near.abs(), far.abs()))
    binade = torch.ldexp(torch.ones_like(near), exponent - 1)
    allowed = torch.zeros_like(near)
    for dtype in {one.dtype, other.dtype} - {torch.float32}:
        known = torch.finfo(dtype)
        allowed += known.eps / 2 * binade.clamp(min=known.smallest_normal)
    return bool(((near - far).abs() <= allowed).all())


def _differing(tuned: WholeModel, original: WholeModel) -> set[tuple[str, str]]:
    return {
        (part, name)
        for part in PARTS
        for name, own in original.weights[part].items()
        if not _is_same(tuned.weights[part][name], own)
    }


def _metadata(base: BaseModel, source: str, ranks: Mapping[str, str]) -> dict[str, str]:
    return {
        **ranks,
        **base.metadata,
        "ss_sd_model_name": Path(base.settings.path).name,
        "lorasweep_version": __version__,
        "ss_training_comment": f"extracted by lorasweep from {source}",
        "modelspec.prediction_type": base.noise_schedule.modelspec_word,
    }
