"""Any LoRA file, whatever program wrote it: read, checked, under kohya's names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorasweep.adapters.kohya_names import by_site
from lorasweep.adapters.unet_blocks import MAX_RANK
from lorasweep.adapters.weight_deltas import algorithm, has_magnitude, low_rank_delta, rank_of
from lorasweep.core.atomic_write import TargetError, check_free
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.text import shown
from lorasweep.lora_files import checkpoint, peft_names
from lorasweep.models.sdxl import Base, SDXLModel

if TYPE_CHECKING:
    from torch import Tensor

Writer = Literal["kohya", "LyCORIS", "PEFT", "diffusers", "lorasweep", "unknown"]

FACTORED = ("lora", "loha", "lokr")
"""Algorithms whose delta the file alone gives (`low_rank_delta`)."""
MAX_WEIGHT = 2**27  # values of one delta; SDXL's largest weight has a tenth

_SITE = re.compile(r"^lora_(unet|te|te1|te2)_\w+$")
_LYCORIS_NAMES = re.compile(r"(_|^)(conv_in|conv_out|time_embedding_linear_[12])$")
_NAMES = {
    "lora": {"lora_down.weight", "lora_up.weight", "lora_mid.weight"},
    "loha": {f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "lokr": {f"lokr_{n}" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "full": {"diff", "diff_b"},
    "norm": {"w_norm", "b_norm"},
    "oft": {"oft_diag", "oft_blocks", "rescale"},
    "glora": {f"{name}.weight" for name in ("a1", "a2", "b1", "b2", "bm")},
    "ia3": {"on_input", "weight"},
    "tlora": {"q_layer.weight", "p_layer.weight", "lambda_layer"},
}
_READERS = ("attn2_to_k", "attn2_to_v")
_KERNEL_3 = (
    *("_conv", "_conv1", "_conv2", "_conv_in", "_conv_out", "_op"),
    *("_in_layers_2", "_out_layers_3", "_input_blocks_0_0", "_unet_out_2"),  # the original names
)
_KERNEL_1 = ("_conv_shortcut", "_skip_connection")
_ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class LoRAFile:
    """What a file holds."""

    path: Path
    tensors: Mapping[str, Tensor]
    """By kohya's names; every site of a low-rank type has an alpha."""
    metadata: Mapping[str, str]
    """As the file has it; PEFT's adapter_config.json beside it is under lora_adapter_metadata."""
    written_by: Writer
    """By its names and metadata; a plain LoRA stripped of metadata counts as kohya's."""

    @cached_property
    def sites(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by site key and name below it."""
        return by_site(self.tensors)

    @cached_property
    def algorithms(self) -> dict[str, str]:
        """lora, loha, lokr, full … by site key; `dora` where a LoRA has magnitudes."""
        return {key: _kind(site) for key, site in self.sites.items()}

    @cached_property
    def text_width(self) -> int | None:
        """Width of the text embeddings that the base's cross attention reads; None: can't tell.

        768 is Stable Diffusion 1.x, 1024 2.x, 2048 SDXL, 128 the embedded model.
        """
        if any(key.startswith(("lora_te1_", "lora_te2_")) for key in self.sites):
            return 2048
        for key, site in self.sites.items():
            is_cross = key.startswith("lora_unet_") and key.endswith(_READERS)
            if is_cross or key.endswith("self_attn_k_proj"):
                shape = weight_shape(site)
                return None if shape is None else shape[1]
        return None

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a site's weight; where the file keeps a kernel flat, by the module's name.

        Raises CheckpointError where neither tells.
        """
        found = weight_shape(self.sites[key])
        if found is None:
            raise CheckpointError(f"{shown(key)}: the file doesn't tell its shape")
        is_flat = self.algorithms[key] in ("loha", "lokr") and len(found) == 2
        if not is_flat or not key.startswith("lora_unet_"):
            return found
        if key.endswith(_KERNEL_3) and found[1] % 9 == 0:
            return found[0], found[1] // 9, 3, 3
        is_conv = key.endswith(_KERNEL_1)
        if key.endswith(("_proj_in", "_proj_out")):  # SD1.x's are convolutions, later ones linear
            if self.text_width is None:
                raise CheckpointError(f"{shown(key)}: the file doesn't tell what its base is")
            is_conv = self.text_width < 1024
        return (*found, 1, 1) if is_conv else found


def check_target(target: Path, overwrite: bool) -> None:
    """Raise TargetError unless a LoRA file may be written at `target`, and read again."""
    if target.suffix != ".safetensors":
        raise TargetError(f"{target}: give a name that ends in .safetensors")
    check_free(target, overwrite)


def read(path: Path, base: Base | None = None) -> LoRAFile:
    """Read and check a LoRA file of kohya, LyCORIS, diffusers, PEFT or ours.

    With a `base` its tensors are under the keys of the base's sites: SDXL has other names for them
    than kohya's files. Raises CheckpointError for a file that is cut, lies about itself, or holds
    no LoRA of Stable Diffusion.
    """
    tensors, metadata = checkpoint.read(path)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    metadata = _with_config(path, metadata)
    writer = _writer(tensors, metadata)
    try:
        if peft_names.is_peft(tensors):
            tensors = peft_names.from_peft(tensors, metadata)
        for key, site in by_site(tensors).items():
            _check_site(key, site)
        if isinstance(base, SDXLModel):
            tensors = base.named(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return LoRAFile(path, _with_alphas(tensors), metadata, writer)


def weight_shape(site: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """Shape of the weight that a site's LoRA, LoHa, LoKr or full difference belongs to.

    Of LoKr's factored convolutions the kernel is flat: (out, in * kh * kw). None for other types.
    """
    kind = algorithm(site)
    if kind == "full":
        return tuple(site["diff"].shape)
    if kind not in FACTORED:
        return None
    on_meta = {name: t.to("meta") for name, t in site.items() if name in _NAMES[kind]}
    return tuple(low_rank_delta(on_meta).shape)  # computes shapes, no values


def _kind(site: Mapping[str, Tensor]) -> str:
    found = algorithm(site)
    assert found is not None, "read refuses sites of no known type"
    return "dora" if found == "lora" and has_magnitude(site) else found


def _check_site(key: str, site: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the tensors are one type's and fit each other."""
    kind = algorithm(site)
    if not _SITE.match(key) or kind is None:
        names = ", ".join(shown(f"{key}.{name}") for name in sorted(site)[:2])
        raise CheckpointError(f"{names}: no names of a LoRA of Stable Diffusion")
    unknown = set(site) - _NAMES[kind] - {"alpha", "dora_scale"}
    if unknown:
        raise CheckpointError(f"{shown(key)}: {shown(min(unknown))} belongs to no {kind}")
    if "alpha" in site and site["alpha"].numel() != 1:
        shape = tuple(site["alpha"].shape)
        raise CheckpointError(f"{shown(key)}: alpha must be one number, it is {shape}")
    if kind in FACTORED:
        _check_factors(key, site)


def _check_factors(key: str, site: Mapping[str, Tensor]) -> None:
    try:
        shape = weight_shape(site)
    except (KeyError, IndexError, RuntimeError, ValueError):
        shape = None
    if shape is None or not _halves_agree(site):
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in sorted(site.items()) if t.dim())
        raise CheckpointError(f"{shown(key)}: factors don't fit each other: {shown(shapes)}")
    if math.prod(shape) > MAX_WEIGHT or (rank_of(site) or 0) > MAX_RANK:
        raise CheckpointError(f"{shown(key)}: no module is as large as {shape}")
    count = site["dora_scale"].numel() if "dora_scale" in site else 1
    if count != shape[0] and shape[1] % count:  # of outputs, or of inputs before a flat kernel
        raise CheckpointError(f"{shown(key)}: {count} magnitudes for a weight of {shape}")


def _halves_agree(site: Mapping[str, Tensor]) -> bool:
    """LoHa multiplies its halves value by value, where a 1 would be repeated without a word."""
    for name in ("_a", "_b"):
        if f"hada_w1{name}" in site:
            one, other = site[f"hada_w1{name}"].shape, site[f"hada_w2{name}"].shape
            dims = (0, 1) if "hada_t1" in site else ((0,) if name == "_a" else (1,))
            if any(one[dim] != other[dim] for dim in dims):
                return False
    return True


def _with_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Alphas as fp32 scalars; where there is none it is the rank, as every reader takes it."""
    import torch

    found = dict(tensors)
    for key, site in by_site(tensors).items():
        if "alpha" in site:
            found[f"{key}.alpha"] = site["alpha"].float().reshape(())
        elif (rank := rank_of(site)) is not None:
            found[f"{key}.alpha"] = torch.tensor(float(rank))
    return found


def _with_config(path: Path, metadata: dict[str, str]) -> dict[str, str]:
    """PEFT keeps its alpha in a file of its own."""
    config = path.with_name(_ADAPTER_CONFIG)
    if path.name != "adapter_model.safetensors" or not config.is_file():
        return metadata
    if config.stat().st_size > 1_000_000:
        raise CheckpointError(f"{config} is too large to be PEFT's")
    return {peft_names.METADATA_KEY: config.read_text(errors="replace"), **metadata}


def _writer(names: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Writer:
    if peft_names.is_peft(names):
        wrapped = any(name.startswith("base_model.model.") for name in names)
        return "PEFT" if wrapped else "diffusers"
    module = metadata.get("ss_network_module", "")
    if "lorasweep_version" in metadata:
        return "lorasweep"
    if module.startswith("lycoris") or _is_lycoris(names):
        return "LyCORIS"
    if all(name.startswith("lora_") for name in names):
        return "kohya"
    return "unknown"


def _is_lycoris(names: Mapping[str, Tensor]) -> bool:
    """kohya's own networks know plain LoRA only, and none of the UNet's outer modules."""
    for name in names:
        key, _, below = name.partition(".")
        if below not in ("lora_down.weight", "lora_up.weight", "alpha"):
            return True
        if _LYCORIS_NAMES.search(key):
            return True
    return False
