"""SDXL as a base that LoRAs are drawn with and merged into. Training SDXL comes later.

kohya trains SDXL on the original UNet, so its files name the modules by that layout, such as
input_blocks_4_1_proj_in, and the text encoders' lora_te1 and lora_te2. Other programs name the
UNet's as diffusers does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.text import shown
from lorasweep.models.base_model import BaseModel
from lorasweep.models.model_settings import ModelSettings
from lorasweep.models.noise_schedule import NoiseSchedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class SDXLModel:
    """A loaded, frozen SDXL in fp32, with what drawing and merging ask of a base model."""

    settings: ModelSettings
    pipeline: Any
    """diffusers' StableDiffusionXLPipeline."""
    original_unet_paths: Mapping[str, str]
    """Dotted paths of the UNet's modules by those in the original layout."""

    @property
    def unet(self) -> Any:
        """diffusers' UNet2DConditionModel."""
        return self.pipeline.unet

    @property
    def parts(self) -> dict[str, tuple[str, torch.nn.Module]]:
        """What adapters attach to: part -> (prefix of its names in files, module)."""
        first = self.pipeline.text_encoder
        return {
            # transformers 5 dropped the text_model. level of the first that files' names have
            "text_encoder": ("lora_te1_text_model", getattr(first, "text_model", first)),
            "text_encoder_2": ("lora_te2", self.pipeline.text_encoder_2),
            "unet": ("lora_unet", self.unet),
        }

    @cached_property
    def noise_schedule(self) -> NoiseSchedule:
        """The noise schedule, as the settings change it."""
        config = dict(self.pipeline.scheduler.config)
        if self.settings.prediction_type is not None:
            config["prediction_type"] = self.settings.prediction_type
        return NoiseSchedule(config)

    @property
    def native_side(self) -> int:
        """Pixels a side of the pictures that it was trained on."""
        return int(self.unet.config.sample_size) * self.vae_scale_factor

    @property
    def text_width(self) -> int:
        """Width of the prompt embeddings."""
        return int(self.unet.config.cross_attention_dim)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a side of one latent."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def size_multiple(self) -> int:
        """Pixels of which width and height must be a multiple."""
        return int(self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1))

    @cached_property
    def keys_by_kohyas(self) -> Mapping[str, str]:
        """Keys of the UNet's sites by kohya's names of them."""
        return {_key(original): _key(path) for original, path in self.original_unet_paths.items()}

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A LoRA file's tensors under the keys of this model's sites. Raises CheckpointError."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            key, _, below = name.partition(".")
            if key.startswith("lora_te_"):  # a file of the first text encoder alone
                key = key.replace("lora_te_", "lora_te1_", 1)
            new = f"{self.keys_by_kohyas.get(key, key)}.{below}"
            if new in found:
                raise CheckpointError(f"{shown(name)} is there twice, under two names")
            found[new] = tensor
        return found


Base = BaseModel | SDXLModel
"""A base model that LoRAs are drawn with and merged into."""


def _key(path: str) -> str:
    return f"lora_unet_{path.replace('.', '_')}"
