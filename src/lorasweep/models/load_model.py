"""Loading a base model, frozen, from a hub id, a diffusers folder or a single file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.core.settings import SettingsError
from lorasweep.models import file_schedule, model_files
from lorasweep.models.base_model import BaseModel, Precision, torch_dtype
from lorasweep.models.gpu_memory import is_out_of_memory
from lorasweep.models.model_files import (
    ModelError,
    check_file,
    check_folder,
    check_index,
    check_missing,
    check_values,
    load_error,
    load_errors,
    quiet_libraries,
)
from lorasweep.models.model_settings import PICKLED, ModelSettings
from lorasweep.models.noise_schedule import NoiseSchedule
from lorasweep.models.sdxl import SDXL
from lorasweep.models.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    import torch


_NO_CONFIG = (
    "model.config is null, but a single file needs the configs and the tokenizer of a diffusers"
    " model: give its hub id or folder"
)


@dataclass(frozen=True, kw_only=True)
class Model(ModelSettings):
    """Which base model, how it is read, and the way to load it."""

    def check(self) -> None:
        """Raise ModelError for what the files say without being loaded."""
        name = f"model.path={self.path}"
        if self.is_single_file:
            if self.config is None:
                raise ModelError(_NO_CONFIG)
            if Path(self.path).suffix.lower() not in PICKLED:
                check_file(Path(self.path), name)
        elif Path(self.path).is_dir():
            check_folder(Path(self.path), name, allow_pickle=self.allow_pickle)

    def load(self, device: str = "cpu", precision: Precision = "fp32") -> BaseModel:
        """Load the model, frozen, in evaluation mode. Raises ModelError with the remedy."""
        hide_progress_bars()
        dtype = _weight_dtype(device, precision)
        name = f"model.path={self.path}"
        try:
            with quiet_libraries():
                read = _from_file if self.is_single_file else _from_folder
                components = read(self, dtype)
            base = frozen(self, components, device, precision)
        except (ModelError, SettingsError):
            raise
        except load_errors() as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            raise load_error(name, error) from None
        check_values(name, components)
        return base


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


def _from_folder(settings: ModelSettings, dtype: torch.dtype) -> dict[str, Any]:
    import diffusers
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    path, name = settings.path, f"model.path={settings.path}"
    is_local = Path(path).is_dir()
    if is_local:
        check_folder(Path(path), name, allow_pickle=settings.allow_pickle)
    where = {"pretrained_model_name_or_path": path, "revision": settings.revision}
    weights: dict[str, Any] = {
        **where,
        "use_safetensors": None if settings.allow_pickle else True,
        "output_loading_info": True,
    }
    parts: dict[str, Any] = {
        "text_encoder": CLIPTextModel,
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
    }
    tokenizers = ["tokenizer"]
    try:
        index = diffusers.DiffusionPipeline.load_config(path, revision=settings.revision)
        check_index(index, name)
        if index["_class_name"] == model_files.SDXL:
            parts["text_encoder_2"] = CLIPTextModelWithProjection
            tokenizers.append("tokenizer_2")
        loaded = {
            part: cls.from_pretrained(
                **weights,
                subfolder=part,
                dtype=torch.float32 if part == "vae" else dtype,
                variant=_variant(Path(path), part),
            )
            for part, cls in parts.items()
        }
        missing = {part: told["missing_keys"] for part, (_, told) in loaded.items()}
        check_missing(name, missing)
        return {
            **{
                one: CLIPTokenizer.from_pretrained(path, subfolder=one, revision=settings.revision)
                for one in tokenizers
            },
            **{part: module for part, (module, _) in loaded.items()},
            "scheduler": diffusers.DDPMScheduler.load_config(**where, subfolder="scheduler"),
            "force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True),
        }
    except OSError as error:
        raise ModelError(_not_found("model.path", path, error)) from None


def _variant(folder: Path, part: str) -> str | None:
    """fp16 where a folder of this machine has its weights in that variant alone."""
    files = [file.name for file in (folder / part).glob("*.safetensors")]
    return "fp16" if files and all(".fp16." in name for name in files) else None


def _from_file(settings: ModelSettings, dtype: torch.dtype) -> dict[str, Any]:
    import diffusers
    import torch
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors import SafetensorError

    path, config = settings.path, settings.config
    if config is None:
        raise ModelError(_NO_CONFIG)
    kind = model_files.SD
    if Path(path).suffix.lower() not in PICKLED:
        kind = check_file(Path(path), f"model.path={path}")
    is_sdxl = kind == model_files.SDXL
    others = {} if is_sdxl else {"safety_checker": None}
    family, option = ("SDXL", "sdxl") if is_sdxl else ("Stable Diffusion 1.x", "sd15")
    try:
        index = diffusers.DiffusionPipeline.load_config(config)
    except OSError as error:
        raise ModelError(_not_found("model.config", config, error)) from None
    if index.get("_class_name") != kind:
        raise ModelError(
            f"model.config={config} is of another kind of model than model.path={path}: give"
            f" {family}'s configs, as model={option} does"
        )
    try:
        pipeline = getattr(diffusers, kind).from_single_file(
            path,
            config=config,
            local_files_only=Path(config).is_dir(),
            feature_extractor=None,
            torch_dtype=torch.float32,  # the VAE's are not to be rounded
            **others,
        )
    except OSError as error:
        raise ModelError(_not_found("model.config", config, error)) from None
    except (SafetensorError, SingleFileComponentError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(
            f"model.path={path} is not a whole {family} checkpoint: {first} `lorasweep convert`"
            " makes a folder of files without a VAE (--vae) or of NAI's names"
        ) from None
    second = ("tokenizer_2", "text_encoder_2") if is_sdxl else ()
    modules = {name: getattr(pipeline, name) for name in ("unet", "text_encoder", *second[1:])}
    missing = {part: _without_values(module) for part, module in modules.items()}
    check_missing(f"model.path={path}", missing)
    for module in modules.values():
        module.to(dtype)
    names = ("tokenizer", "text_encoder", "unet", "vae", *second)
    components = {name: getattr(pipeline, name) for name in names}
    components["force_zeros_for_empty_prompt"] = index.get("force_zeros_for_empty_prompt", True)
    schedule = dict(pipeline.scheduler.config)
    if Path(path).suffix.lower() not in PICKLED:
        schedule |= file_schedule.changes(schedule, file_schedule.of_file(Path(path)))
    return {**components, "scheduler": schedule}


def _without_values(module: torch.nn.Module) -> list[str]:
    """Parameters that the file didn't have: diffusers leaves them without memory."""
    return [name for name, parameter in module.named_parameters() if parameter.is_meta]


def frozen(
    settings: ModelSettings, components: Mapping[str, Any], device: str, precision: Precision
) -> BaseModel:
    """Freeze the components and move them to the device; the VAE computes in fp32.

    With a second text encoder among them it is SDXL.
    """
    is_sdxl = "text_encoder_2" in components
    for name in ("text_encoder", "unet", "vae", *(["text_encoder_2"] if is_sdxl else [])):
        components[name].requires_grad_(False).eval().to(device)
    components["vae"].float()
    layers = int(components["text_encoder"].config.num_hidden_layers)
    check_clip_skip(settings, layers, is_sdxl=is_sdxl)
    _check_prompts(settings, components["tokenizer"], is_sdxl=is_sdxl)
    schedule = dict(components["scheduler"])
    schedule |= file_schedule.changes(schedule, settings.told_schedule)
    noise_schedule = NoiseSchedule(schedule)
    noise_schedule.scheduler  # noqa: B018  # its config is read here, and may be wrong
    shared: dict[str, Any] = {
        **{name: components[name] for name in ("tokenizer", "text_encoder", "unet", "vae")},
        "settings": settings,
        "noise_schedule": noise_schedule,
        "device": device,
        "precision": precision,
    }
    if not is_sdxl:
        return StableDiffusion(**shared)
    return SDXL(
        **shared,
        tokenizer_2=components["tokenizer_2"],
        text_encoder_2=components["text_encoder_2"],
        force_zeros_for_empty_prompt=bool(components["force_zeros_for_empty_prompt"]),
    )


def _check_prompts(settings: ModelSettings, tokenizer: Any, *, is_sdxl: bool) -> None:
    """Raise SettingsError for prompts that the model's text encoders can't read in chunks."""
    if is_sdxl and settings.weighted_captions:
        raise SettingsError(
            "model.weighted_captions=true: weights in the prompts of SDXL come later; set it to"
            " false"
        )
    if settings.num_chunks > 1 and (is_sdxl or tokenizer.pad_token_id != tokenizer.eos_token_id):
        raise SettingsError(
            f"model.max_token_length={settings.max_token_length}: prompts of this model end in"
            " other tokens than Stable Diffusion 1.x's, and can't be longer than 75"
        )


def check_clip_skip(settings: ModelSettings, num_layers: int, *, is_sdxl: bool) -> None:
    """Raise SettingsError for more layers than the text encoder has, and for any with SDXL."""
    if is_sdxl and settings.clip_skip != 1:
        raise SettingsError(
            f"model.clip_skip={settings.clip_skip} has no effect on SDXL, whose text embeddings are"
            " always of the last layer but one: leave it at 1"
        )
    if settings.clip_skip > num_layers:
        raise SettingsError(
            f"model.clip_skip={settings.clip_skip}: the text encoder has {num_layers} layers; give"
            f" at most {num_layers}"
        )


def hide_progress_bars() -> None:
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
    return torch_dtype(precision)


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
