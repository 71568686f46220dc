"""What Stable Diffusion 1.x and SDXL share: a UNet that denoises latents of an AutoencoderKL."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.core import kohya_hashes
from lorasweep.models.base_model import Precision, torch_dtype
from lorasweep.models.model_settings import ModelSettings
from lorasweep.models.noise_schedule import NoiseSchedule
from lorasweep.models.original_unet import original_name, plain_up_levels

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True)
class LatentDiffusion:
    """To be inherited from by families, which say how prompts are encoded."""

    settings: ModelSettings
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    """In fp32 always: SDXL's overflows in fp16."""
    noise_schedule: NoiseSchedule
    device: str
    precision: Precision

    @property
    def text_encoders(self) -> Sequence[Any]:
        """transformers' text encoders."""
        raise NotImplementedError

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a side of one latent."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def size_multiple(self) -> int:
        """Pixels that a side has at least: the UNet halves the latents."""
        return int(self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.unet.config.in_channels)

    @property
    def latent_scale(self) -> float:
        """What the VAE's latents are multiplied by."""
        return float(self.vae.config.scaling_factor)

    @property
    def native_side(self) -> int:
        """Pixels a side of the pictures that it was trained on."""
        return int(self.unet.config.sample_size) * self.vae_scale_factor

    @property
    def text_width(self) -> int:
        """Width of the prompt embeddings."""
        return int(self.unet.config.cross_attention_dim)

    @property
    def unet_layers(self) -> int:
        """Residual blocks of a level of the UNet."""
        return int(self.unet.config.layers_per_block)

    @cached_property
    def original_names(self) -> Mapping[str, str]:
        """Names in files of the UNet's modules by the original layout, by those of diffusers'."""
        prefix = "lora_unet_"
        paths = [path for path, _ in self.unet.named_modules()]
        plain = plain_up_levels(paths)
        originals = {path: original_name(path, self.unet_layers, plain) for path in paths}
        return {
            prefix + path.replace(".", "_"): prefix + original.replace(".", "_")
            for path, original in originals.items()
            if original is not None
        }

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the UNet and the text encoders compute in `precision`."""
        import torch

        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, torch_dtype(self.precision))

    def rest_text_encoders(self) -> None:
        """Take them out of the device's memory until the next prompt is encoded."""
        for encoder in self.text_encoders:
            encoder.to("cpu")

    def wake_text_encoders(self) -> None:
        """Bring them back to the device, if they rest."""
        for encoder in self.text_encoders:
            encoder.to(self.device)

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass, for as long as the model lives."""
        self.unet.enable_gradient_checkpointing()
        self.unet.train()  # diffusers checkpoints in training mode only; nothing else differs
        for encoder in self.text_encoders:
            encoder.activation_checkpointing_enable()
            encoder.train()

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Latents (N, C, H/f, W/f) of pixels (N, 3, H, W) in -1..1: the posterior's scaled mode."""
        import torch

        with torch.no_grad(), self._in_fp32():
            posterior = self.vae.encode(pixels.to(self.device)).latent_dist
        latents: Tensor = posterior.mode() * self.vae.config.scaling_factor
        return latents

    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents (N, C, h, w)."""
        import torch
        from PIL import Image

        with torch.no_grad(), self._in_fp32():  # one at a time: the VAE takes gigabytes at 512 px
            scaled = latents.float() / self.vae.config.scaling_factor
            pixels = torch.cat([self.vae.decode(one[None]).sample for one in scaled])
        values = (pixels.nan_to_num() / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
        return [Image.fromarray(picture) for picture in values.permute(0, 2, 3, 1).cpu().numpy()]

    def _in_fp32(self) -> AbstractContextManager[Any]:
        """The context in which the VAE computes, wherever it is called from."""
        import torch

        return torch.autocast(torch.device(self.device).type, enabled=False)

    @cached_property
    def vae_identity(self) -> str:
        """sha256 over the VAE's weights with their names, and its scale: what latents depend on."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return f"{digest.hexdigest()} {self.vae.config.scaling_factor}"

    @cached_property
    def file_hashes(self) -> Mapping[str, str]:
        """kohya's hashes of the base's file; of a folder it has none and says IsADirectory."""
        if not self.settings.is_single_file:
            return {"ss_sd_model_hash": "IsADirectory", "ss_new_sd_model_hash": "IsADirectory"}
        with Path(self.settings.path).open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest()
            legacy = kohya_hashes.legacy_hash(file)
        return {"ss_sd_model_hash": legacy, "ss_new_sd_model_hash": whole}
