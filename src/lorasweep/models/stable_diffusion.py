"""Stable Diffusion 1.x: one CLIP text encoder, whose layer is chosen by clip_skip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasweep.models.conditioning import Conditioning
from lorasweep.models.latent_diffusion import LatentDiffusion

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class StableDiffusion(LatentDiffusion):
    """A loaded, frozen base model of Stable Diffusion 1.x's layout."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel

    @property
    def parts(self) -> dict[str, tuple[str, torch.nn.Module]]:
        """What adapters attach to: part -> (prefix of its names in files, module)."""
        return parts_of(self.text_encoder, self.unet)

    @property
    def base_model_version(self) -> str:
        """kohya's ss_base_model_version."""
        return "sd_v1_v" if self.noise_schedule.prediction_type == "v_prediction" else "sd_v1"

    @property
    def architecture(self) -> str:
        """modelspec.architecture of a LoRA of this model."""
        return "stable-diffusion-v1/lora"

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (N, L), padded and cut to the text encoder's length."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self._max_length,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = tokens.input_ids.to(self.device)
        return ids

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """The prompts of which the text encoder reads no more than the first `max_tokens`."""
        tokens = self.tokenizer(list(prompts), verbose=False).input_ids if prompts else []
        return [
            one for one, ids in zip(prompts, tokens, strict=True) if len(ids) > self._max_length
        ]

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt that the text encoder reads, besides the two that frame it."""
        return self._max_length - 2

    @property
    def _max_length(self) -> int:
        """Tokens of a prompt; a tokenizer without a limit of its own takes the text encoder's."""
        positions = int(self.text_encoder.config.max_position_embeddings)
        return min(positions, int(self.tokenizer.model_max_length))

    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        """Prompt embeddings (N, L, D) from the layer that clip_skip names."""
        ids = self.tokenize(prompts)
        skip = self.settings.clip_skip
        if skip == 1:
            return Conditioning(self.text_encoder(ids).last_hidden_state)
        states = self.text_encoder(ids, output_hidden_states=True).hidden_states
        inner = getattr(self.text_encoder, "text_model", self.text_encoder)
        return Conditioning(inner.final_layer_norm(states[-skip]))

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The UNet's prediction (N, C, h, w) at timesteps (N,)."""
        prediction: Tensor = self.unet(
            noisy_latents.to(self.unet.dtype), timesteps, conditioning.embeds.to(self.unet.dtype)
        ).sample
        return prediction

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass, for as long as the model lives."""
        self.unet.enable_gradient_checkpointing()
        self.unet.train()  # diffusers checkpoints in training mode only; nothing else differs
        self.text_encoder.activation_checkpointing_enable()
        self.text_encoder.train()

    def pipeline(self) -> Any:
        """diffusers' pipeline over its modules, not copies of them."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.noise_schedule.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def parts_of(
    text_encoder: CLIPTextModel, unet: UNet2DConditionModel
) -> dict[str, tuple[str, torch.nn.Module]]:
    """What adapters of this architecture attach to, with the names that kohya gives them."""
    # transformers 5 dropped the text_model. level that files' names have
    inner = getattr(text_encoder, "text_model", text_encoder)
    return {"text_encoder": ("lora_te_text_model", inner), "unet": ("lora_unet", unet)}
