"""Several LoRAs as one, or one at another strength: exact by concatenation, or to a rank by SVD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from lorasweep.adapters.differences import ADDED
from lorasweep.adapters.kohya_names import every_norm, every_site
from lorasweep.adapters.pack import file_delta
from lorasweep.adapters.weight_deltas import Tensors, algorithm, has_magnitude, scale_of
from lorasweep.core.text import shown
from lorasweep.export import module_check, picture_check, svd
from lorasweep.export.attach_loras import Weighted, attachable
from lorasweep.export.exported import ExportError
from lorasweep.export.lora_weights import Weight, weight_at
from lorasweep.export.picture_check import Canvas
from lorasweep.export.svd_ranks import has_kernel, metadata
from lorasweep.lora_files.peft_config import METADATA_KEY
from lorasweep.lora_files.read_lora_file import LoRAFile
from lorasweep.models.base_model import BaseModel, Precision

if TYPE_CHECKING:
    from torch import Tensor

    from lorasweep.adapters.adapter import Site

_OF_BASE = ("ss_base_model_version", "ss_sd_model_name", "ss_v2", "modelspec.architecture")
_Members = Sequence[tuple[Tensors, float]]


@dataclass(frozen=True)
class Combined:
    """The one LoRA, under the keys of the base's sites, and what an approximation lost."""

    file: LoRAFile
    loss: svd.Loss | None
    told: str
    """What was done, for a person."""

    def compare(
        self, base: BaseModel, given: Weighted, written: LoRAFile, precision: Precision = "fp32"
    ) -> str:
        """The line on the pictures of the LoRAs as `given` and of the one that was `written`.

        Raises ExportError where they differ although it is exact but for its `precision`.
        """
        adapters = attachable(base, [(written, 1.0)])
        draw = partial(picture_check.draw, base)
        bare, before, after = draw(), draw(given), draw(adapters)
        reader = "the base with the one LoRA"
        if self.loss is not None:
            return picture_check.compare(before, after, bare).approximate_line(reader)
        ours = module_check.outputs_with(base, given)
        return module_check.require_same(
            picture_check.compare(before, after, bare, Canvas.of(base).tolerance(precision)),
            reader,
            after,
            redraw=lambda: draw(adapters, guidance=picture_check.NUDGED),
            modules=lambda: module_check.require(
                ours, module_check.outputs_with(base, adapters, list(ours)), precision
            ),
        )


def combine(
    base: BaseModel, files: Sequence[tuple[LoRAFile, Weight]], rank: int | None = None
) -> Combined:
    """The LoRA that changes each weight by the weighted sum of what the files change it by.

    Modules of weight 0 are left out. Without a `rank` it is exact; raises ExportError for types
    that have no exact sum, and where nothing is left.
    """
    known = every_site(base.parts) | every_norm(base.parts)
    sites: dict[str, Mapping[str, Tensor]] = {}
    kept: dict[str, tuple[float, float]] = {}
    for key in dict.fromkeys(key for file, _ in files for key in file.sites):
        if key not in known:
            raise ExportError(f"{shown(key)}: the base model has no such module")
        site = known[key]
        members = [
            (file.sites[key], weight_at(weight, site))
            for file, weight in files
            if key in file.sites
        ]
        members = [(tensors, weight) for tensors, weight in members if weight != 0]
        if not members:
            continue
        factors = [(_without_added(tensors), weight) for tensors, weight in members]
        factors = [(tensors, weight) for tensors, weight in factors if tensors]
        sites[key] = _added(members)
        if not factors:
            continue
        if rank is None:
            own = _exact(site, factors)
        else:
            own, kept[key] = _approximated(site, factors, rank)
        sites[key] = {**own, **sites[key]}
    if not sites:
        raise ExportError("no module is left: every weight is 0")
    tensors = {f"{key}.{name}": t for key, one in sites.items() for name, t in one.items()}
    file = replace(files[0][0], tensors=tensors, metadata=_metadata(files, sites, rank))
    loss = svd.Loss.of(kept) if rank is not None else None
    return Combined(file, loss, _told(len(files), loss))


def _added(members: _Members) -> dict[str, Tensor]:
    """The weighted sums of differences of biases and norms, fp32."""
    sums: dict[str, Tensor] = {}
    for tensors, weight in members:
        for name in ADDED & tensors.keys():
            change = weight * tensors[name].float()
            sums[name] = sums[name] + change if name in sums else change
    return sums


def _without_added(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in ADDED}


def _exact(site: Site, members: _Members) -> Mapping[str, Tensor]:
    if len(members) == 1:
        tensors, weight = members[0]
        return tensors if weight == 1 else _scaled(site, tensors, weight)
    for tensors, _ in members:
        if not _is_plain(tensors):
            raise ExportError(
                f"{shown(site.key)} is of {_named(tensors)} in one of them, whose sum with others"
                " is no LoRA: give --rank to approximate it, or export --to merged, which is exact"
            )
    import torch

    up, down = _concatenated(members)
    kernel = (1, 1) if len(site.weight.shape) == 4 else ()
    return {
        "lora_down.weight": down.reshape(-1, *site.weight.shape[1:]),
        "lora_up.weight": up.reshape(*up.shape, *kernel),
        "alpha": torch.tensor(float(len(down))),
    }


def _scaled(site: Site, tensors: Tensors, weight: float) -> Mapping[str, Tensor]:
    """A site's tensors with `weight` times the change."""
    if has_magnitude(tensors):
        raise ExportError(
            f"{shown(site.key)} is of {_named(tensors)}, which is no LoRA at another strength: give"
            " --rank to approximate it, or export --to merged, which is exact"
        )
    kind = algorithm(tensors)
    if kind in ("lora", "loha"):  # the weights keep their bits
        return {**tensors, "alpha": tensors["alpha"].float() * weight}
    factors = {"lokr": ("lokr_w1", "lokr_w1_a"), "full": ("diff",)}.get(kind or "", ())
    held = [name for name in factors if name in tensors]
    if not held:
        raise ExportError(
            f"{shown(site.key)} is of {_named(tensors)}, which has no other strength: export"
            " --to merged instead, which is exact"
        )
    return {**tensors, **{name: tensors[name].float() * weight for name in held}}


def _approximated(
    site: Site, members: _Members, rank: int
) -> tuple[Mapping[str, Tensor], tuple[float, float]]:
    """The best LoRA of `rank`, and the (kept, whole) squared norm of the change."""
    if all(_is_plain(tensors) for tensors, _ in members):
        found = svd.of_product(*_concatenated(members))
    else:
        deltas = [weight * file_delta(site, tensors) for tensors, weight in members]
        total = deltas[0]
        for delta in deltas[1:]:
            total = total + delta
        found = svd.of_matrix(total.flatten(1))
    new = found.as_lora(rank, site.weight.shape, svd.dtype_of(members[0][0]))
    return new, (found.squared(rank), found.squared())


def _concatenated(members: _Members) -> tuple[Tensor, Tensor]:
    """up (out, sum of ranks), with scales and weights in it, and down (sum of ranks, in), fp32."""
    import torch

    ups, downs = [], []
    for tensors, weight in members:
        up, down = tensors["lora_up.weight"].float(), tensors["lora_down.weight"].float()
        ups.append(up.flatten(1) * (scale_of(tensors) * weight))
        downs.append(down.flatten(1))
    return torch.cat(ups, dim=1), torch.cat(downs)


def _is_plain(tensors: Tensors) -> bool:
    return set(tensors) == {"lora_down.weight", "lora_up.weight", "alpha"}


def _named(tensors: Tensors) -> str:
    name = algorithm(tensors) or "no known type"
    names = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "full": "a full difference"}
    return names.get(name, name) + (" with magnitudes" if has_magnitude(tensors) else "")


def _told(number: int, loss: svd.Loss | None) -> str:
    what = f"{number} LoRAs are one" if number > 1 else "The LoRA"
    if loss is None:
        return f"{what}, exactly"
    return (
        f"{what}, approximated by SVD: kept energy {loss.total:.2%}, worst {loss.worst:.2%}"
        f" ({loss.worst_site})"
    )


def _metadata(
    files: Sequence[tuple[LoRAFile, Weight]],
    sites: Mapping[str, Tensors],
    rank: int | None,
) -> dict[str, str]:
    """The source's, but for what isn't true any more; of several what is said of the base."""
    first = files[0][0].metadata
    stale = ("sshs_", METADATA_KEY)
    carried = {key: value for key, value in first.items() if not key.startswith(stale)}
    if len(files) == 1 and files[0][1] == 1 and rank is None:
        return carried
    if len(files) > 1:
        carried = {key: value for key, value in carried.items() if key in _OF_BASE}
    names = " + ".join(f"{file.path.name} at {_said(weight)}" for file, weight in files)
    found = {**carried, "ss_training_comment": f"combined by lorasweep: {names}"}
    if all(algorithm(tensors) == "lora" for tensors in sites.values()):
        ranks = {
            (int(t["lora_down.weight"].shape[0]), has_kernel(t["lora_down.weight"].shape))
            for t in sites.values()
        }
        found = {k: v for k, v in found.items() if k != "ss_network_args"}
        found |= metadata(ranks, rank is not None)
    return found


def _said(weight: Weight) -> str:
    if isinstance(weight, int | float):
        return f"{weight:g}"
    blocks = ", ".join(f"block {n}: {value:g}" for n, value in weight.blocks.items())
    return f"(unet: {weight.unet:g}, te: {weight.te:g}{', ' if blocks else ''}{blocks})"
