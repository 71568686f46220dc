"""Names of LoRA files as diffusers and PEFT write them, and their way to kohya's and back.

kohya:     lora_unet_down_blocks_0_…_attn1_to_q.lora_down.weight, alpha beside it
PEFT:      unet.down_blocks.0.….attn1.to_q.lora_A.weight, alpha in the file's metadata
diffusers: unet.down_blocks.0.….attn1.processor.to_q_lora.down.weight, and forms between

The libraries' converters aren't exact: diffusers' convert_state_dict_to_kohya takes the rank for
every alpha and calls SD1.x's text encoder lora_te1; its way back drops dora_scale, and alphas that
differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasweep.adapters.kohya_names import by_site
from lorasweep.adapters.weight_deltas import scale_of
from lorasweep.core.foreign_files import ForeignFileError, parse_json
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.text import shown

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's config in a file: JSON with keys such as unet.lora_alpha."""

_SUFFIX = re.compile(
    r"^(?P<path>.+?)(?P<form>\.lora_linear_layer|\.lora|_lora)?"
    r"\.(?P<role>lora_A|lora_B|down|up|lora_magnitude_vector)(?:\.[\w-]+)?(?:\.weight)?$"
)
_OTHER = re.compile(r"^(?P<path>.+\..+)\.(?P<name>alpha|lokr_\w+|hada_\w+)$")
_ROLES = {
    "lora_A": "lora_down.weight",
    "down": "lora_down.weight",
    "lora_B": "lora_up.weight",
    "up": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
}
_OLD_UNET = {"to_out": "to_out.0"}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_UNET_ROOTS = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding")
_TEXT_ROOTS = ("text_model", "encoder", "text_projection")
_WORDS = (
    "down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out"
    " time_emb_proj conv_shortcut conv_in conv_out time_embedding add_embedding linear_1 linear_2"
    " text_model self_attn q_proj k_proj v_proj out_proj text_projection"
)
_PIECE = re.compile(r"(?:%s)(?=_|$)|[^_]+" % "|".join(_WORDS.split()))  # noqa: UP031
_PARTS = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
}


def is_peft(names: Mapping[str, Any]) -> bool:
    """Are a file's names PEFT's or diffusers', not kohya's?"""
    return any(
        not name.startswith("lora_") and (_SUFFIX.match(name) or _OTHER.match(name))
        for name in names
    )


def from_peft(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The same adapter under kohya's names, with an alpha at each site.

    Without a config in `metadata` alpha is the rank, as diffusers takes it. Raises CheckpointError
    for a name that is neither's.
    """
    import torch

    config = _config(metadata)
    has_two = any(_without_wrapper(name).startswith("text_encoder_2.") for name in tensors)
    found: dict[str, Tensor] = {}
    places: dict[str, _Place] = {}
    for name, tensor in tensors.items():
        place, below = _place(name)
        key = place.key(has_two)
        places[key] = place
        if f"{key}.{below}" in found:
            raise CheckpointError(f"{shown(name)} is there twice, under two names")
        found[f"{key}.{below}"] = tensor
    for key, site in by_site(found).items():
        if "dora_scale" in site and "lora_down.weight" in site:
            found[f"{key}.dora_scale"] = _per_output(site["dora_scale"], site["lora_down.weight"])
        down = site.get("lora_down.weight", site.get("hada_w1_b"))
        if "alpha" not in site and down is not None:
            rank = int(down.shape[0])
            found[f"{key}.alpha"] = torch.tensor(_scale(config, places[key], rank) * rank)
    return found


def to_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA or DoRA of kohya's names under PEFT's, which diffusers loads; scales are folded in.

    Magnitudes must be of outputs, (out, 1) or (out, 1, 1, 1). The scale goes into lora_B in fp32
    and is rounded back to the file's type; raises CheckpointError where that overflows.
    """
    found: dict[str, Tensor] = {}
    for key, site in by_site(tensors).items():
        name = peft_path(key)
        down, up = site["lora_down.weight"], site["lora_up.weight"]
        found[f"{name}.lora_A.weight"] = down
        scaled = (up.float() * scale_of(site)).to(up.dtype)
        if not bool(scaled.isfinite().all()):
            raise CheckpointError(f"{key}: scaled by alpha / rank it is too large for {up.dtype}")
        found[f"{name}.lora_B.weight"] = scaled
        if "dora_scale" in site:
            magnitude = site["dora_scale"].flatten()
            is_conv = down.dim() == 4
            shape = (1, -1, 1, 1) if is_conv else (-1,)
            found[f"{name}.lora_magnitude_vector.weight"] = magnitude.reshape(shape)
    return found


def peft_path(key: str) -> str:
    """unet.down_blocks.0.… of lora_unet_down_blocks_0_…; raises CheckpointError for others."""
    prefix = next((p for p in sorted(_PARTS, reverse=True) if key.startswith(f"{p}_")), None)
    if prefix is None:
        raise CheckpointError(f"{shown(key)} is no name of Stable Diffusion's modules")
    rest = key.removeprefix(f"{prefix}_")
    return f"{_PARTS[prefix]}.{'.'.join(_PIECE.findall(rest))}"


@dataclass(frozen=True)
class _Place:
    part: str
    """unet, text_encoder or text_encoder_2."""
    path: str
    """The module's dotted path in the part, text_model. left out."""

    def key(self, has_two_text_encoders: bool) -> str:
        """kohya's name of the site."""
        flat = self.path.replace(".", "_")
        if self.part == "unet":
            return f"lora_unet_{flat}"
        number = "2" if self.part.endswith("_2") else "1" if has_two_text_encoders else ""
        level = "" if flat == "text_projection" else "text_model_"
        return f"lora_te{number}_{level}{flat}"


def _place(name: str) -> tuple[_Place, str]:
    """The site of a tensor of PEFT's or diffusers' name, and kohya's name below it."""
    bare = _without_wrapper(name)
    match = _SUFFIX.match(bare)
    other = _OTHER.match(bare)
    if other:
        return _located(name, other["path"], None), other["name"]
    if match is None or bare.endswith(".bias"):
        raise CheckpointError(f"{shown(name)} is no name of a LoRA's tensor")
    return _located(name, match["path"], match["form"]), _ROLES[match["role"]]


def _located(name: str, path: str, form: str | None) -> _Place:
    part, _, rest = path.partition(".")
    if part not in ("unet", "text_encoder", "text_encoder_2"):
        if part not in _UNET_ROOTS + _TEXT_ROOTS:
            raise CheckpointError(f"{shown(name)} names no part of Stable Diffusion")
        part, rest = ("unet" if part in _UNET_ROOTS else "text_encoder"), path
    rest = rest.replace(".processor.", ".").removeprefix("text_model.")
    if form == "_lora":
        head, _, last = rest.rpartition(".")
        renamed = (_OLD_UNET if part == "unet" else _OLD_TEXT).get(last, last)
        rest = f"{head}.{renamed}"
    elif part == "unet" and rest.endswith(".to_out"):
        rest += ".0"  # diffusers' old name of to_out's magnitudes
    return _Place(part, rest)


def _without_wrapper(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _per_output(magnitude: Tensor, down: Tensor) -> Tensor:
    """Magnitudes as LyCORIS keeps them: (out, 1), of convolutions (out, 1, 1, 1)."""
    return magnitude.reshape(-1, *[1] * (down.dim() - 1))


def _scale(config: Mapping[str, Any], place: _Place, rank: int) -> float:
    """alpha / rank at a site; rsLoRA (arXiv 2312.03732) divides by the root of the rank.

    The keys of PEFT's config are with or without the part in front.
    """
    own = {
        key.removeprefix(f"{place.part}."): value
        for key, value in config.items()
        if "." not in key or key.startswith(f"{place.part}.")
    }
    alpha = _number(own, "lora_alpha")
    pattern = own.get("alpha_pattern")
    if isinstance(pattern, dict):
        matching = [k for k in pattern if _names(k, place.path)]
        alpha = _number(pattern, max(matching, key=len)) if matching else alpha
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if own.get("use_rslora") is True else rank)


def _names(pattern: str, path: str) -> bool:
    """PEFT takes patterns as regular expressions; the ones it writes itself are ends of paths."""
    end = pattern.lstrip("^").removeprefix("text_model.")
    return path == end or (not pattern.startswith("^") and path.endswith(f".{end}"))


def _number(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)  # PEFT's config is not ours: any of its entries may be missing
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{METADATA_KEY}: {shown(name)} is {shown(repr(value))}, no number")
    return float(value)


def _config(metadata: Mapping[str, str]) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        return {}
    try:
        values: dict[str, Any] = parse_json(
            metadata[METADATA_KEY], f"{METADATA_KEY} in the file's metadata"
        )
        return values
    except ForeignFileError as error:
        raise CheckpointError(str(error)) from None
