"""SDXL and its descendants: two text encoders, and a UNet that is told of sizes and crops.

arXiv 2307.01952. Prompts are read from the last layer but one of both encoders, without a final
norm, and as a whole by the second's projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorasweep.models import clip_prompts
from lorasweep.models.conditioning import Conditioning, SizeAndCrop
from lorasweep.models.latent_diffusion import LatentDiffusion

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


@dataclass(frozen=True)
class SDXL(LatentDiffusion):
    """A loaded, frozen base model of SDXL's layout."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    tokenizer_2: CLIPTokenizer
    text_encoder_2: CLIPTextModelWithProjection
    force_zeros_for_empty_prompt: bool
    """diffusers' setting of its pipeline, which goes by it where no negative prompt is given."""

    @property
    def text_encoders(self) -> Sequence[Any]:
        """Both."""
        return self.text_encoder, self.text_encoder_2

    @property
    def parts(self) -> dict[str, tuple[str, torch.nn.Module]]:
        """What adapters attach to: part -> (prefix of its names in files, module)."""
        # transformers 5 dropped the text_model. level of the first that files' names have
        inner = getattr(self.text_encoder, "text_model", self.text_encoder)
        return {
            "text_encoder": ("lora_te1_text_model", inner),
            "text_encoder_2": ("lora_te2", self.text_encoder_2),
            "unet": ("lora_unet", self.unet),
        }

    @property
    def kohya_names(self) -> Mapping[str, str]:
        """kohya trains SDXL's original UNet, so its files name the modules by that layout."""
        return self.original_names

    @property
    def metadata(self) -> Mapping[str, str]:
        """kohya's entries that say what a LoRA's base is."""
        return {
            "ss_v2": "False",
            "ss_base_model_version": "sdxl_base_v1-0",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        }

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """The prompts of which a text encoder reads no more than the first `max_tokens`."""
        length = self.max_tokens + 2
        cut = [clip_prompts.are_cut(tokenizer, prompts, length) for tokenizer, _ in self._encoders]
        return [one for one, *are in zip(prompts, *cut, strict=True) if any(are)]

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt that both read, besides the two that frame it."""
        return min(clip_prompts.max_length(*encoder) for encoder in self._encoders) - 2

    @property
    def _encoders(self) -> list[tuple[CLIPTokenizer, Any]]:
        return [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]

    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings (N, L, D1 + D2) and pooled ones (N, D2); `with_sizes` completes it."""
        import torch

        self.wake_text_encoders()
        outputs = [
            encoder(
                clip_prompts.tokenize(tokenizer, prompts, self.max_tokens + 2).to(self.device),
                output_hidden_states=True,
            )
            for tokenizer, encoder in self._encoders
        ]
        embeds = torch.cat([one.hidden_states[-2] for one in outputs], dim=-1)
        return Conditioning(embeds, pooled=outputs[1].text_embeds)

    def with_sizes(self, conditioning: Conditioning, sizes: Sequence[SizeAndCrop]) -> Conditioning:
        """With the six numbers of each row: original height, width, crop's top, left, bucket's."""
        import torch

        rows = [(*one.original[::-1], *one.crop[::-1], *one.size[::-1]) for one in sizes]
        # in fp32: bf16 would round odd sizes
        time_ids = torch.tensor(rows, dtype=torch.float32, device=conditioning.embeds.device)
        return replace(conditioning, time_ids=time_ids)

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The UNet's prediction (N, C, h, w) at timesteps (N,)."""
        dtype = self.unet.dtype
        assert conditioning.pooled is not None and conditioning.time_ids is not None
        prediction: Tensor = self.unet(
            noisy_latents.to(dtype),
            timesteps,
            conditioning.embeds.to(dtype),
            added_cond_kwargs={
                "text_embeds": conditioning.pooled.to(dtype),
                "time_ids": conditioning.time_ids,
            },
        ).sample
        return prediction

    def pipeline(self) -> Any:
        """diffusers' pipeline over its modules, not copies of them."""
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            text_encoder_2=self.text_encoder_2,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
            unet=self.unet,
            scheduler=self.noise_schedule.scheduler,
            force_zeros_for_empty_prompt=self.force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
