"""kohya's `ss_*` metadata in the words of conf/: which entry is which setting, as plain tables."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

KEEP_DEFAULT = object()
"""The entry says nothing that our default doesn't."""

Converter = Callable[[str], Any]
OFF = ("None", "", "null")
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
"""What a converter raises for a text that it can't read; files may come from anybody."""


def plain(said: str) -> Any:
    """A number, text or list as Python writes it; Python's parser is no place for a long text."""
    if len(said) > MAX_LITERAL:
        raise ValueError("too long")
    return ast.literal_eval(said)


def boolean(said: str) -> bool:
    return {"True": True, "False": False, "None": False}[said]


def number(said: str) -> float:
    return 0.0 if said in OFF else float(said)


def optional(said: str) -> float | None:
    return None if said in OFF or float(said) == 0 else float(said)


def whole(said: str) -> Any:
    return KEEP_DEFAULT if said in OFF else int(float(said))


def count(said: str) -> int:
    return 0 if said in OFF else int(float(said))


def only_if_true(said: str) -> Any:
    return boolean(said) or KEEP_DEFAULT


def last_timestep(said: str) -> Any:
    """Of MIN,MAX."""
    return KEEP_DEFAULT if said in OFF else int(said.split(",")[1])


def warmup(said: str) -> Any:
    """Steps, or a fraction of all."""
    return KEEP_DEFAULT if said in OFF else float(said)


def learning_rate(said: str) -> float:
    """A text encoder's may be a list, of which networks.lora and LyCORIS use the first."""
    value = plain(said)
    return float(value[0] if isinstance(value, list | tuple) else value)


def size(said: str) -> list[int]:
    """(512, 650), or 512: width first."""
    value = plain(said)
    sides = [value, value] if isinstance(value, int) else list(value)
    return [int(side) for side in sides]


def arguments(said: str) -> dict[str, Any]:
    """An optimiser's arguments: weight_decay=0.1,betas=(0.9, 0.99)."""
    if len(said) > MAX_LITERAL:
        raise ValueError("too long")
    call = ast.parse(f"f({said})", mode="eval").body
    if not isinstance(call, ast.Call):
        raise ValueError(said)
    named = {one.arg: ast.literal_eval(one.value) for one in call.keywords if one.arg}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in named.items()}


SETTINGS: dict[str, tuple[str, Converter]] = {
    "seed": ("ss_seed", whole),
    "trainer.max_train_epochs": ("ss_num_epochs", int),
    "trainer.gradient_accumulation_steps": ("ss_gradient_accumulation_steps", int),
    "trainer.gradient_checkpointing": ("ss_gradient_checkpointing", boolean),
    "trainer.precision": (
        "ss_mixed_precision",
        lambda said: {"no": "fp32", "None": "fp32", "fp16": "fp16", "bf16": "bf16"}[said],
    ),
    "trainer.noise_offset": ("ss_noise_offset", number),
    "trainer.min_snr_gamma": ("ss_min_snr_gamma", optional),
    "optimizer.max_grad_norm": ("ss_max_grad_norm", number),
    "lr_scheduler.warmup": ("ss_lr_warmup_steps", warmup),
    "model.clip_skip": ("ss_clip_skip", lambda said: 1 if said in OFF else int(said)),
    "adapter.scale_weight_norms": ("ss_scale_weight_norms", optional),
}
"""Our setting -> kohya's entry, and how its text is read."""

LATER_SETTINGS: dict[str, tuple[str, Converter]] = {
    "trainer.noise_offset_random_strength": ("ss_noise_offset_random_strength", boolean),
    "trainer.adaptive_noise_scale": ("ss_adaptive_noise_scale", number),
    "trainer.multires_noise_iterations": ("ss_multires_noise_iterations", count),
    "trainer.multires_noise_discount": ("ss_multires_noise_discount", number),
    "trainer.ip_noise_gamma": ("ss_ip_noise_gamma", number),
    "trainer.ip_noise_gamma_random_strength": ("ss_ip_noise_gamma_random_strength", boolean),
    "trainer.loss_type": ("ss_loss_type", str),
    "trainer.huber_schedule": ("ss_huber_schedule", str),
    "trainer.huber_c": ("ss_huber_c", float),
    "trainer.huber_scale": ("ss_huber_scale", float),
    "trainer.debiased_estimation_loss": ("ss_debiased_estimation", boolean),
    "model.max_token_length": ("ss_max_token_length", whole),
    "model.zero_terminal_snr": ("ss_zero_terminal_snr", only_if_true),
    "trainer.min_timestep": ("modelspec.timestep_range", lambda said: count(said.split(",")[0])),
    "trainer.max_timestep": ("modelspec.timestep_range", last_timestep),
}
"""Likewise, of entries that older files lack, where the option was off."""

DATASET_SETTINGS: dict[str, tuple[str, Converter]] = {
    "trainer.batch_size": ("batch_size_per_device", int),
    "dataset.resolution": ("resolution", size),
    "dataset.enable_bucket": ("enable_bucket", boolean),
    "dataset.bucket_no_upscale": ("bucket_no_upscale", boolean),
    "dataset.min_bucket_reso": ("min_bucket_reso", whole),
    "dataset.max_bucket_reso": ("max_bucket_reso", whole),
    "dataset.flip_aug": ("flip_aug", boolean),
    "dataset.shuffle_caption": ("shuffle_caption", boolean),
    "dataset.keep_tokens": ("keep_tokens", int),
    "dataset.caption_dropout_rate": ("caption_dropout_rate", number),
    "dataset.caption_dropout_every_n_epochs": ("caption_dropout_every_n_epochs", int),
    "dataset.caption_tag_dropout_rate": ("caption_tag_dropout_rate", number),
}
"""Our setting -> kohya's name inside ss_datasets, where it has it with several data sets or a TOML,
and after `ss_` else; and how its text is read."""

NOT_IN_LORASWEEP: dict[str, tuple[tuple[str, ...], str]] = {
    "ss_num_reg_images": (("0",), "regularisation images"),
    "ss_face_crop_aug_range": (("None",), "crops around faces"),
    "ss_color_aug": (("False", "None"), "changed colours"),
    "ss_random_crop": (("False", "None"), "random crops"),
    "ss_full_fp16": (("False", "None"), "adapters trained in fp16"),
    "ss_fp8_base": (("False", "None"), "a base in fp8"),
    "ss_prior_loss_weight": (("1.0", "1", "None"), "weight of regularisation images"),
    "ss_v2": (("False", "None"), "Stable Diffusion 2's layout"),
}
"""Entry -> values under which it says nothing, and what it means otherwise."""

NEVER_LOGGED: list[tuple[str, str]] = [
    ("the images", "give them as dataset.image_dir=FOLDER; kohya logs their number alone"),
    (
        "the captions",
        "read from .txt files beside the images; kohya logs their tags' numbers alone",
    ),
    ("order, noise and first weights", "kohya draws them otherwise from the same seed"),
    ("latents", "kohya's are one random draw of the VAE, ours its most likely value"),
]
"""What no entry says, and what stands instead."""

OPTIMIZERS = {
    "AdamW8bit": "adamw8bit",
    "PagedAdamW8bit": "paged_adamw8bit",
    "AdamW": "adamw",
    "AdamWScheduleFree": "adamw_schedulefree",
    "ProdigyPlusScheduleFree": "prodigy_plus_schedulefree",
    "DAdaptAdam": "dadapt_adam",
    "CAME": "came",
    "Adafactor": "adafactor",
    "Lion": "lion",
    "Prodigy": "prodigy",
    "SGD": "sgd",
}
"""Class -> option of conf/optimizer."""
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
PRESETS = {"full": "full", "attn-mlp": "attn-mlp", "unet-transformer-only": "unet-only"}
"""LyCORIS's preset -> adapter.targets."""
NETWORK_ARGS: dict[str, tuple[Converter, tuple[str, ...]]] = {
    "rank_dropout": (number, ("lora", "locon", "dora", "loha", "lokr")),
    "module_dropout": (number, ("lora", "locon", "dora", "loha", "lokr")),
    "decompose_both": (boolean, ("lokr",)),
    "full_matrix": (boolean, ("lokr",)),
    "factor": (int, ("lokr",)),
}
"""Argument of the network -> how its text is read, and the options of conf/adapter that have it
under the same name."""
READ_ELSEWHERE = {"algo", "preset", "conv_dim", "conv_alpha", "dropout", "dora_wd"}
"""Arguments of the network that decide the adapter's option, rank, alpha and targets."""
