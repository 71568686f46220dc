"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, whose layer is chosen by clip_skip.

2.x has OpenCLIP's, which diffusers' folders hold without its last layer, and a UNet that projects
by Linear; kohya gives its modules the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasweep.models import clip_prompts
from lorasweep.models.conditioning import Conditioning, SizeAndCrop
from lorasweep.models.latent_diffusion import LatentDiffusion
from lorasweep.models.prompt_tokens import in_chunks, joined, weighted_ids, weighted_parts

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class StableDiffusion(LatentDiffusion):
    """A loaded, frozen base model of Stable Diffusion 1.x's or 2.x's layout."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel

    @property
    def text_encoders(self) -> Sequence[Any]:
        """The one."""
        return (self.text_encoder,)

    @property
    def parts(self) -> dict[str, tuple[str, torch.nn.Module]]:
        """What adapters attach to: part -> (prefix of its names in files, module)."""
        return parts_of(self.text_encoder, self.unet)

    @property
    def kohya_names(self) -> Mapping[str, str]:
        """kohya names all modules as diffusers does."""
        return {}

    @property
    def metadata(self) -> Mapping[str, str]:
        """kohya's entries that say what a LoRA's base is."""
        is_v = self.noise_schedule.prediction_type == "v_prediction"
        version = "sd_v2" if self.is_v2 else "sd_v1"
        size = ("-768-v" if is_v else "-512") if self.is_v2 else ""
        return {
            "ss_v2": str(self.is_v2),
            "ss_base_model_version": f"{version}_v" if is_v else version,
            "modelspec.architecture": f"stable-diffusion-v{2 if self.is_v2 else 1}{size}/lora",
            "modelspec.implementation": "diffusers",
        }

    @property
    def is_v2(self) -> bool:
        """Is it Stable Diffusion 2.x?"""
        return bool(self.unet.config.use_linear_projection)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (N, 2 + max_tokens), padded and cut."""
        length = self.max_tokens + 2
        if self.settings.weighted_captions:
            return weighted_ids(self.tokenizer, prompts, length)[0].to(self.device)
        return clip_prompts.tokenize(self.tokenizer, prompts, length).to(self.device)

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """The prompts of which the text encoder reads no more than the first `max_tokens`."""
        texts = list(prompts)
        if self.settings.weighted_captions:
            texts = ["".join(text for text, _ in weighted_parts(prompt)) for prompt in prompts]
        cut = clip_prompts.are_cut(self.tokenizer, texts, self.max_tokens + 2)
        return [one for one, is_cut in zip(prompts, cut, strict=True) if is_cut]

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt that the text encoder reads, besides the two that frame it."""
        return (self._max_length - 2) * self.settings.num_chunks

    @property
    def _max_length(self) -> int:
        """Tokens of a chunk."""
        return clip_prompts.max_length(self.tokenizer, self.text_encoder)

    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        """Prompt embeddings (N, 2 + max_tokens, D) from the layer that clip_skip names."""
        self.wake_text_encoders()
        ids = self.tokenize(prompts)
        embeds = joined(self._hidden(in_chunks(ids, self._max_length)), len(prompts))
        if self.settings.weighted_captions:
            _, weights = weighted_ids(self.tokenizer, prompts, self.max_tokens + 2)
            embeds = embeds * weights.to(embeds)[..., None]
        return Conditioning(embeds)

    def _hidden(self, ids: Tensor) -> Tensor:
        skip = self.settings.clip_skip
        if skip == 1:
            embeds: Tensor = self.text_encoder(ids).last_hidden_state
            return embeds
        states = self.text_encoder(ids, output_hidden_states=True).hidden_states
        inner = getattr(self.text_encoder, "text_model", self.text_encoder)
        hidden: Tensor = inner.final_layer_norm(states[-skip])
        return hidden

    def with_sizes(self, conditioning: Conditioning, sizes: Sequence[SizeAndCrop]) -> Conditioning:
        """As it is: this UNet is told of no sizes."""
        return conditioning

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The UNet's prediction (N, C, h, w) at timesteps (N,)."""
        prediction: Tensor = self.unet(
            noisy_latents.to(self.unet.dtype), timesteps, conditioning.embeds.to(self.unet.dtype)
        ).sample
        return prediction

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
