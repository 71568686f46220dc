"""The base model: load it, tokenize, encode, decode. The only place that knows an architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from lorasweep.core.settings import Settings, SettingsError
from lorasweep.models.model_files import ModelError as ModelError
from lorasweep.models.model_files import (
    check_file,
    check_folder,
    check_missing,
    check_values,
    load_error,
    load_errors,
    quiet_libraries,
)

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from PIL import Image
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTokenizer


PICKLED = {".ckpt", ".pt", ".pth", ".bin"}
Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Model(Settings):
    """Which base model, and how it is read."""

    path: str
    revision: str | None
    config: str | None
    allow_pickle: bool
    clip_skip: PositiveInt
    prediction_type: Literal["epsilon", "v_prediction"] | None

    def __post_init__(self) -> None:
        if not self.path.strip() or "\0" in self.path:
            raise SettingsError("model.path is empty: give a diffusers folder, a .safetensors file")
        file = Path(self.path)
        pickled = file.suffix.lower() in PICKLED
        if file.is_file():  # anything but safetensors may be a pickle, whatever its name
            pickled = file.suffix.lower() != ".safetensors"
        if pickled and not self.allow_pickle:
            raise SettingsError(
                f"model.path={self.path} is a pickled checkpoint, which can run any code when"
                " loaded; convert it to .safetensors, or trust it by model.allow_pickle=true"
            )
        looks_local = file.suffix.lower() in PICKLED | {".safetensors"} or file.is_absolute()
        if (looks_local or self.path.startswith((".", "~"))) and not file.exists():
            raise SettingsError(
                f"model.path={self.path}: no such file or folder; give a diffusers folder, a"
                " .safetensors file, a hub id, or model=embedded for the demo's model"
            )

    @property
    def is_single_file(self) -> bool:
        """One checkpoint file in the original Stable Diffusion layout, not a diffusers folder."""
        return Path(self.path).is_file()

    def load(self, device: str = "cpu", precision: Precision = "fp32") -> BaseModel:
        """Load the model, frozen, in evaluation mode. Raises ModelError with the remedy."""
        _quieten()
        dtype = _weight_dtype(device, precision)
        name = f"model.path={self.path}"
        try:
            with quiet_libraries():
                read = self._from_file if self.is_single_file else self._from_folder
                components = read(dtype)
            base = BaseModel.assemble(self, components, device, precision)
            base.noise_scheduler  # noqa: B018  # its config is read here, and may be wrong
        except (ModelError, SettingsError):
            raise
        except load_errors() as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            raise load_error(name, error) from None
        parts = {key: components[key] for key in ("text_encoder", "unet", "vae")}
        check_values(name, parts, len(components["tokenizer"]))
        return base

    def _from_folder(self, dtype: torch.dtype) -> dict[str, Any]:
        import diffusers
        import torch
        from transformers import CLIPTextModel, CLIPTokenizer

        if Path(self.path).is_dir():
            name = f"model.path={self.path}"
            check_folder(Path(self.path), name, allow_pickle=self.allow_pickle)
        where = {"pretrained_model_name_or_path": self.path, "revision": self.revision}
        safe = None if self.allow_pickle else True
        weights: dict[str, Any] = {
            **where,
            "use_safetensors": safe,
            "dtype": dtype,
            "output_loading_info": True,
        }
        unet, vae = diffusers.UNet2DConditionModel, diffusers.AutoencoderKL
        try:
            self._check_architecture()
            tokenizer = CLIPTokenizer.from_pretrained(
                self.path, subfolder="tokenizer", revision=self.revision
            )
            loaded = {
                "text_encoder": CLIPTextModel.from_pretrained(**weights, subfolder="text_encoder"),
                "unet": unet.from_pretrained(**weights, subfolder="unet"),
                "vae": vae.from_pretrained(**{**weights, "dtype": torch.float32}, subfolder="vae"),
            }
            missing = {part: told["missing_keys"] for part, (_, told) in loaded.items()}
            check_missing(f"model.path={self.path}", missing)
            return {
                "tokenizer": tokenizer,
                **{part: module for part, (module, _) in loaded.items()},
                "scheduler": diffusers.DDPMScheduler.load_config(**where, subfolder="scheduler"),
            }
        except OSError as error:
            raise ModelError(_not_found("model.path", self.path, error)) from None

    def _check_architecture(self) -> None:
        from diffusers import DiffusionPipeline

        index = DiffusionPipeline.load_config(self.path, revision=self.revision)
        if index.get("_class_name") != "StableDiffusionPipeline":
            raise ModelError(
                f"model.path={self.path} is a {index.get('_class_name')}; lorasweep trains models"
                " of Stable Diffusion 1.x's layout (StableDiffusionPipeline) so far"
            )

    def _from_file(self, dtype: torch.dtype) -> dict[str, Any]:
        import torch
        from diffusers import StableDiffusionPipeline
        from diffusers.loaders.single_file_utils import SingleFileComponentError
        from safetensors import SafetensorError

        if self.config is None:
            raise ModelError(
                "model.config is null, but a single file needs the configs and the tokenizer of a"
                " diffusers model: give its hub id or folder"
            )
        if Path(self.path).suffix.lower() not in PICKLED:
            check_file(Path(self.path), f"model.path={self.path}")
        try:
            pipeline = StableDiffusionPipeline.from_single_file(
                self.path,
                config=self.config,
                local_files_only=Path(self.config).is_dir(),
                safety_checker=None,
                feature_extractor=None,
                torch_dtype=torch.float32,  # the VAE's are not to be rounded
            )
        except OSError as error:
            raise ModelError(_not_found("model.config", self.config, error)) from None
        except (SafetensorError, SingleFileComponentError, ValueError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise ModelError(
                f"model.path={self.path} is not a whole Stable Diffusion 1.x checkpoint: {first}"
            ) from None
        pipeline.unet.to(dtype)
        pipeline.text_encoder.to(dtype)
        names = ("tokenizer", "text_encoder", "unet", "vae")
        components = {name: getattr(pipeline, name) for name in names}
        return {**components, "scheduler": dict(pipeline.scheduler.config)}


@dataclass(frozen=True)
class BaseModel:
    """A loaded, frozen base model of Stable Diffusion 1.x's layout."""

    settings: Model
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler_config: Mapping[str, Any]
    device: str
    precision: Precision

    @classmethod
    def assemble(
        cls, settings: Model, components: Mapping[str, Any], device: str, precision: Precision
    ) -> BaseModel:
        """Freeze the components and move them to the device; the VAE computes in fp32."""
        for name in ("text_encoder", "unet", "vae"):
            components[name].requires_grad_(False).eval().to(device)
        components["vae"].float()
        layers = int(components["text_encoder"].config.num_hidden_layers)
        if settings.clip_skip > layers:
            raise SettingsError(
                f"model.clip_skip={settings.clip_skip}: the text encoder has {layers} layers"
            )
        config = dict(components["scheduler"])
        if settings.prediction_type is not None:
            config["prediction_type"] = settings.prediction_type
        return cls(
            settings=settings,
            tokenizer=components["tokenizer"],
            text_encoder=components["text_encoder"],
            unet=components["unet"],
            vae=components["vae"],
            scheduler_config=config,
            device=device,
            precision=precision,
        )

    @property
    def parts(self) -> dict[str, tuple[str, torch.nn.Module]]:
        """What adapters attach to: part -> (prefix of its names in files, module)."""
        return parts_of(self.text_encoder, self.unet)

    @property
    def base_model_version(self) -> str:
        """kohya's ss_base_model_version."""
        return "sd_v1"

    @property
    def architecture(self) -> str:
        """modelspec.architecture of a LoRA of this model."""
        return "stable-diffusion-v1/lora"

    @property
    def prediction_type(self) -> str:
        """epsilon or v_prediction."""
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

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

    @cached_property
    def noise_scheduler(self) -> DDPMScheduler:
        """The training schedule: adds noise and knows alphas_cumprod."""
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(dict(self.scheduler_config))

    @property
    def num_train_timesteps(self) -> int:
        """Length of the noise schedule."""
        return int(self.noise_scheduler.config.num_train_timesteps)

    def sampler(self, name: str) -> Any:
        """A diffusers scheduler of the class `name` with this model's noise schedule."""
        import diffusers

        return getattr(diffusers, name).from_config(dict(self.scheduler_config))

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the UNet and the text encoder compute in `precision`."""
        import torch

        if self.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(torch.device(self.device).type, dtype)

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

    @property
    def _max_length(self) -> int:
        """Tokens of a prompt; a tokenizer without a limit of its own takes the text encoder's."""
        positions = int(self.text_encoder.config.max_position_embeddings)
        return min(positions, int(self.tokenizer.model_max_length))

    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings (N, L, D) from the layer that clip_skip names."""
        ids = self.tokenize(prompts)
        skip = self.settings.clip_skip
        if skip == 1:
            embeds: Tensor = self.text_encoder(ids).last_hidden_state
            return embeds
        states = self.text_encoder(ids, output_hidden_states=True).hidden_states
        inner = getattr(self.text_encoder, "text_model", self.text_encoder)
        return inner.final_layer_norm(states[-skip])

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        """The UNet's prediction (N, C, h, w) at timesteps (N,) under embeddings (N, L, D)."""
        prediction: Tensor = self.unet(
            noisy_latents.to(self.unet.dtype), timesteps, embeds.to(self.unet.dtype)
        ).sample
        return prediction

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What `predict` should give: the noise, or v (arXiv 2202.00512)."""
        if self.prediction_type == "v_prediction":
            velocity: Tensor = self.noise_scheduler.get_velocity(latents, noise, timesteps)
            return velocity
        return noise

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR weights (arXiv 2303.09556) of timesteps, for what the model predicts."""
        alphas = self.noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alphas / (1 - alphas)
        if self.prediction_type == "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        return snr.clamp(max=gamma) / snr

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass, for as long as the model lives."""
        self.unet.enable_gradient_checkpointing()
        self.unet.train()  # diffusers checkpoints in training mode only; nothing else differs
        self.text_encoder.activation_checkpointing_enable()
        self.text_encoder.train()

    def dtype(self, precision: Precision) -> torch.dtype:
        """torch's name of a precision."""
        import torch

        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]

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
        """sha256 over the VAE's weights, and its scale: what cached latents depend on."""
        return f"{weights_hash(self.vae)} {self.vae.config.scaling_factor}"

    @cached_property
    def file_hashes(self) -> dict[str, str]:
        """kohya's hashes of the base's file; of a folder it has none and says IsADirectory."""
        if not self.settings.is_single_file:
            return {"ss_sd_model_hash": "IsADirectory", "ss_new_sd_model_hash": "IsADirectory"}
        path = Path(self.settings.path)
        with path.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0x100000)
            part = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
        return {"ss_sd_model_hash": part, "ss_new_sd_model_hash": whole}


def parts_of(
    text_encoder: CLIPTextModel, unet: UNet2DConditionModel
) -> dict[str, tuple[str, torch.nn.Module]]:
    """What adapters of this architecture attach to, with the names that kohya gives them."""
    # transformers 5 dropped the text_model. level that files' names have
    inner = getattr(text_encoder, "text_model", text_encoder)
    return {"text_encoder": ("lora_te_text_model", inner), "unet": ("lora_unet", unet)}


def weights_hash(module: torch.nn.Module) -> str:
    """sha256 over a module's parameters and buffers, names included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch has a class for it; the CPU's allocator, cuBLAS and cuDNN only say so."""
    import torch

    texts = ("can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(t in str(error) for t in texts)


def memory_for(device: str, step: Callable[[], None]) -> int | None:
    """How many runs fit on a CUDA device, if `step` is what one takes; None: not known (CPU).

    A tenth of what is free is left to the optimisers and to fragments.
    """
    import torch

    if torch.device(device).type != "cuda":
        return None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    free, _ = torch.cuda.mem_get_info(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        step()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return 1
    needed = torch.cuda.max_memory_allocated(device) - before
    return max(1, int(free * 0.9 / max(needed, 1)))


def import_libraries() -> None:
    """Import what loads a model: seconds, which a process can spend before it has one to load."""
    with quiet_libraries():
        from diffusers import (  # noqa: F401
            AutoencoderKL,
            DDPMScheduler,
            DiffusionPipeline,
            UNet2DConditionModel,
        )
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401


def resolve_device(device: str) -> str:
    """`auto` is CUDA where there is a device, else the CPU. Raises SettingsError for no device."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError(
            f"trainer.device={device}: no CUDA device was found; use trainer.device=auto or cpu"
        )
    index = int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise SettingsError(f"trainer.device={device}: there are {count} CUDA devices, from cuda:0")
    return device


def choose_devices(devices: str | Sequence[str], trainer_device: str = "auto") -> list[str]:
    """What `launcher.devices` stands for: auto is every CUDA device, or one worker on the CPU.

    With auto a `trainer.device` of its own is the only one. Raises SettingsError for a device that
    is not there.
    """
    import torch

    if isinstance(devices, str) and devices == "auto":
        if trainer_device != "auto":
            return choose_devices([trainer_device])
        return [f"cuda:{n}" for n in range(torch.cuda.device_count())] or ["cpu"]
    chosen = [devices] if isinstance(devices, str) else list(devices)
    known = {"cpu", "cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))}
    if not torch.cuda.is_available():
        known = {"cpu"}
    for device in chosen:
        if device not in known:
            raise SettingsError(
                f"launcher.devices={device}: there is no such device; give auto or some of"
                f" {', '.join(sorted(known))}"
            )
    if not chosen:
        raise SettingsError("launcher.devices is empty: give auto, cpu or [cuda:0,cuda:1]")
    return chosen


def _quieten() -> None:
    """Loading takes a moment and needs no bar for every file."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _weight_dtype(device: str, precision: Precision) -> torch.dtype:
    """Weights follow the precision on CUDA; the CPU's layer norm wants fp32 weights in autocast."""
    import torch

    if torch.device(device).type == "cpu":
        return torch.float32
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def _not_found(key: str, path: str, error: OSError) -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    first = (str(error).splitlines() or ["no answer"])[0]
    is_local = Path(path).expanduser().exists()
    offline = " (HF_HUB_OFFLINE is set: nothing is downloaded)" if HF_HUB_OFFLINE else ""
    return (
        f"{key}={path} can't be loaded: {first}{'' if is_local else offline} Give a diffusers"
        " folder or a .safetensors file on this machine, a hub id that can be reached, or"
        " model=embedded"
    )
