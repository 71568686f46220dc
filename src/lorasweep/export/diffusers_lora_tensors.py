"""The tensors of any LoRA file in a form that diffusers reads right.

diffusers reads kohya's names of a plain LoRA only. DoRA goes to PEFT's names exactly (diffusers
drops kohya's `dora_scale` with a warning and draws wrong); the rest is approximated by SVD.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from lorasweep.adapters.kohya_names import every_norm, every_site
from lorasweep.adapters.pack import check_fit, file_delta
from lorasweep.adapters.weight_deltas import Tensors, algorithm, has_magnitude, low_rank_delta
from lorasweep.core.text import shown
from lorasweep.export import svd
from lorasweep.export.exported import ExportError
from lorasweep.lora_files import peft_names
from lorasweep.lora_files.read_lora_file import FACTORED, LoRAFile
from lorasweep.models.base_model import BaseModel

if TYPE_CHECKING:
    from torch import Tensor

    from lorasweep.adapters.adapter import Site

How = Literal["as it is", "converted", "approximated"]

REMEDY = "export --to merged instead, which is exact"


def convert(
    file: LoRAFile, base: BaseModel, rank: int | None
) -> tuple[Mapping[str, Tensor], How, svd.Loss | None]:
    """Tensors that diffusers reads right, what was done, and what approximations lost.

    The base's weights count where there are magnitudes. Raises ExportError, naming the remedy, for
    what has no such form.
    """
    if diffusers_reads(file, base):
        return file.tensors, "as it is", None
    known = every_site(base.parts) | every_norm(base.parts)
    sites: dict[str, dict[str, Tensor]] = {}
    kept: dict[str, tuple[float, float]] = {}
    for key, tensors in file.sites.items():
        if key not in known:
            raise ExportError(f"{shown(key)}: the base model has no such module")
        exact = _exact(tensors)
        if exact is None:
            exact, kept[key] = _approximated(known[key], tensors, rank)
        sites[key] = exact
    named = {
        f"{key}.{name}": tensor
        for key, site in _uniform(sites, known).items()
        for name, tensor in site.items()
    }
    loss = svd.Loss.of(kept) if kept else None
    return peft_names.to_peft(named), ("approximated" if loss else "converted"), loss


def diffusers_reads(file: LoRAFile, base: BaseModel) -> bool:
    """Does diffusers read kohya's names of this file right?

    Not of the original layout, SDXL's, where it leaves modules out.
    Only of plain LoRAs, and only if all have one alpha: diffusers 0.42 looks others up under names
    that no module has, and takes the most common one instead. An out_proj tells it that the text
    encoder's attention is kohya's; beside an MLP alone it leaves the attention out.
    """
    if base.kohya_names:
        return False
    sites = file.sites.values()
    plain = all(set(s) == {"lora_down.weight", "lora_up.weight", "alpha"} for s in sites)
    text = [key for key in file.sites if key.startswith("lora_te")]
    told = any(key.endswith("_out_proj") for key in text)
    known = told or all(key.endswith(("_fc1", "_fc2")) for key in text)
    return plain and known and len({float(site["alpha"]) for site in sites}) == 1


def _exact(tensors: Tensors) -> dict[str, Tensor] | None:
    """The site as a plain LoRA, maybe with magnitudes of outputs; None if it is no such thing."""
    if (
        algorithm(tensors) != "lora"
        or "diff_b" in tensors
        or (has_magnitude(tensors) and not _of_outputs(tensors))
    ):
        return None
    plain = dict(tensors)
    if "lora_mid.weight" in plain:  # Tucker's core goes into the down projection
        import torch

        core, down = plain.pop("lora_mid.weight"), plain["lora_down.weight"]
        product = torch.einsum("rskl,si->rikl", core.float(), down.flatten(1).float())
        plain["lora_down.weight"] = product.to(down.dtype)
    return plain


def _of_outputs(tensors: Tensors) -> bool:
    """LyCORIS's wd_on_output: a magnitude for each output, (out, 1); of inputs it is (1, in)."""
    scale = tensors["dora_scale"]
    return scale.dim() == 1 or scale.shape[0] == scale.numel()


def _approximated(
    module: Site, tensors: Tensors, rank: int | None
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """The best LoRA of `rank`, and the (kept, whole) squared norm of the change."""
    kind = _described(tensors)
    if algorithm(tensors) not in (*FACTORED, "full") or "diff_b" in tensors:
        raise ExportError(f"{shown(module.key)} is of {kind}, which no LoRA can be: {REMEDY}")
    if rank is None:
        raise ExportError(
            f"{shown(module.key)} is of {kind}, which diffusers can't load: give a rank to"
            f" approximate it by a LoRA (--rank 64), or {REMEDY}"
        )
    if has_magnitude(tensors):
        check_fit(module, tensors)
        found = svd.of_matrix(file_delta(module, tensors).flatten(1))
    else:
        found = svd.spectrum(tensors)
    site = found.as_lora(rank, module.weight.shape, svd.dtype_of(tensors))
    return site, (found.squared(rank), found.squared())


def _described(tensors: Tensors) -> str:
    kind = {
        "lora": "DoRA of inputs",
        "loha": "LoHa",
        "lokr": "LoKr",
        "full": "a full difference",
        "norm": "a norm's difference",
        "bias": "a bias's difference",
    }
    if "diff_b" in tensors:
        return kind["bias"]
    name = algorithm(tensors) or "no type"
    return kind.get(name, name.upper()) + (" with magnitudes" if has_magnitude(tensors) else "")


def _uniform(
    sites: Mapping[str, dict[str, Tensor]], known: Mapping[str, Site]
) -> dict[str, dict[str, Tensor]]:
    """Magnitudes for all of a part's sites or none, and one rank: PEFT has one config for a part.

    A padded rank is zero, so nothing changes; older diffusers scale mixed ranks wrongly.
    """
    result: dict[str, dict[str, Tensor]] = {}
    for part in {known[key].part for key in sites}:
        members = {key: site for key, site in sites.items() if known[key].part == part}
        weighted = any(has_magnitude(site) for site in members.values())
        rank = max(int(site["lora_down.weight"].shape[0]) for site in members.values())
        for key, site in members.items():
            if weighted and not has_magnitude(site):
                site = site | {"dora_scale": _own_magnitude(known[key], site)}
            result[key] = _padded(site, rank)
    return {key: result[key] for key in sites}


def _own_magnitude(module: Site, site: Tensors) -> Tensor:
    """The magnitude that leaves a plain LoRA as it is: the norm of its own sum with the weight."""
    weight = module.weight.float()
    summed = weight + low_rank_delta(site, weight.shape)
    return summed.flatten(1).norm(dim=1)


def _padded(site: Tensors, rank: int) -> dict[str, Tensor]:
    import torch

    down, up, alpha = (site[n] for n in ("lora_down.weight", "lora_up.weight", "alpha"))
    own = int(down.shape[0])
    if own == rank:
        return dict(site)
    return {
        **site,
        "lora_down.weight": torch.cat([down, down.new_zeros(rank - own, *down.shape[1:])]),
        "lora_up.weight": torch.cat(
            [up, up.new_zeros(up.shape[0], rank - own, *up.shape[2:])], dim=1
        ),
        "alpha": alpha * (rank / own),
    }
