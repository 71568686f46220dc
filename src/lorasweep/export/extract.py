"""A LoRA from the difference of two models of one architecture: the tuned one and its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep import __version__
from lorasweep.adapters.adapter import Site
from lorasweep.adapters.kohya_names import PRESETS, every_site, sites
from lorasweep.adapters.unet_blocks import MAX_RANK
from lorasweep.core.atomic_write import staged
from lorasweep.export import diffusers_lora, picture_check, svd
from lorasweep.lora_files import checkpoint, read_lora_file
from lorasweep.models.base_model import BaseModel
from lorasweep.models.model_files import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from lorasweep.models.load_model import Model


@dataclass(frozen=True)
class Extracted:
    """A written LoRA and how much of the difference it holds."""

    path: Path
    num_modules: int
    identical: int
    """Modules among the targets whose weights are the same in both models."""
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
    rank: int,
    conv_rank: int | None,
    targets: str,
    *,
    overwrite: bool,
    say: Callable[[str], None],
) -> None:
    """Write a LoRA of the difference of two `models`, the tuned and its base, drawn on both.

    Raises as `extract` does, and TargetError.
    """
    check_ranks(rank, conv_rank)
    read_lora_file.check_target(target, overwrite)
    with picture_check.quiet(), staged(target, overwrite) as place:
        tuned, base = (model.load() for model in models)
        result = extract(tuned, base, place, rank, conv_rank, targets)
        told = diffusers_lora.compare(picture_check.draw(tuned), base, place)
    for line in (*replace(result, path=target).lines(), told):
        say(line)


def extract(
    tuned: BaseModel,
    base: BaseModel,
    target: Path,
    rank: int,
    conv_rank: int | None = None,
    targets: str = "attn-mlp",
) -> Extracted:
    """Write a LoRA of `rank` (3x3 convolutions: `conv_rank`) that turns `base` into `tuned`.

    Raises ModelError for models that differ in architecture or don't differ in the targets.
    """
    check_ranks(rank, conv_rank)
    _check_same(tuned, base)
    theirs = every_site(tuned.parts)
    chosen = _chosen(base, targets)
    kept: dict[str, tuple[float, float]] = {}
    tensors: dict[str, Tensor] = {}
    for site in chosen:
        delta = theirs[site.key].weight.float() - site.weight.float()
        if not bool(delta.any()):
            continue
        own = conv_rank or rank if site.has_kernel else rank
        found = svd.of_matrix(delta.flatten(1))
        lora = found.as_lora(own, site.weight.shape, delta.dtype)
        tensors |= {f"{site.key}.{name}": tensor for name, tensor in lora.items()}
        kept[site.key] = (found.squared(own), found.squared())
    if not kept:
        raise ModelError("the two models have the same weights in all targets: nothing to extract")
    checkpoint.write(target, tensors, _metadata(base, tuned, rank))
    others = _differing(tuned, base) - {f"{site.key}.weight" for site in chosen}
    return Extracted(target, len(kept), len(chosen) - len(kept), len(others), svd.Loss.of(kept))


def check_ranks(rank: int, conv_rank: int | None) -> None:
    """Raise ModelError for ranks that no LoRA has."""
    for name, value in (("--rank", rank), ("--conv-rank", conv_rank)):
        if value is not None and not 1 <= value <= MAX_RANK:
            raise ModelError(f"{name} {value}: give 1 to {MAX_RANK}")


def _chosen(base: BaseModel, targets: str) -> list[Site]:
    if targets not in PRESETS:
        raise ModelError(f"--targets {targets}: choose one of {', '.join(sorted(PRESETS))}")
    return sites(base.parts, targets)


def _weights(model: BaseModel) -> dict[str, Tensor]:
    return {
        f"{prefix}_{name.rpartition('.')[0].replace('.', '_')}.{name.rpartition('.')[2]}": weight
        for prefix, root in model.parts.values()
        for name, weight in root.named_parameters()
    }


def _check_same(tuned: BaseModel, base: BaseModel) -> None:
    shapes: list[Mapping[str, tuple[int, ...]]] = [
        {name: tuple(weight.shape) for name, weight in _weights(model).items()}
        for model in (tuned, base)
    ]
    if shapes[0] == shapes[1]:
        return
    names = set(shapes[0]) ^ set(shapes[1]) or {
        name for name in shapes[0] if shapes[0][name] != shapes[1][name]
    }
    raise ModelError(
        f"{tuned.settings.path} and {base.settings.path} are of different architectures:"
        f" {len(names)} parameters differ in name or shape, first {min(names)}"
    )


def _differing(tuned: BaseModel, base: BaseModel) -> set[str]:
    import torch

    theirs = _weights(tuned)
    return {name for name, own in _weights(base).items() if not torch.equal(own, theirs[name])}


def _metadata(base: BaseModel, tuned: BaseModel, rank: int) -> dict[str, str]:
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_base_model_version": base.base_model_version,
        "ss_sd_model_name": Path(base.settings.path).name,
        "lorasweep_version": __version__,
        "ss_training_comment": f"extracted by lorasweep from {Path(tuned.settings.path).name}",
        "modelspec.architecture": base.architecture,
    }
