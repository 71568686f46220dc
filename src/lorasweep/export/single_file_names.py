"""Names of a Stable Diffusion 1.x model's tensors in diffusers and in the original single file.

The original layout is CompVis's (latent-diffusion), which A1111, ComfyUI and kohya read. All names
are derived from the structure that the model's configs describe, so any model of this architecture
converts, whatever its number of levels and layers. diffusers itself reads single files (and reads
back what is written here), but its package has no way to write one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lorasweep.models.model_files import ModelError
from lorasweep.models.original_unet import original_name, plain_up_levels

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, Mapping[str, "Tensor"]]
"""A model's tensors: unet, vae, text_encoder and SDXL's text_encoder_2, by diffusers' names.

The text encoders' have the `text_model.` that transformers 5 has dropped, as all files' have.
"""

PREFIXES = {
    "text_encoder": "cond_stage_model.transformer.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
}
"""What the parts' names begin with in a single file."""

_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OLD_VAE_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
"""As diffusers named them before 0.18, and as SD1.5's own folder still does."""


@dataclass(frozen=True)
class ModelLayout:
    """Every tensor of a model of a given structure: its two names and its shape in diffusers."""

    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    """By part and diffusers' name."""
    num_unet_layers: int
    """Residual blocks of a level."""
    num_vae_levels: int

    @classmethod
    def from_modules(
        cls, unet: Any, vae: Any, text_encoder: Any, text_encoder_2: Any = None
    ) -> ModelLayout:
        """The layout of these modules; their weights don't matter. Raises ModelError.

        With a second text encoder it is SDXL's.
        """
        if unet.config.use_linear_projection and text_encoder_2 is None:
            raise ModelError("it is a Stable Diffusion 2 model: only 1.x has this layout")
        layers = unet.config.layers_per_block
        if not isinstance(layers, int):
            raise ModelError(f"a UNet with layers_per_block={layers} has no original layout")
        text = {prefixed(name): value for name, value in text_encoder.state_dict().items()}
        parts = {"text_encoder": text, "unet": unet.state_dict(), "vae": vae.state_dict()}
        if text_encoder_2 is not None:
            parts["text_encoder_2"] = text_encoder_2.state_dict()
        shapes = {
            part: {name: tuple(value.shape) for name, value in tensors.items()}
            for part, tensors in parts.items()
        }
        return cls(shapes, layers, len(vae.config.block_out_channels))

    @property
    def is_sdxl(self) -> bool:
        """Is it SDXL's, which has no single-file form here yet?"""
        return "text_encoder_2" in self.shapes

    @cached_property
    def original(self) -> Mapping[str, tuple[str, str]]:
        """Part and diffusers' name by the name in a single file."""
        table = {
            PREFIXES[part] + self._original_name(part, name): (part, name)
            for part, names in self.shapes.items()
            for name in names
        }
        assert len(table) == sum(len(names) for names in self.shapes.values()), "names collide"
        return table

    def original_shape(self, part: str, name: str) -> tuple[int, ...]:
        """The shape that a tensor has in a single file: the VAE's attention is 1x1 convolutions."""
        shape = self.shapes[part][name]
        return (*shape, 1, 1) if _is_vae_attention(part, name) and len(shape) == 2 else shape

    def to_original(self, weights: Weights) -> dict[str, Tensor]:
        """A model's tensors as a single file holds them."""
        return {
            original: weights[part][name].reshape(self.original_shape(part, name))
            for original, (part, name) in self.original.items()
        }

    def to_diffusers(self, tensors: Mapping[str, Tensor]) -> tuple[Weights, list[str]]:
        """A single file's tensors by part, and the names that have no place in this layout."""
        weights: dict[str, dict[str, Tensor]] = {part: {} for part in self.shapes}
        leftover = []
        for given, tensor in tensors.items():
            if place := self.original.get(_prefixed_in_file(given)):
                part, name = place
                weights[part][name] = _flattened(part, name, tensor)
            else:
                leftover.append(given)
        return weights, leftover

    def check(self, weights: Weights) -> None:
        """Raise ModelError unless every tensor is there in its shape."""
        for part, shapes in self.shapes.items():
            missing = [name for name in shapes if name not in weights[part]]
            if missing:
                raise ModelError(
                    f"{len(missing)} of the {part}'s {len(shapes)} tensors are missing, first"
                    f" {missing[0]}: it is not a whole"
                    f" {'SDXL' if self.is_sdxl else 'Stable Diffusion 1.x'} model"
                )
            for name, shape in shapes.items():
                found = tuple(weights[part][name].shape)
                if found != shape:
                    raise ModelError(
                        f"the {part}'s {name} has the shape {found}, but the configs say {shape}:"
                        " take the configs of a model of the same architecture"
                    )

    @cached_property
    def _plain_up_levels(self) -> frozenset[int]:
        return plain_up_levels(self.shapes["unet"])

    def _original_name(self, part: str, name: str) -> str:
        if part == "unet":
            found = original_name(name, self.num_unet_layers, self._plain_up_levels)
            if found is None:
                raise ModelError(f"the unet's {name} has no place in Stable Diffusion 1.x's layout")
            return found
        return _vae_name(name, self.num_vae_levels) if part == "vae" else name


def prefixed(name: str) -> str:
    """A text encoder's name with the `text_model.` level that transformers 5 has dropped."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def modern_name(part: str, name: str) -> str:
    """Today's name of a part's tensor, which older folders call otherwise."""
    if part == "text_encoder":
        return prefixed(name)
    match = re.fullmatch(r"(.+\.attentions\.\d+\.)(\w+)(\.\w+)", name) if part == "vae" else None
    if match is None or match[2] not in _OLD_VAE_ATTENTION:
        return name
    return f"{match[1]}{_OLD_VAE_ATTENTION[match[2]]}{match[3]}"


def _flattened(part: str, name: str, tensor: Tensor) -> Tensor:
    """The VAE's attention as Linear; some programs write it so into single files too."""
    if _is_vae_attention(part, name) and tensor.dim() == 4 and tensor[0, 0].numel() == 1:
        return tensor.flatten(1)
    return tensor


def _prefixed_in_file(name: str) -> str:
    """Some files lack the text encoder's `text_model.`."""
    prefix = PREFIXES["text_encoder"]
    return prefix + prefixed(name[len(prefix) :]) if name.startswith(prefix) else name


def _is_vae_attention(part: str, name: str) -> bool:
    return part == "vae" and ".attentions." in name and name.endswith(".weight")


def _vae_name(name: str, levels: int) -> str:
    def up(match: re.Match[str]) -> str:
        return (
            f"up.{levels - 1 - int(match[1])}."  # counted from the coarsest here, the finest there
        )

    name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d+)\.", up, name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"(down|up)samplers\.0\.", r"\1sample.", name)
    name = name.replace("resnets.", "block.").replace("mid_block.attentions.0.", "mid.attn_1.")
    for ours, original in _VAE_ATTENTION.items():
        name = name.replace(f"attn_1.{ours}.", f"attn_1.{original}.")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
