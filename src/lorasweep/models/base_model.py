"""BaseModel: the frozen base that adapters attach to, and all that it computes.

The only place that knows an architecture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lorasweep.core import kohya_hashes
from lorasweep.models.model_settings import ModelSettings
from lorasweep.models.noise_schedule import NoiseSchedule
from lorasweep.models.prompt_tokens import in_chunks, joined, weighted_ids, weighted_parts

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from PIL import Image
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTokenizer

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def torch_dtype(precision: Precision) -> torch.dtype:
    """torch's name of a precision."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


@dataclass(frozen=True)
class BaseModel:
    """A loaded, frozen base model of Stable Diffusion 1.x's layout."""

    settings: ModelSettings
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    noise_schedule: NoiseSchedule
    device: str
    precision: Precision

    @property
    def parts(self) -> dict[str, tuple[str, torch.nn.Module]]:
        """What adapters attach to: part -> (prefix of its names in files, module)."""
        return parts_of(self.text_encoder, self.unet)

    @property
    def base_model_version(self) -> str:
        """kohya's ss_base_model_version."""
        return "sd_v1_v" if self.prediction_type == "v_prediction" else "sd_v1"

    @property
    def architecture(self) -> str:
        """modelspec.architecture of a LoRA of this model."""
        return "stable-diffusion-v1/lora"

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The noise schedule's config, as the settings change it."""
        return self.noise_schedule.config

    @property
    def prediction_type(self) -> str:
        """What it predicts: epsilon (the noise) or v_prediction."""
        return self.noise_schedule.prediction_type

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a side of one latent."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def size_multiple(self) -> int:
        """Pixels of which width and height must be a multiple: the UNet halves the latents."""
        return int(self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.unet.config.in_channels)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the UNet and the text encoder compute in `precision`."""
        import torch

        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, torch_dtype(self.precision))

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (N, 2 + max_tokens), padded and cut."""
        if self.settings.weighted_captions:
            return weighted_ids(self.tokenizer, prompts, self.max_tokens + 2)[0].to(self.device)
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.max_tokens + 2,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = tokens.input_ids.to(self.device)
        return ids

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """The prompts of which the text encoder reads no more than the first `max_tokens`."""
        texts = list(prompts)
        if self.settings.weighted_captions:
            texts = ["".join(text for text, _ in weighted_parts(prompt)) for prompt in prompts]
        tokens = self.tokenizer(texts, verbose=False).input_ids if prompts else []
        return [
            one for one, ids in zip(prompts, tokens, strict=True) if len(ids) > self.max_tokens + 2
        ]

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt that the text encoder reads, besides the two that frame it."""
        return (self._max_length - 2) * self.settings.num_chunks

    @property
    def _max_length(self) -> int:
        """Tokens of a chunk; a tokenizer without a limit of its own takes the text encoder's."""
        positions = int(self.text_encoder.config.max_position_embeddings)
        return min(positions, int(self.tokenizer.model_max_length))

    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings (N, L, D) from the layer that clip_skip names."""
        ids = self.tokenize(prompts)
        embeds = joined(self._hidden(in_chunks(ids, self._max_length)), len(prompts))
        if self.settings.weighted_captions:
            _, weights = weighted_ids(self.tokenizer, prompts, self.max_tokens + 2)
            embeds = embeds * weights.to(embeds)[..., None]
        return embeds

    def _hidden(self, ids: Tensor) -> Tensor:
        skip = self.settings.clip_skip
        if skip == 1:
            embeds: Tensor = self.text_encoder(ids).last_hidden_state
            return embeds
        states = self.text_encoder(ids, output_hidden_states=True).hidden_states
        inner = getattr(self.text_encoder, "text_model", self.text_encoder)
        hidden: Tensor = inner.final_layer_norm(states[-skip])
        return hidden

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        """The UNet's prediction (N, C, h, w) at timesteps (N,) under embeddings (N, L, D)."""
        prediction: Tensor = self.unet(
            noisy_latents.to(self.unet.dtype), timesteps, embeds.to(self.unet.dtype)
        ).sample
        return prediction

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass, for as long as the model lives."""
        self.unet.enable_gradient_checkpointing()
        self.unet.train()  # diffusers checkpoints in training mode only; nothing else differs
        self.text_encoder.activation_checkpointing_enable()
        self.text_encoder.train()

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Latents (N, C, H/f, W/f) of pixels (N, 3, H, W) in -1..1: the posterior's scaled mode."""
        import torch

        with torch.no_grad():
            posterior = self.vae.encode(pixels.to(self.device)).latent_dist
        latents: Tensor = posterior.mode() * self.vae.config.scaling_factor
        return latents

    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents (N, C, h, w)."""
        import torch
        from PIL import Image

        with torch.no_grad():  # one at a time: the VAE takes gigabytes at 512 px
            scaled = latents.float() / self.vae.config.scaling_factor
            pixels = torch.cat([self.vae.decode(one[None]).sample for one in scaled])
        values = (pixels.nan_to_num() / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
        return [Image.fromarray(picture) for picture in values.permute(0, 2, 3, 1).cpu().numpy()]

    @cached_property
    def vae_identity(self) -> str:
        """sha256 over the VAE's weights with their names, and its scale: what latents depend on."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return f"{digest.hexdigest()} {self.vae.config.scaling_factor}"

    @cached_property
    def file_hashes(self) -> dict[str, str]:
        """kohya's hashes of the base's file; of a folder it has none and says IsADirectory."""
        if not self.settings.is_single_file:
            return {"ss_sd_model_hash": "IsADirectory", "ss_new_sd_model_hash": "IsADirectory"}
        with Path(self.settings.path).open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest()
            legacy = kohya_hashes.legacy_hash(file)
        return {"ss_sd_model_hash": legacy, "ss_new_sd_model_hash": whole}


def parts_of(
    text_encoder: CLIPTextModel, unet: UNet2DConditionModel
) -> dict[str, tuple[str, torch.nn.Module]]:
    """What adapters of this architecture attach to, with the names that kohya gives them."""
    # transformers 5 dropped the text_model. level that files' names have
    inner = getattr(text_encoder, "text_model", text_encoder)
    return {"text_encoder": ("lora_te_text_model", inner), "unet": ("lora_unet", unet)}
