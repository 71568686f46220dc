"""kohya_ss's presets in the words of sd-scripts, as its train button writes them into a TOML.

Read from kohya_gui/lora_gui.py and common_gui.py of July 2026. It sends no 0, no false and no empty
text, so that sd-scripts' own defaults stand there, which are not always 0.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorasweep.core.settings import SettingsError
from lorasweep.core.text import shown
from lorasweep.reproduce.found_settings import FoundSettings, Said, said_as
from lorasweep.training.sd_scripts_options import NOT_UNDERSTOOD, OPTIONS, OURS, number

_DEFAULTS: Mapping[str, Any] = {
    "LoRA_type": "Standard",
    "LyCORIS_preset": "full",
    "bucket_no_upscale": True,
    "caption_extension": ".txt",
    "conv_alpha": 1,
    "conv_dim": 1,
    "enable_bucket": True,
    "epoch": 1,
    "learning_rate": 0.0001,
    "lr_scheduler": "cosine",
    "lr_warmup": 10,
    "max_bucket_reso": 2048,
    "max_resolution": "512,512",
    "max_train_steps": 1600,
    "network_dim": 8,
    "noise_offset_type": "Original",
    "optimizer": "AdamW",
    "text_encoder_lr": 0.0001,
    "unet_lr": 0.0001,
}
"""What its form holds where a preset says nothing, if that isn't sd-scripts' own default."""
_RENAMED = {
    "max_resolution": "resolution",
    "optimizer": "optimizer_type",
    "lora_network_weights": "network_weights",
}
_LOCON_ARGS = (
    "conv_dim conv_alpha use_tucker rank_dropout bypass_mode dora_wd module_dropout use_scalar"
    " rank_dropout_scale train_norm"
)
_NETWORKS: Mapping[str, tuple[str, str | None, str]] = {
    "Standard": ("networks.lora", None, "rank_dropout module_dropout"),
    "Kohya LoCon": ("networks.lora", None, "conv_dim conv_alpha rank_dropout module_dropout"),
    "LoCon": ("lycoris.kohya", "locon", _LOCON_ARGS),
    "LyCORIS/LoCon": ("lycoris.kohya", "locon", _LOCON_ARGS),
    "LyCORIS/LoHa": ("lycoris.kohya", "loha", _LOCON_ARGS),
    "LyCORIS/LoKr": (
        "lycoris.kohya",
        "lokr",
        "conv_dim conv_alpha use_tucker rank_dropout bypass_mode dora_wd module_dropout factor"
        " use_cp use_scalar decompose_both rank_dropout_scale train_norm",
    ),
    "LyCORIS/GLoRA": (
        "lycoris.kohya",
        "glora",
        "conv_dim conv_alpha use_tucker rank_dropout module_dropout rank_dropout_scale train_norm",
    ),
    "LyCORIS/Diag-OFT": (
        "lycoris.kohya",
        "diag-oft",
        "conv_dim conv_alpha use_tucker rank_dropout module_dropout rank_dropout_scale constrain"
        " rescaled train_norm",
    ),
    "LyCORIS/BOFT": (
        "lycoris.kohya",
        "boft",
        "conv_dim conv_alpha use_tucker rank_dropout module_dropout rank_dropout_scale train_norm",
    ),
    "LyCORIS/Native Fine-Tuning": (
        "lycoris.kohya",
        "full",
        "rank_dropout module_dropout rank_dropout_scale train_norm",
    ),
}
"""LoRA_type -> module, LyCORIS's algorithm, and what of the form it sends as network_args."""
_BLOCKS = (
    "down_lr_weight mid_lr_weight up_lr_weight block_lr_zero_threshold block_dims block_alphas"
    " conv_block_dims conv_block_alphas"
)
_LORA_PLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
_OF_NETWORKS = {
    *_BLOCKS.split(),
    *_LORA_PLUS,
    *(name for _, _, names in _NETWORKS.values() for name in names.split()),
    *("LyCORIS_preset", "train_on_input", "unit", "conv_dims", "conv_alphas"),
    *("train_lora_ggpo", "ggpo_sigma", "ggpo_beta"),
}
_WITH_NOISE = {
    "Original": ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale"),
    "Multires": ("multires_noise_iterations", "multires_noise_discount"),
}
_LAUNCH = {
    *("num_cpu_threads_per_process", "num_processes", "num_machines", "multi_gpu", "gpu_ids"),
    *("main_process_port", "dynamo_backend", "dynamo_mode", "dynamo_use_fullgraph"),
    *("dynamo_use_dynamic", "extra_accelerate_launch_args"),
}
_OF_THE_FORM = {
    "model_list": "it chooses what the form shows",
    "save_as_bool": "it is of the form alone",
    "lowvram": "sd-scripts has it no more",
    "no_token_padding": "sd-scripts has it no more",
    "stop_text_encoder_training": "kohya_ss reads over it",
    "stop_text_encoder_training_pct": "kohya_ss reads over it",
    "sdxl_cache_text_encoder_outputs": "it is about speed and memory, not the result",
    "sdxl_no_half_vae": "it is about speed and memory, not the result",
}
_OTHER_BASES = ("flux1_checkbox", "sd3_checkbox", "hunyuan_image_checkbox", "anima_checkbox")
_OTHERS_KEYS = {
    *("ae", "apply_t5_attn_mask", "clip_g", "clip_l", "discrete_flow_shift", "guidance_scale"),
    *("mem_eff_save", "model_prediction_type", "model_type", "split_mode", "split_qkv", "t5xxl"),
    *("t5xxl_lr", "t5xxl_max_token_length", "timestep_sampling", "train_blocks", "train_t5xxl"),
    *("blocks_to_swap", "double_blocks_to_swap", "single_blocks_to_swap", "weighting_scheme"),
    *("cpu_offload_checkpointing", "enable_all_linear", "lumina_checkbox", *_OTHER_BASES),
    *("img_attn_dim", "img_mlp_dim", "img_mod_dim", "single_dim", "txt_attn_dim", "txt_mlp_dim"),
    *("txt_mod_dim", "single_mod_dim", "in_dims", "show_timesteps", "show_timesteps_resolution"),
    *("train_double_block_indices", "train_single_block_indices", "clip_g_dropout_rate"),
    *("logit_mean", "logit_std", "mode_scale", "pos_emb_random_crop_rate", "save_clip"),
    *("save_t5xxl", "t5xxl_device", "t5xxl_dtype", "fp8_base_unet"),
}
_OTHERS_PREFIXES = ("flux1_", "sd3_", "hunyuan_", "anima_", "lumina_")


def as_options(preset: Mapping[str, Any], found: FoundSettings) -> dict[str, Said]:
    """What a preset has sd-scripts do, by its options; rows of `found` for what it doesn't send.

    Raises SettingsError for a preset of networks that lorasweep doesn't have, and for what is none.
    """
    form = {str(name): said_as(str(name), value) for name, value in preset.items()}
    if not form.keys() & {*_DEFAULTS, *_RENAMED}:
        raise SettingsError("it is no preset of kohya_ss: no key of its form is in it")
    if _is_sent(old := form.pop("use_8bit_adam", None)) and old is not None:
        form.setdefault("optimizer", old._replace(value="AdamW8bit"))
    elif old is not None:
        found.idle(old.where, "it is off")
    for name, value in _DEFAULTS.items():
        if name == "lr_warmup" and "lr_warmup_steps" in form:
            continue
        form.setdefault(name, Said(value, f"{name}={value}, kohya_ss's default", is_default=True))
    for name in _OTHER_BASES:
        if _is_sent(form.get(name)):
            raise SettingsError(f"{form[name].where}: lorasweep trains Stable Diffusion alone")
    if _is_sent(sdxl := form.pop("sdxl", None)) and sdxl is not None:
        found.leave(sdxl.where, "it is for bases of SDXL: model.path says which")
    elif sdxl is not None:
        found.idle(sdxl.where, "it is off")
    options = {
        **_network(form, found),
        **_noise(form, found),
        **_rates(form),
        **_schedule(form, found),
    }
    more = form.pop("additional_parameters", None)
    for name, said in form.items():
        if (why := _why_idle(name)) is not None:
            found.idle(said.where, why)
        elif name == "sample_prompts" and isinstance(said.value, str) and said.value.strip():
            options[name] = said._replace(value=list(_lines(said.value)))
        elif _is_sent(said):
            options[_RENAMED.get(name, name)] = _as_sent(name, said)
        elif not said.is_default:
            own = OPTIONS[name].default if name in OPTIONS else None
            holds = f", so that sd-scripts' own {own} holds" if own and own is not OURS else ""
            found.idle(said.where, f"kohya_ss sends no 0, false or empty text{holds}")
    if more is not None:
        options |= dict(_typed(more, found))
    return options


def _is_sent(said: Said | None) -> bool:
    """kohya_ss drops what equals an empty text, false or None, as 0 does."""
    text = "" if said is None else str(said.value).strip().lower()
    try:
        return text not in ("", "false", "none", "[]") and float(text) != 0
    except ValueError:
        return True


def _as_sent(name: str, said: Said) -> Said:
    """Arguments are one text in the form, in which quotes mean nothing."""
    if not name.endswith("_args") or not isinstance(said.value, str):
        return said
    return Said(said.value.replace('"', "").split(), said.where, said.is_default)


def _why_idle(name: str) -> str | None:
    if name in _OF_THE_FORM:
        return _OF_THE_FORM[name]
    if name in _LAUNCH:
        return "it is about how processes are started"
    if name in _OTHERS_KEYS or name.startswith(_OTHERS_PREFIXES):
        return "it is for other base models"
    return None


def _network(form: dict[str, Said], found: FoundSettings) -> dict[str, Said]:
    """The module and its arguments, of what the form holds for all of them."""
    kind = form.pop("LoRA_type")
    if str(kind.value) not in _NETWORKS:
        known = ", ".join(_NETWORKS)
        raise SettingsError(f"{shown(kind.where)}: lorasweep has no such network; it has {known}")
    module, algo, names = _NETWORKS[str(kind.value)]
    args: dict[str, Any] = {}
    if algo is not None:
        args = {"algo": kind._replace(value=algo), "preset": form.pop("LyCORIS_preset")}
    always = {"conv_dim", "conv_alpha", *(names.split() if algo else ())}
    sent = [*names.split(), *([] if algo else _BLOCKS.split()), *_LORA_PLUS]
    for name in sorted(_OF_NETWORKS & form.keys()):
        said = form.pop(name)
        if name in sent and (name in always or _is_sent(said)):
            args["constraint" if name == "constrain" else name] = said
        elif not said.is_default:
            why = "it is off" if name in sent else f"{kind.value} doesn't read it"
            found.idle(said.where, why)
    return {
        "network_module": Said(module, kind.where),
        "network_args": Said(args, "network_args"),
    }


def _noise(form: dict[str, Said], found: FoundSettings) -> dict[str, Said]:
    """Offset or pyramid, by noise_offset_type."""
    kind = form.pop("noise_offset_type")
    options = {}
    for name, keys in _WITH_NOISE.items():
        for key in keys:
            if (said := form.pop(key, None)) is None:
                continue
            if name == kind.value and _is_sent(said):
                options[key] = said
            else:
                why = "it is off" if name == kind.value else f"{kind.where} doesn't read it"
                found.idle(said.where, why)
    if not kind.is_default:
        found.idle(kind.where, "it says which of the noises are read")
    return options


def _rates(form: dict[str, Said]) -> dict[str, Said]:
    """A rate of 0 beside one that isn't leaves a part out; else learning_rate stands for it."""
    unet, text_encoder = form["unet_lr"], form["text_encoder_lr"]
    if _is_sent(unet) == _is_sent(text_encoder):
        return {}
    part = "unet" if _is_sent(unet) else "text_encoder"
    zero = form.pop("text_encoder_lr" if part == "unet" else "unet_lr")
    return {f"network_train_{part}_only": zero._replace(value=True)}


def _schedule(form: dict[str, Said], found: FoundSettings) -> dict[str, Said]:
    """Warm-up in percent, and how long."""
    options = {}
    percent, steps = form.pop("lr_warmup", None), form.pop("lr_warmup_steps", None)
    if _is_sent(steps) and steps is not None:
        options["lr_warmup_steps"] = steps
        if percent is not None:
            found.idle(percent.where, f"{steps.where} outdoes it")
    elif percent is not None:
        try:
            options["lr_warmup_steps"] = percent._replace(value=number(percent.value) / 100)
        except NOT_UNDERSTOOD:
            options["lr_warmup_steps"] = percent
        if steps is not None:
            found.idle(steps.where, "it is off")
    epoch, limit = form.pop("epoch"), form["max_train_steps"]
    if _is_sent(form.get("max_train_epochs")) or _is_sent(limit):
        outdone_by = form["max_train_epochs"] if _is_sent(form.get("max_train_epochs")) else limit
        if not epoch.is_default:
            found.idle(epoch.where, f"{outdone_by.where} outdoes it")
            found.notes.append(
                f"{epoch.where}: kohya_ss sends {outdone_by.where}, and sd-scripts has no option"
                " epoch; trainer.max_train_epochs and max_train_steps say how long"
            )
    else:  # it multiplies images, repeats and epochs itself
        form.pop("max_train_steps")
        form.pop("max_train_epochs", None)
        options["max_train_epochs"] = epoch
        if not limit.is_default:
            found.idle(limit.where, f"it is off: {epoch.where} says how long")
    return options


def _lines(text: str) -> Iterator[str]:
    """The prompts of a text, one a line; # begins a comment."""
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            yield line.strip()


def _typed(said: Said, found: FoundSettings) -> Iterator[tuple[str, Said]]:
    """What additional_parameters add to sd-scripts' command line, which outdoes the TOML."""
    label = "additional_parameters"
    try:
        words: Sequence[str] = shlex.split(str(said.value))
    except ValueError:
        found.leave(said.where, "not understood")
        return
    if not words:
        found.idle(said.where, "it is empty")
    place = 0
    while place < len(words):
        name, equals, value = words[place].removeprefix("--").partition("=")
        place += 1
        values = [value] if equals else []
        while not equals and place < len(words) and not words[place].startswith("--"):
            values.append(words[place])
            place += 1
        where = shown(f"{label}: --{name}{'=' * bool(values)}{' '.join(values)}", 200)
        is_list = name.endswith("_args")
        yield name, Said(values if is_list else values[0] if values else True, where)
