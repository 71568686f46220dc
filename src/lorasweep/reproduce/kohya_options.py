"""kohya's `ss_*` metadata in the words of conf/: which entry is which setting."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.config.compose import compose_without_images
from lorasweep.config.conf_folder import groups
from lorasweep.core.settings import build
from lorasweep.lora_files.info import Info

if TYPE_CHECKING:
    from lorasweep.reproduce.foreign_file import Guess

LEAVE = object()
"""The entry says nothing that our default doesn't."""

Convert = Callable[[str], Any]
_OFF = ("None", "", "null")


def _boolean(said: str) -> bool:
    return {"True": True, "False": False, "None": False}[said]


def _number(said: str) -> float:
    return 0.0 if said in _OFF else float(said)


def _optional(said: str) -> float | None:
    return None if said in _OFF or float(said) == 0 else float(said)


def _rate(said: str) -> float:
    """A text encoder's may be a list, of which networks.lora and LyCORIS use the first."""
    value = ast.literal_eval(said)
    return float(value[0] if isinstance(value, list | tuple) else value)


def _size(said: str) -> list[int]:
    """(512, 650), or 512: width first."""
    value = ast.literal_eval(said)
    sides = [value, value] if isinstance(value, int) else list(value)
    return [int(side) for side in sides]


def _side(said: str) -> Any:
    return LEAVE if said in _OFF else int(said)


def _whole(said: str) -> Any:
    return LEAVE if said in _OFF else int(float(said))


PLAIN: dict[str, tuple[str, Convert]] = {
    "seed": ("ss_seed", _whole),
    "trainer.max_train_epochs": ("ss_num_epochs", int),
    "trainer.gradient_accumulation_steps": ("ss_gradient_accumulation_steps", int),
    "trainer.gradient_checkpointing": ("ss_gradient_checkpointing", _boolean),
    "trainer.precision": (
        "ss_mixed_precision",
        lambda said: {"no": "fp32", "None": "fp32", "fp16": "fp16", "bf16": "bf16"}[said],
    ),
    "trainer.noise_offset": ("ss_noise_offset", _number),
    "trainer.min_snr_gamma": ("ss_min_snr_gamma", _optional),
    "optimizer.max_grad_norm": ("ss_max_grad_norm", _number),
    "lr_scheduler.warmup": ("ss_lr_warmup_steps", _whole),
    "model.clip_skip": ("ss_clip_skip", lambda said: 1 if said in _OFF else int(said)),
    "adapter.scale_weight_norms": ("ss_scale_weight_norms", _optional),
}
"""Our setting -> kohya's entry, and how its text is read."""

_OF_DATA: dict[str, tuple[str, str, Convert]] = {
    "trainer.batch_size": ("ss_batch_size_per_device", "batch_size_per_device", int),
    "dataset.resolution": ("ss_resolution", "resolution", _size),
    "dataset.enable_bucket": ("ss_enable_bucket", "enable_bucket", _boolean),
    "dataset.bucket_no_upscale": ("ss_bucket_no_upscale", "bucket_no_upscale", _boolean),
    "dataset.min_bucket_reso": ("ss_min_bucket_reso", "min_bucket_reso", _side),
    "dataset.max_bucket_reso": ("ss_max_bucket_reso", "max_bucket_reso", _side),
    "dataset.flip_aug": ("ss_flip_aug", "flip_aug", _boolean),
    "dataset.shuffle_caption": ("ss_shuffle_caption", "shuffle_caption", _boolean),
    "dataset.keep_tokens": ("ss_keep_tokens", "keep_tokens", int),
    "dataset.caption_dropout_rate": ("ss_caption_dropout_rate", "caption_dropout_rate", _number),
    "dataset.caption_dropout_every_n_epochs": (
        "ss_caption_dropout_every_n_epochs",
        "caption_dropout_every_n_epochs",
        int,
    ),
    "dataset.caption_tag_dropout_rate": (
        "ss_caption_tag_dropout_rate",
        "caption_tag_dropout_rate",
        _number,
    ),
}
"""Likewise of a data set; with several or a TOML, kohya has them inside ss_datasets."""

NOT_HERE: dict[str, tuple[tuple[str, ...], str]] = {
    "ss_num_reg_images": (("0",), "regularisation images"),
    "ss_multires_noise_iterations": (("None", "0"), "pyramid noise"),
    "ss_adaptive_noise_scale": (("None",), "noise offset that follows the latents"),
    "ss_ip_noise_gamma": (("None", "0.0"), "noise on the input"),
    "ss_noise_offset_random_strength": (("False", "None"), "noise offset of random strength"),
    "ss_loss_type": (("l2", "None"), "another loss than the squared"),
    "ss_face_crop_aug_range": (("None",), "crops around faces"),
    "ss_color_aug": (("False", "None"), "changed colours"),
    "ss_random_crop": (("False", "None"), "random crops"),
    "ss_full_fp16": (("False", "None"), "adapters trained in fp16"),
    "ss_fp8_base": (("False", "None"), "a base in fp8"),
    "ss_debiased_estimation": (("False", "None"), "debiased loss"),
    "ss_max_token_length": (("None", "75"), "prompts longer than the text encoder's"),
    "ss_prior_loss_weight": (("1.0", "1", "None"), "weight of regularisation images"),
    "ss_v2": (("False", "None"), "Stable Diffusion 2's layout"),
}
"""Entry -> values under which it says nothing, and what it means otherwise."""

NEVER_TOLD: list[tuple[str, str]] = [
    ("the images", "give them as dataset.image_dir=FOLDER; kohya logs their number alone"),
    (
        "the captions",
        "read from .txt files beside the images; kohya logs their tags' numbers alone",
    ),
    ("order, noise and first weights", "kohya draws them otherwise from the same seed"),
    ("latents", "kohya's are one random draw of the VAE, ours its most likely value"),
    ("min_timestep, max_timestep", "all timesteps are used"),
]


def network(found: Guess, metadata: Mapping[str, str], told: Info) -> None:
    """Adapter, rank, alpha and the network's arguments; by the tensors where there are none."""
    args = _object(metadata, "ss_network_args")
    module = metadata.get("ss_network_module", "")
    kind = _kind(module, args, told)
    found.options["adapter"] = kind
    found.sources["adapter"] = f"ss_network_module={module}" if module else f"tensors: {told.type}"
    algo = args.get("algo")
    if kind == "lycoris":
        found.take("adapter.algo", algo, f"ss_network_args: algo={algo}")
    _dims(found, metadata, args, told)
    _take_args(found, args, kind)
    _targets(found, args, told, kind)
    dtypes = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    dtype = dtypes.get(next(iter(told.dtypes), ""))
    if dtype:
        found.take("trainer.save_dtype", dtype, f"tensors: {next(iter(told.dtypes))}")


def _kind(module: str, args: Mapping[str, Any], told: Info) -> str:
    """The option of conf/adapter."""
    algo = str(args.get("algo", "locon")).lower() if module.startswith("lycoris") else ""
    if str(args.get("dora_wd", "False")) == "True" or "DoRA" in told.type:
        return "dora"
    if algo in ("loha", "lokr"):
        return algo
    if algo and algo not in ("lora", "locon"):
        return "lycoris"
    if "conv_dim" in args or algo == "locon" or "(LoCon)" in told.type:
        return "locon"
    by_type = {"LoHa": "loha", "LoKr": "lokr", "GLoRA": "lycoris", "OFT": "lycoris"}
    return next((kind for name, kind in by_type.items() if told.type.startswith(name)), "lora")


def _dims(found: Guess, metadata: Mapping[str, str], args: Mapping[str, Any], told: Info) -> None:
    ranks = [rank for of in told.ranks.values() for rank in of if rank.isdigit()]
    alphas = [alpha for alpha in told.alphas if alpha.replace(".", "", 1).isdigit()]
    rank, alpha = metadata.get("ss_network_dim", "None"), metadata.get("ss_network_alpha", "None")
    if rank not in _OFF:
        found.take("adapter.rank", int(float(rank)), f"ss_network_dim={rank}")
    elif ranks:
        found.take("adapter.rank", int(ranks[0]), f"tensors: rank {ranks[0]}")
    else:
        found.unknown.append(("adapter.rank", "the default stands"))
    if alpha not in _OFF:
        found.take("adapter.alpha", float(alpha), f"ss_network_alpha={alpha}")
    elif alphas:
        found.take("adapter.alpha", float(alphas[0]), f"tensors: alpha {alphas[0]}")
    if (dropout := metadata.get("ss_network_dropout", "None")) not in (*_OFF, "0", "0.0"):
        if found.options["adapter"] in ("lora", "locon", "dora"):
            found.take("adapter.network_dropout", float(dropout), f"ss_network_dropout={dropout}")
        else:
            found.unknown.append((f"ss_network_dropout={dropout}", "this type has none here"))
    for name, setting, default in (
        ("conv_dim", "conv_rank", None),
        ("conv_alpha", "conv_alpha", 1),
    ):
        if found.options["adapter"] == "lora":
            continue
        if (said := args.get(name, default if "conv_dim" in args else None)) is not None:
            number = int(float(said)) if name == "conv_dim" else float(said)
            found.take(f"adapter.{setting}", number, f"ss_network_args: {name}={said}")


def _take_args(found: Guess, args: Mapping[str, Any], kind: str) -> None:
    """Arguments of the network that are ours too; the others are listed."""
    rates = {"rank_dropout", "module_dropout"} if kind != "lycoris" else set()
    flags = (
        {"decompose_both": "decompose_both", "full_matrix": "full_matrix"} if kind == "lokr" else {}
    )
    known = {"algo", "preset", "conv_dim", "conv_alpha", "dropout", "dora_wd"}
    for name, said in args.items():
        off = str(said) in ("False", "None", "0", "0.0", "")
        if name in rates:
            if not off:
                found.take(f"adapter.{name}", float(said), f"ss_network_args: {name}={said}")
        elif name in flags:
            found.take(
                f"adapter.{flags[name]}", str(said) == "True", f"ss_network_args: {name}={said}"
            )
        elif name == "factor" and kind == "lokr":
            found.take("adapter.factor", int(said), f"ss_network_args: factor={said}")
        elif name not in known and not off:
            found.unknown.append((f"ss_network_args: {name}={said}", "not taken over"))


def _targets(found: Guess, args: Mapping[str, Any], told: Info, kind: str) -> None:
    presets = {"full": "full", "attn-mlp": "attn-mlp", "unet-transformer-only": "unet-only"}
    said = args.get("preset")
    if said in presets:
        found.take("adapter.targets", presets[str(said)], f"ss_network_args: preset={said}")
    elif told.targets in ("attn-mlp", "conv", "full", "unet-only"):
        if kind != "lora" or told.targets in ("attn-mlp", "unet-only"):
            found.take("adapter.targets", told.targets, "tensors' names")
    else:
        found.unknown.append((f"targets ({told.targets})", "the adapter's default stands"))


def optimizer(found: Guess, metadata: Mapping[str, str]) -> None:
    """Class and its arguments, learning rates, schedule."""
    said = metadata.get("ss_optimizer", "")
    name, _, arguments = said.partition("(")
    options = {
        "AdamW8bit": "adamw8bit",
        "AdamW": "adamw",
        "Lion": "lion",
        "Prodigy": "prodigy",
        "SGD": "sgd",
    }
    short = name.rpartition(".")[2]
    found.options["optimizer"] = options.get(short, "adamw")
    found.sources["optimizer"] = f"ss_optimizer={said}"
    if not said:
        found.unknown.append(("optimizer", "no ss_optimizer in the file; AdamW stands"))
    elif short not in options:
        found.unknown.append((f"optimizer {name}", "AdamW stands; optimizer.type may name it"))
    if arguments:
        _arguments(found, arguments.removesuffix(")"))
    _rates(found, metadata)
    _schedule(found, metadata)


def _arguments(found: Guess, text: str) -> None:
    """The optimiser's arguments, as kohya writes them: weight_decay=0.1,betas=(0.9, 0.99)."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        named = {one.arg: ast.literal_eval(one.value) for one in call.keywords if one.arg}
    except (ValueError, SyntaxError, AssertionError, RecursionError, MemoryError):
        found.unknown.append((f"optimizer arguments {text}", "not understood; left out"))
        return
    for name, value in named.items():
        plain = list(value) if isinstance(value, tuple) else value
        found.take(f"optimizer.args.{name}", plain, f"ss_optimizer: {name}={value}")


def _rates(found: Guess, metadata: Mapping[str, str]) -> None:
    fallback = metadata.get("ss_learning_rate", "None")
    for setting, key in (("unet_lr", "ss_unet_lr"), ("text_encoder_lr", "ss_text_encoder_lr")):
        said = metadata.get(key, "None")
        used, source = (said, key) if said not in _OFF else (fallback, "ss_learning_rate")
        try:
            found.take(f"optimizer.{setting}", _rate(used), f"{source}={used}")
        except (ValueError, SyntaxError, TypeError, IndexError):
            found.unknown.append((f"optimizer.{setting}", "the default stands"))


def _schedule(found: Guess, metadata: Mapping[str, str]) -> None:
    said = metadata.get("ss_lr_scheduler", "")
    plain = "constant" if said == "constant_with_warmup" else said
    if plain in groups()["lr_scheduler"]:
        found.options["lr_scheduler"] = plain
        found.sources["lr_scheduler"] = f"ss_lr_scheduler={said}"
    else:
        found.options["lr_scheduler"] = "constant"
        found.unknown.append((f"lr_scheduler {said}", "constant stands"))
    if plain in ("cosine_with_restarts", "polynomial"):
        found.unknown.append((f"{plain}'s restarts or power", "the default stands"))


def data(found: Guess, metadata: Mapping[str, str]) -> None:
    """Folders with their repeats, and how images and captions are read."""
    datasets = _list(metadata, "ss_datasets")
    if len(datasets) > 1:
        found.unknown.append((f"{len(datasets)} data sets", "the first one's settings are taken"))
    inside: Mapping[str, Any] = datasets[0] if datasets and isinstance(datasets[0], dict) else {}
    for setting, (key, name, convert) in _OF_DATA.items():
        said = metadata.get(key, str(inside[name]) if name in inside else None)
        try:
            value = LEAVE if said is None else convert(said.replace("[", "(").replace("]", ")"))
        except (ValueError, KeyError, SyntaxError, TypeError):
            said, value = None, LEAVE
        if value is not LEAVE:
            found.take(setting, value, f"{key}={said}")
        elif said is None:
            found.unknown.append((setting, f"no {key} in the file; the default stands"))
    _folders(found, metadata)


def _folders(found: Guess, metadata: Mapping[str, str]) -> None:
    counts = []
    for folder, entry in _object(metadata, "ss_dataset_dirs").items():
        values = entry if isinstance(entry, dict) else {}
        repeats, images = values.get("n_repeats"), values.get("img_count")
        number, _, rest = folder.partition("_")
        arm = "".join(c if c.isalnum() or c in "-_" else "-" for c in (rest or folder)).strip("-")
        if not isinstance(repeats, int) or repeats < 1:
            found.unknown.append((f"repeats of {folder}", "left out"))
            continue
        found.arms[arm or number] = repeats
        counts.append(images if isinstance(images, int) else 0)
    if not counts:
        found.unknown.append(("folders and repeats", "one arm of .txt files, conf/'s repeats"))
        return
    if max(counts) > 0:
        found.take("dataset.num_images", max(counts), f"ss_dataset_dirs: {max(counts)} images")
        found.take("dataset.num_holdout", 0, "kohya trains on all images")
    if len(counts) > 1:
        found.unknown.append(
            (f"{len(counts)} folders", "taken as arms of the same images, each with .txt captions")
        )


def model(found: Guess, metadata: Mapping[str, str]) -> None:
    """The base model, by its name; its hash is kohya's and of a file."""
    name, digest = metadata.get("ss_sd_model_name", ""), metadata.get("ss_new_sd_model_hash", "")
    found.options["model"] = "sd15"
    found.sources["model"] = f"ss_base_model_version={metadata.get('ss_base_model_version')}"
    for option in groups()["model"]:
        path = build(compose_without_images([f"model={option}"]).model, "model").path
        if name and name in (path, Path(path).name):
            found.options["model"], found.sources["model"] = option, f"ss_sd_model_name={name}"
            break
    else:
        sha = f", sha256 {digest[:16]}…" if len(digest) == 64 else ""
        found.unknown.append(
            (
                f"where the base model {name or '(no name)'}{sha} is",
                "give model.path=FILE; else SD1.5",
            )
        )
    if metadata.get("ss_v_parameterization") == "True" or (
        metadata.get("modelspec.prediction_type") == "v"
    ):
        found.take("model.prediction_type", "v_prediction", "modelspec.prediction_type=v")


def _object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (json.JSONDecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _list(metadata: Mapping[str, str], key: str) -> list[Any]:
    try:
        value = json.loads(metadata.get(key, "[]"))
    except (json.JSONDecodeError, RecursionError):
        return []
    return value if isinstance(value, list) else []
