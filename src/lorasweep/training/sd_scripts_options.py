"""sd-scripts' options and our settings, in one table that is read in both directions.

`sd_scripts_config` tells sd-scripts what a run's settings are; `reproduce/kohya_settings.py` reads
presets, TOML files and the metadata of LoRAs. A new setting is one line of `OPTIONS`, or one of
`NOT_HERE` less. Options that only say something together (networks, optimisers, schedules) are in
the code of the two.

Read from sd-scripts' code of February 2026.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = object()
"""In place of a value: nothing is said, and our own default stands."""
MAX_LITERAL = 1_000  # characters; an optimiser's arguments take a tenth of it
NOT_UNDERSTOOD = (
    ValueError,
    KeyError,
    SyntaxError,
    TypeError,
    IndexError,
    OverflowError,
    RecursionError,
    MemoryError,
)
"""What a reader raises for what it can't read; files may come from anybody."""

Reader = Callable[[Any], Any]
"""From what a file says, a value of JSON or TOML or its text, to ours."""
_OFF = ("None", "", "null")


def is_off(said: object) -> bool:
    """Is it one of the ways to say nothing?"""
    return said is None or str(said) in _OFF


def plain(said: object) -> Any:
    """A number, text or list as Python writes it; Python's parser is no place for a long text."""
    if not isinstance(said, str):
        return said
    if len(said) > MAX_LITERAL:
        raise ValueError("too long")
    return ast.literal_eval(said)


def boolean(said: object) -> bool:
    return {"true": True, "1": True, "false": False, "0": False, "none": False, "": False}[
        str(said).lower()
    ]


def text(said: object) -> str | None:
    return None if is_off(said) else str(said)


def number(said: object) -> float:
    return 0.0 if is_off(said) else float(str(said))


def optional(said: object) -> float | None:
    """None where it is off, which 0 says too."""
    return number(said) or None


def whole(said: object) -> Any:
    """64, also as kohya_ss keeps it: 64.0."""
    if is_off(said):
        return OURS
    if (value := float(str(said))) != int(value):
        raise ValueError(said)
    return int(value)


def warmup(said: object) -> int | float:
    """Steps, or a fraction of all."""
    value = number(said)
    return value if 0 < value < 1 else whole(value)  # type: ignore[no-any-return]


def size(said: object) -> Any:
    """Width first: "512,650", (512, 650), or 512 for both."""
    if is_off(said):
        return OURS
    value = plain(said)
    sides = [value, value] if isinstance(value, int) else list(value)
    return [int(side) for side in sides]


def one_of(names: Mapping[str, str]) -> Reader:
    return lambda said: names[str(said)]


def only_true(said: object) -> Any:
    """False says nothing of a base whose own schedule may be so."""
    return boolean(said) or OURS


def several(said: object) -> list[Any]:
    """A list, or one alone."""
    if isinstance(said, list | tuple):
        return list(said)
    return [] if is_off(said) else [said]


def unless_0(value: float) -> float | None:
    """Told only where it is on."""
    return value or None


def absolute_files(given: Sequence[str]) -> list[str] | None:
    """Told from any folder."""
    return [str(Path(one).expanduser().absolute()) for one in given] or None


_PRECISIONS = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}
_SAVED = {"fp32": "float", "fp16": "fp16", "bf16": "bf16"}
_READ_PRECISIONS = {theirs: ours for ours, theirs in _PRECISIONS.items()} | {"None": "fp32"}
_READ_SAVED = {theirs: ours for ours, theirs in _SAVED.items()} | {"None": "fp32"}


@dataclass(frozen=True)
class Option:
    """An option of sd-scripts that says what one of our settings says."""

    setting: str
    section: str
    """Of the TOML that we write, for people; sd-scripts reads no sections."""
    read: Reader
    default: Any
    """sd-scripts' own; OURS where it has none."""
    tell: Callable[[Any], Any] = lambda value: value
    """From our value to what the TOML says; None is not written."""
    needs: tuple[str, ...] = ()
    """Options of which one has to be on for this one to have an effect."""


_PYRAMID = ("multires_noise_iterations",)
_BUCKETS = ("enable_bucket",)
_TAGS = ("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step")

OPTIONS: Mapping[str, Option] = {
    "clip_skip": Option(
        "model.clip_skip", "model", whole, 1, lambda layer: layer if layer > 1 else None
    ),
    "max_token_length": Option(
        "model.max_token_length",
        "model",
        whole,
        75,
        lambda length: length if length > 75 else None,
    ),
    "weighted_captions": Option("model.weighted_captions", "model", boolean, False),
    "base_weights": Option("model.base_weights", "model", several, None, absolute_files),
    "base_weights_multiplier": Option(
        "model.base_weights_multiplier",
        "model",
        lambda said: [number(one) for one in several(said)],
        None,
        lambda numbers: list(numbers) or None,
        needs=("base_weights",),
    ),
    "network_weights": Option(
        "trainer.network_weights",
        "network",
        lambda said: None if is_off(said) else str(said),
        None,
        lambda file: None if file is None else str(Path(file).expanduser().absolute()),
    ),
    "dim_from_weights": Option(
        "trainer.dim_from_weights", "network", boolean, False, needs=("network_weights",)
    ),
    "scale_weight_norms": Option("adapter.scale_weight_norms", "network", optional, None),
    "max_grad_norm": Option("optimizer.max_grad_norm", "optimizer", number, 1.0),
    "lr_warmup_steps": Option(
        "lr_scheduler.warmup", "lr_scheduler", warmup, 0, lambda value: warmup(value)
    ),
    "lr_scheduler_num_cycles": Option("lr_scheduler.num_cycles", "lr_scheduler", whole, 1),
    "lr_scheduler_power": Option("lr_scheduler.power", "lr_scheduler", number, 1.0, float),
    "lr_scheduler_timescale": Option("lr_scheduler.timescale", "lr_scheduler", whole, OURS),
    "train_batch_size": Option("trainer.batch_size", "training", whole, 1),
    "gradient_accumulation_steps": Option(
        "trainer.gradient_accumulation_steps", "training", whole, 1
    ),
    "gradient_checkpointing": Option("trainer.gradient_checkpointing", "training", boolean, False),
    "mixed_precision": Option(
        "trainer.precision", "training", one_of(_READ_PRECISIONS), "no", _PRECISIONS.get
    ),
    "seed": Option("seed", "training", whole, OURS),
    "noise_offset": Option("trainer.noise_offset", "loss", number, None, unless_0),
    "noise_offset_random_strength": Option(
        "trainer.noise_offset_random_strength", "loss", boolean, False, needs=("noise_offset",)
    ),
    "adaptive_noise_scale": Option(
        "trainer.adaptive_noise_scale", "loss", number, None, unless_0, needs=("noise_offset",)
    ),
    "multires_noise_iterations": Option(
        "trainer.multires_noise_iterations", "loss", whole, None, unless_0
    ),
    "multires_noise_discount": Option(
        "trainer.multires_noise_discount", "loss", number, 0.3, needs=_PYRAMID
    ),
    "ip_noise_gamma": Option("trainer.ip_noise_gamma", "loss", number, None, unless_0),
    "ip_noise_gamma_random_strength": Option(
        "trainer.ip_noise_gamma_random_strength", "loss", boolean, False, needs=("ip_noise_gamma",)
    ),
    "min_timestep": Option("trainer.min_timestep", "loss", whole, None, unless_0),
    "max_timestep": Option(
        "trainer.max_timestep", "loss", whole, 1000, lambda last: last if last < 1000 else None
    ),
    "loss_type": Option("trainer.loss_type", "loss", str, "l2"),
    "huber_schedule": Option("trainer.huber_schedule", "loss", str, "snr"),
    "huber_c": Option("trainer.huber_c", "loss", number, 0.1),
    "huber_scale": Option("trainer.huber_scale", "loss", number, 1.0),
    "min_snr_gamma": Option("trainer.min_snr_gamma", "loss", optional, None),
    "debiased_estimation_loss": Option("trainer.debiased_estimation_loss", "loss", boolean, False),
    "scale_v_pred_loss_like_noise_pred": Option(
        "trainer.scale_v_pred_loss_like_noise_pred", "loss", boolean, False
    ),
    "v_pred_like_loss": Option("trainer.v_pred_like_loss", "loss", number, None, unless_0),
    "zero_terminal_snr": Option(  # told by what the base's schedule is in the end
        "model.zero_terminal_snr", "loss", only_true, False, lambda _: None
    ),
    "resolution": Option(
        "dataset.resolution",
        "data",
        size,
        OURS,
        lambda sides: ",".join(map(str, sides if isinstance(sides, tuple) else (sides, sides))),
    ),
    "enable_bucket": Option("dataset.enable_bucket", "data", boolean, False),
    "min_bucket_reso": Option("dataset.min_bucket_reso", "data", whole, 256, needs=_BUCKETS),
    "max_bucket_reso": Option("dataset.max_bucket_reso", "data", whole, 1024, needs=_BUCKETS),
    "bucket_reso_steps": Option("dataset.bucket_reso_steps", "data", whole, 64, needs=_BUCKETS),
    "bucket_no_upscale": Option(
        "dataset.bucket_no_upscale", "data", boolean, False, needs=_BUCKETS
    ),
    "flip_aug": Option("dataset.flip_aug", "data", boolean, False),
    "shuffle_caption": Option("dataset.shuffle_caption", "data", boolean, False),
    "keep_tokens": Option("dataset.keep_tokens", "data", whole, 0, needs=_TAGS),
    "caption_dropout_rate": Option("dataset.caption_dropout_rate", "data", number, 0.0),
    "caption_dropout_every_n_epochs": Option(
        "dataset.caption_dropout_every_n_epochs", "data", whole, 0
    ),
    "caption_tag_dropout_rate": Option("dataset.caption_tag_dropout_rate", "data", number, 0.0),
    "caption_prefix": Option("dataset.caption_prefix", "data", text, None),
    "caption_suffix": Option("dataset.caption_suffix", "data", text, None),
    "caption_separator": Option("dataset.caption_separator", "data", text, ","),
    "keep_tokens_separator": Option(
        "dataset.keep_tokens_separator", "data", text, None, needs=_TAGS
    ),
    "secondary_separator": Option("dataset.secondary_separator", "data", text, None),
    "enable_wildcard": Option("dataset.enable_wildcard", "data", boolean, False),
    "token_warmup_min": Option(
        "dataset.token_warmup_min", "data", whole, 1, needs=("token_warmup_step",)
    ),
    "token_warmup_step": Option("dataset.token_warmup_step", "data", number, 0),
    "alpha_mask": Option("dataset.alpha_mask", "data", boolean, False),
    "prior_loss_weight": Option("dataset.prior_loss_weight", "data", number, 1.0),
    "save_precision": Option(
        "trainer.save_dtype", "saving", one_of(_READ_SAVED), "float", _SAVED.get
    ),
}
"""By sd-scripts' name."""

NOT_HERE: Mapping[str, tuple[tuple[str, ...], str]] = {
    "color_aug": ((), "changed colours"),
    "dataset_class": ((), "a data set of your own code"),
    "dataset_repeats": (("1",), "repeats of a data set by JSON"),
    "deepspeed": ((), "DeepSpeed"),
    "face_crop_aug_range": ((), "crops around faces"),
    "fp16_master_weights_and_gradients": ((), "adapters trained in fp16"),
    "fp8_base": ((), "a base in fp8"),
    "fp8_base_unet": ((), "a base in fp8"),
    "full_bf16": ((), "adapters trained in bf16"),
    "full_fp16": ((), "adapters trained in fp16"),
    "in_json": ((), "a data set by JSON"),
    "masked_loss": ((), "loss within masks, unless dataset.conditioning_data_dir names theirs"),
    "num_reg_images": ((), "regularisation images"),
    "random_crop": ((), "random crops"),
    "resize_interpolation": ((), "another way of scaling images"),
    "resume": ((), "a state of kohya's to go on from"),
    "v2": ((), "Stable Diffusion 2's layout"),
    "vae": ((), "another VAE than the base's"),
}
"""Option that lorasweep lacks -> values under which it says nothing beside 0, false and none, and
what it is otherwise. `num_reg_images` is of metadata alone."""

_IDLE = {
    "lorasweep keeps a checkpoint of every epoch": (
        "save_every_n_epochs save_every_n_steps save_last_n_epochs save_last_n_epochs_state"
        " save_last_n_steps save_last_n_steps_state save_n_epoch_ratio save_model_as"
    ),
    "a killed run goes on by itself (trainer.keep_states)": (
        "save_state save_state_on_train_end initial_epoch initial_step skip_until_initial_step"
    ),
    "it is about speed and memory, not the result": (
        "cache_latents cache_latents_to_disk skip_cache_check cache_info vae_batch_size lowram"
        " highvram max_data_loader_n_workers persistent_data_loader_workers xformers sdpa"
        " mem_eff_attn torch_compile dynamo_backend cpu_offload_checkpointing no_half_vae"
        " fused_backward_pass ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph"
        " offload_optimizer_device offload_optimizer_nvme_path offload_param_device"
        " offload_param_nvme_path zero3_init_flag zero3_save_16bit_model zero_stage"
    ),
    "places are for you to say (output_root)": "output_dir logging_dir tokenizer_cache_dir",
    "places are for you to say (dataset.reg_data_dir, dataset.conditioning_data_dir)": (
        "reg_data_dir conditioning_data_dir"
    ),
    "lorasweep logs to MLflow (tracking.*)": (
        "log_with log_prefix log_tracker_name log_tracker_config log_config wandb_run_name"
        " wandb_api_key console_log_level console_log_file console_log_simple"
    ),
    "nothing is sent to a hub": (
        "huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token"
        " huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface"
        " async_upload"
    ),
    "lorasweep writes kohya's metadata itself": (
        "training_comment no_metadata metadata_title metadata_author metadata_description"
        " metadata_license metadata_tags metadata_merged_from metadata_trigger_phrase"
        " metadata_preprocessor metadata_is_negative_embedding metadata_usage_hint"
        " metadata_thumbnail"
    ),
    "lorasweep scores on images of its own (dataset.num_holdout)": (
        "validation_split validation_seed validate_every_n_steps validate_every_n_epochs"
        " max_validation_steps"
    ),
    "lorasweep draws its own sample pictures (sampling.*)": (
        "sample_at_first sample_every_n_steps sample_sampler"
    ),
    "it only looks at the data or writes a config": "debug_dataset output_config config_file",
}
IDLE: Mapping[str, str] = {name: why for why, names in _IDLE.items() for name in names.split()}
"""Option that has no effect on what is trained -> why it has none here."""
