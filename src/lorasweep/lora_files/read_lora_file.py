"""Any LoRA file, whatever program wrote it: read, checked, under kohya's names."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorasweep.adapters.kohya_names import by_site
from lorasweep.adapters.unet_blocks import MAX_RANK
from lorasweep.adapters.weight_deltas import algorithm, has_magnitude, low_rank_delta, rank_of
from lorasweep.core.atomic_write import TargetError, check_free
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.text import shown
from lorasweep.lora_files import checkpoint
from lorasweep.lora_files.kohya_form import kohya_form
from lorasweep.lora_files.peft_config import METADATA_KEY
from lorasweep.lora_files.site_names import ROLES
from lorasweep.models.base_model import BaseModel

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

Writer = Literal["kohya", "LyCORIS", "PEFT", "diffusers", "OneTrainer", "lorasweep", "unknown"]

FACTORED = ("lora", "loha", "lokr")
"""Algorithms whose delta the file alone gives (`low_rank_delta`)."""
MAX_WEIGHT = 2**27  # values of one delta; SDXL's largest weight has a tenth

_LYCORIS_NAMES = re.compile(r"(_|^)(conv_in|conv_out|time_embedding_linear_[12])$")
_DIFFUSERS = re.compile(r"_lora\.(down|up)\.|\.processor\.|\.lora_linear_layer\.")
_READERS = re.compile(r"lora_unet_\w+_attn2_to_[kv]$")
_TEXT_READERS = re.compile(r"lora_te1?_\w+_(q_proj|k_proj|v_proj|fc1)$")
_SDXL = re.compile(r"lora_te2_|lora_unet_\w*(transformer_blocks_[1-9]|add_embedding|label_emb)")
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
    family: str | None = None
    """Another than Stable Diffusion 1.x, 2.x and SDXL, such as Flux: then only `info` takes it."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """What of the file is not among the tensors, in words, and how many of it."""

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

        768 is Stable Diffusion 1.x, 1024 2.x, 2048 SDXL, 128 the embedded model. SDXL's own names
        tell it too; of its first text encoder alone it is 768.
        """
        if self.family is not None:
            return None
        if any(_SDXL.match(key) for key in self.sites):
            return 2048
        for readers in (_READERS, _TEXT_READERS):
            for key, site in self.sites.items():
                if readers.match(key) and (shape := weight_shape(site)) is not None:
                    return shape[1]
        return None

    @property
    def is_text_only(self) -> bool:
        """Does it adapt text encoders alone?"""
        return not any(key.startswith("lora_unet_") for key in self.sites)

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


def read(path: Path, base: BaseModel | None = None) -> LoRAFile:
    """Read and check a LoRA file of any program; what of it can't be used is told in a warning.

    With a `base` its tensors are under the keys of the base's sites: SDXL has other names for them
    than kohya's files. Raises CheckpointError for a file that is cut, lies about itself, or holds
    no LoRA of Stable Diffusion.
    """
    file = read_any(path, base)
    if file.family is not None:
        raise CheckpointError(
            f"{path} is a LoRA of {file.family}: only those of Stable Diffusion 1.x, 2.x and SDXL"
            " are read"
        )
    if file.left_out:
        listed = ", ".join(f"{count} {what}" for what, count in file.left_out.items())
        _warn(f"{path}: left out: {listed}")
    if file.written_by == "PEFT" and METADATA_KEY not in file.metadata:
        _warn(f"{path}: no {_ADAPTER_CONFIG} beside it says alpha, so it is taken to be the rank")
    return file


def read_any(path: Path, base: BaseModel | None = None) -> LoRAFile:
    """As `read`, also of another family, and without a warning: for what only describes a file."""
    tensors, metadata = checkpoint.read(path)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    metadata = with_config(path, metadata)
    try:
        found = kohya_form(tensors, metadata, base)
        for key, site in by_site(found.tensors).items():
            _check_site(key, site)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    writer = _writer(tensors, metadata)
    return LoRAFile(
        path, _with_alphas(found.tensors), metadata, writer, found.family, found.left_out
    )


@cache
def _warn(text: str) -> None:
    log.warning(text)  # once, however often a command reads the file


def weight_shape(site: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """Shape of the weight that a site's LoRA, LoHa, LoKr or full difference belongs to.

    Of LoKr's factored convolutions the kernel is flat: (out, in * kh * kw). None for other types.
    """
    kind = algorithm(site)
    if kind == "full":
        return tuple(site["diff"].shape)
    if kind not in FACTORED:
        return None
    on_meta = {name: t.to("meta") for name, t in site.items() if name in ROLES[kind]}
    return tuple(low_rank_delta(on_meta).shape)  # computes shapes, no values


def _kind(site: Mapping[str, Tensor]) -> str:
    found = algorithm(site)
    assert found is not None, "read refuses sites of no known type"
    return "dora" if found == "lora" and has_magnitude(site) else found


def _check_site(key: str, site: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless a site's tensors fit each other."""
    if "alpha" in site and site["alpha"].numel() != 1:
        shape = tuple(site["alpha"].shape)
        raise CheckpointError(f"{shown(key)}: alpha must be one number, it is {shape}")
    if algorithm(site) in FACTORED:
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
        elif algorithm(site) == "lokr":  # of two whole factors: its scale is 1 with any alpha
            found[f"{key}.alpha"] = torch.tensor(1.0)
    return found


def with_config(path: Path, metadata: dict[str, str]) -> dict[str, str]:
    """A file's metadata with PEFT's config, which is in a file of its own.

    Raises CheckpointError for a config that is too large to be one.
    """
    config = path.with_name(_ADAPTER_CONFIG)
    if path.stem != "adapter_model" or not config.is_file():
        return metadata
    if config.stat().st_size > 1_000_000:
        raise CheckpointError(f"{config} is too large to be PEFT's")
    return {METADATA_KEY: config.read_text(errors="replace"), **metadata}


def _writer(names: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Writer:
    if "lorasweep_version" in metadata:
        return "lorasweep"
    if any(name.startswith("base_model.model.") for name in names):
        return "PEFT"
    if "ot_branch" in metadata or any(name.startswith("bundle_emb.") for name in names):
        return "OneTrainer"
    module = metadata.get("ss_network_module", "")
    is_flat = all(name.startswith(("lora_", "lycoris_")) for name in names)
    if module.startswith("lycoris") or (is_flat and _is_lycoris(names)):
        return "LyCORIS"
    if is_flat:
        return "kohya"
    parts = ("unet.", "text_encoder.", "text_encoder_2.", "transformer.")
    is_diffusers = any(_DIFFUSERS.search(name) or name.startswith(parts) for name in names)
    return "diffusers" if is_diffusers else "unknown"


def _is_lycoris(names: Mapping[str, Tensor]) -> bool:
    """kohya's own networks know plain LoRA only, and none of the UNet's outer modules."""
    for name in names:
        if name.startswith("lycoris_"):
            return True
        key, _, below = name.partition(".")
        if below not in ("lora_down.weight", "lora_up.weight", "alpha"):
            return True
        if _LYCORIS_NAMES.search(key):
            return True
    return False
