"""What a base model is: all that training, judging and exporting know of it.

One file a family implements it: stable_diffusion.py, sdxl.py. Everything else knows this alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from lorasweep.models.conditioning import Conditioning, SizeAndCrop
from lorasweep.models.model_settings import ModelSettings
from lorasweep.models.noise_schedule import NoiseSchedule

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def torch_dtype(precision: Precision) -> torch.dtype:
    """torch's name of a precision."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


class BaseModel(Protocol):
    """A loaded, frozen base model."""

    @property
    def settings(self) -> ModelSettings:
        """What it was loaded by."""

    @property
    def device(self) -> str:
        """Where it computes: cpu, cuda:0."""

    @property
    def precision(self) -> Precision:
        """In which its text encoders and its denoiser compute within `autocast`."""

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """Timesteps, noising, what is to be predicted, and the samplers."""

    # Prompts and predictions

    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        """What it is told of N prompts, a row each; to be completed by `with_sizes`."""

    def with_sizes(self, conditioning: Conditioning, sizes: Sequence[SizeAndCrop]) -> Conditioning:
        """What it is told of N prompts and of the pictures of these sizes."""

    def rest_text_encoders(self) -> None:
        """Take them out of the device's memory until the next prompt is encoded."""

    def wake_text_encoders(self) -> None:
        """Bring them back to the device, if they rest: adapters lie where their modules do."""

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The prediction (N, C, h, w) for noisy latents (N, C, h, w) at timesteps (N,)."""

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """The prompts of which a text encoder reads no more than the first `max_tokens`."""

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt that are read, besides those that frame it."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which prompts are encoded and predictions made, in `precision`."""

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass, for as long as the model lives."""

    # Latents

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a side of one latent."""

    @property
    def size_multiple(self) -> int:
        """Pixels that a side has at least."""

    @property
    def native_side(self) -> int:
        """Pixels a side of the pictures that it was trained on."""

    @property
    def latent_scale(self) -> float:
        """What the VAE's latents are multiplied by."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Latents (N, C, H/f, W/f) of pixels (N, 3, H, W) in -1..1, scaled as it is trained."""

    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents (N, C, h, w)."""

    @property
    def vae_identity(self) -> str:
        """What latents depend on, as a text for the key of a cache."""

    # Adapters and their files

    @property
    def parts(self) -> Mapping[str, tuple[str, torch.nn.Module]]:
        """What adapters attach to: part -> (prefix of its names in files, module)."""

    @property
    def text_width(self) -> int:
        """Width of the prompt embeddings, by which files of other bases are told."""

    @property
    def unet_layers(self) -> int:
        """Residual blocks of a level of the UNet, by which names of blocks are counted."""

    @property
    def kohya_names(self) -> Mapping[str, str]:
        """kohya's names of the sites whose keys are not kohya's names."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """kohya's entries that say what a LoRA's base is."""

    @property
    def file_hashes(self) -> Mapping[str, str]:
        """kohya's hashes of the base's file; of a folder it has none and says IsADirectory."""

    # diffusers

    def pipeline(self) -> Any:
        """diffusers' text-to-image pipeline over its modules, not copies of them."""
