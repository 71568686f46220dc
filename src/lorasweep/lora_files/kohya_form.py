"""The tensors of a LoRA file of any program in kohya's form: its names, an alpha at each site."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasweep.adapters.kohya_names import by_site
from lorasweep.adapters.weight_deltas import algorithm, lokr_factors, rank_of, scale_of
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.text import shown
from lorasweep.lora_files import site_names
from lorasweep.lora_files.peft_config import PEFTConfig
from lorasweep.lora_files.site_names import BESIDE, ROLES, TEXT_2, UNET, Name
from lorasweep.models.sdxl import Base, SDXLModel

if TYPE_CHECKING:
    from torch import Tensor

_OF_AN_ADAPTER = re.compile(
    r"\.(lora|hada|lokr|oft|boft|vera)_\w+(\.|$)|\.(scale|scalar)$"  # factors of old LyCORIS
)
_SDXL = re.compile(r"transformer_blocks_[1-9]|label_emb_|add_embedding_")
_UNKNOWN = "tensors of unknown names"
_WHOLE = "weights that would stand in place of the base's"  # PEFT's bias and modules_to_save
_EMBEDDINGS = ("token_embedding", "position_embedding")


@dataclass(frozen=True)
class KohyaForm:
    """A file's tensors under kohya's names, and what is not among them."""

    tensors: Mapping[str, Tensor]
    family: str | None
    """Which other family than Stable Diffusion 1.x, 2.x and SDXL it is of; None: of none."""
    left_out: Mapping[str, int]
    """What was left out, in words, and how many of it."""


def kohya_form(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], base: Base | None = None
) -> KohyaForm:
    """A file's tensors under kohya's names; with a `base` under the keys of its sites.

    Without a base the UNet's modules stay in the file's own layout. Raises CheckpointError for a
    name that would change what the others mean, for a PEFT adapter that is no sum with the base's
    weights, and where no name is known.
    """
    config = PEFTConfig(metadata)
    config.check()
    family = site_names.family({name: tuple(t.shape) for name, t in tensors.items()})
    named = {name: _meaning(name, family) for name in tensors}
    known = {name: meaning for name, meaning in named.items() if meaning is not None}
    key_of = _keys({name: (meaning, tensors[name]) for name, meaning in known.items()}, base)
    left_out = Counter(_why_unknown(name) for name in tensors if name not in known)
    found: dict[str, Tensor] = {}
    given: dict[str, dict[str, tuple[str, Name]]] = {}  # by site and role
    empty = set()
    for name, meaning in known.items():
        key, tensor = key_of[name], tensors[name]
        if meaning.path.endswith(_EMBEDDINGS):
            left_out["changes of the text encoder's embeddings"] += 1
        elif not tensor.numel():
            empty.add(key)
        elif tensor.numel() > 1 and not tensor.is_floating_point():
            raise CheckpointError(f"{shown(name)} holds whole numbers, which no weights are")
        elif f"{key}.{meaning.role}" in found:
            raise CheckpointError(f"{shown(name)} is there twice, under two names")
        else:
            found[f"{key}.{meaning.role}"] = tensor
            given.setdefault(key, {})[meaning.role] = name, meaning
    result: dict[str, Tensor] = {}
    for key, site in by_site(found).items():
        site = _of_norms(site)
        kind = algorithm(site)
        if kind is None and key in empty and set(site) <= {"alpha"}:
            continue
        for role in _beside(key, kind, set(site)):
            left_out[_WHOLE if role == "weight" else _UNKNOWN] += 1
            del site[role]
        if kind is not None:
            done = _site(kind, site, list(given[key].values()), config)
            result |= {f"{key}.{role}": tensor for role, tensor in done.items()}
    if empty:
        left_out["modules of rank 0"] = len(empty)
    if not result:
        first = ", ".join(shown(name) for name in sorted(tensors)[:2])
        raise CheckpointError(f"{first}: no names of a LoRA of Stable Diffusion")
    if isinstance(base, SDXLModel):
        result = base.named(result)
    return KohyaForm(result, family, dict(left_out))


def _meaning(name: str, family: str | None) -> Name | None:
    meaning = site_names.parsed(name)
    return replace(meaning, part=None) if meaning is not None and family else meaning


def _keys(known: Mapping[str, tuple[Name, Tensor]], base: Base | None) -> dict[str, str]:
    """kohya's name of each tensor's site; SDXL's keep the original layout, which its base maps."""
    is_sdxl = isinstance(base, SDXLModel) if base is not None else _is_sdxl(known)
    layers = None if base is None or isinstance(base, SDXLModel) else base.unet_layers
    return {
        name: meaning.key(is_sdxl=is_sdxl, layers=layers) for name, (meaning, _) in known.items()
    }


def _is_sdxl(known: Mapping[str, tuple[Name, Tensor]]) -> bool:
    """By a second text encoder, by modules that only SDXL has, or by the width of the text."""
    for meaning, tensor in known.values():
        if meaning.part == TEXT_2 or (meaning.part == UNET and _SDXL.search(meaning.path)):
            return True
        is_cross = meaning.path.endswith(("attn2_to_k", "attn2_to_v"))
        if is_cross and meaning.role == "lora_down.weight" and tensor.shape[-1] == 2048:
            return True
    return False


def _why_unknown(name: str) -> str:
    """In words, why a tensor is left out. Raises CheckpointError where it must not be."""
    if name.startswith("bundle_emb."):
        return "bundled embeddings"
    if name.endswith(".bias"):
        return _WHOLE
    if match := _OF_AN_ADAPTER.search(name):
        raise CheckpointError(
            f"{shown(name)} is of no type that is read, and without {match[0].strip('.')} the"
            " others can't be right"
        )
    return _UNKNOWN


def _beside(key: str, kind: str | None, roles: set[str]) -> set[str]:
    """Those of a site's tensors that say nothing. Raises CheckpointError for a mixture."""
    own = ROLES[kind] | BESIDE | {"lora_up.bias"} if kind else set()
    mute = roles - own
    if strange := mute - {"weight", "alpha", "dora_scale"}:
        whole = f"belongs to no {kind}" if kind else "is half of an adapter, whose rest is missing"
        raise CheckpointError(f"{shown(key)}: {shown(min(strange))} {whole}")
    return mute


def _of_norms(site: dict[str, Tensor]) -> dict[str, Tensor]:
    """A difference of a norm's weights under LyCORIS's names; ComfyUI calls it like any other."""
    if "diff" not in site or site["diff"].dim() != 1:
        return site
    return {{"diff": "w_norm", "diff_b": "b_norm"}.get(n, n): t for n, t in site.items()}


def _site(
    kind: str, site: Mapping[str, Tensor], names: list[tuple[str, Name]], config: PEFTConfig
) -> dict[str, Tensor]:
    """A site's tensors with what PEFT keeps elsewhere or in other shapes."""
    import torch

    done = dict(site)
    if "dora_scale" in site and "lora_down.weight" in site:
        is_pefts = any("lora_magnitude_vector" in name for name, _ in names)
        if is_pefts or site["dora_scale"].dim() == 1:  # LyCORIS has (out, 1), (out, 1, 1, 1)
            ones = [1] * (site["lora_down.weight"].dim() - 1)
            done["dora_scale"] = site["dora_scale"].reshape(-1, *ones)
    if kind not in ("lora", "loha", "lokr"):
        return done
    rank = rank_of(site)
    scale = config.scale(names[0][1], kind, rank)
    if "alpha" not in site and rank is not None:
        done["alpha"] = torch.tensor(scale * rank)
    if "alpha" not in site and rank is None and scale != 1 and "lokr_w1" in site:
        done["lokr_w1"] = site["lokr_w1"].float() * scale  # no alpha would be divided by a rank
    if {"lokr_t2", "lokr_w2_a", "lokr_w2_b"} <= set(site):
        done = _without_core(done)
    if "lora_up.bias" in site:
        done["diff_b"] = done.pop("lora_up.bias").float() * scale
    return done


def _without_core(site: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoKr's second factor multiplied out of its Tucker form, whose ranks LyCORIS reads wrong."""
    numbers = {name: tensor.float() for name, tensor in site.items()}
    _, right = lokr_factors({"lokr_w1": numbers["lokr_t2"], **numbers})
    if "lokr_w1" in site:  # two whole factors have no rank that alpha would be divided by
        right = right * scale_of(site)
    own = {n: t for n, t in site.items() if n not in ("lokr_t2", "lokr_w2_a", "lokr_w2_b")}
    return {**own, "lokr_w2": right}
