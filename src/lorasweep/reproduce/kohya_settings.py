"""sd-scripts' options as our settings: what presets, TOML files and LoRAs' metadata have in common.

Options that say one setting each are in the table `sd_scripts_options.OPTIONS`; here is what only
several say: the network, the optimiser, its schedule, how long.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from omegaconf import OmegaConf

from lorasweep.config.build_run import model_named
from lorasweep.config.conf_folder import conf_dir, groups
from lorasweep.core.settings import MAX_NAME
from lorasweep.reproduce.found_settings import NEUTRAL, FoundSettings, Options, Said
from lorasweep.reproduce.kohya_network import read_network
from lorasweep.training.lr_schedulers import READ_BY
from lorasweep.training.sd_scripts_config import OPTIMIZERS
from lorasweep.training.sd_scripts_options import (
    IDLE,
    MAX_LITERAL,
    NOT_HERE,
    NOT_UNDERSTOOD,
    OPTIONS,
    OURS,
    is_off,
    number,
    plain,
    whole,
)

_MAX_EPOCHS = 10_000  # of trainer.max_train_epochs
_PARTS = ("unet", "text_encoder")
_PIXELS = 8  # a side of one latent, in every Stable Diffusion

CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "adamw": {"weight_decay": 0.01},
    "adamw8bit": {"weight_decay": 0.01},
    "paged_adamw8bit": {"weight_decay": 0.01},
    "adamw_schedulefree": {"weight_decay": 0},
    "prodigy_plus_schedulefree": {"weight_decay": 0.0},
    "dadapt_adam": {"decouple": False, "weight_decay": 0},
    "came": {"weight_decay": 0.0},
    "lion": {"weight_decay": 0.0},
    "prodigy": {"weight_decay": 0.0},
    "sgd": {"momentum": 0.0},
    "adafactor": {"relative_step": True, "scale_parameter": True, "warmup_init": False},
}
"""Option of conf/optimizer -> what its class does by itself with the arguments that conf/ gives."""


def take_over(said: Mapping[str, Said], found: FoundSettings, *, with_defaults: bool) -> None:
    """Take what sd-scripts' options say into `found`, which gets a row for each of them.

    `with_defaults`: what is not said is what sd-scripts does by itself. Raises SettingsError for a
    network that lorasweep doesn't have.
    """
    options = Options(said, found, with_defaults=with_defaults)
    read_network(options, found)
    _optimizer(options, found)
    _rates(options, found)
    _schedule(options, found)
    _steps(options, found)
    _model(options, found)
    _data(options, found)
    unsaid = [OPTIONS[name].setting for name in OPTIONS if not _alone(name, options, found)]
    if unsaid:
        found.leave(", ".join(unsaid), "the file says nothing of it; lorasweep's defaults stand")
    _resolution(found)
    where = found.sources["lr_scheduler"]
    if where.endswith("=constant") and found.settings.get("lr_scheduler.warmup"):
        warmup = found.sources["lr_scheduler.warmup"]
        found.notes.append(f"{warmup}: sd-scripts refuses it with {where}; lorasweep warms up")
    for name, rest in options.rest():
        _without_a_setting(name, rest, found)


def _alone(name: str, options: Options, found: FoundSettings) -> bool:
    """Take an option that says one setting by itself; False where the file should say it."""
    option = OPTIONS[name]
    said = options.pop(name, option.default)
    group, _, setting = option.setting.rpartition(".")
    why = ""
    if option.needs and not any(found.settings.get(OPTIONS[one].setting) for one in option.needs):
        why = f"it has none without {' or '.join(option.needs)}"
    elif not _is_read(group, setting, found):
        why = f"lr_scheduler={found.choices['lr_scheduler']} doesn't read it"
    if why:
        if said is not None and not said.is_default:
            found.idle(said.where, why)
    elif said is None:
        return False
    else:
        found.read(option.setting, said, option.read)
    return True


def _is_read(group: str, setting: str, found: FoundSettings) -> bool:
    """Does the chosen schedule read this setting of its own?"""
    if group != "lr_scheduler":
        return True
    kind = found.choices["lr_scheduler"]
    if setting == "warmup":
        return kind not in ("piecewise_constant", "adafactor")
    return kind in READ_BY[setting][1]


def _without_a_setting(name: str, said: Said, found: FoundSettings) -> None:
    neutral, meaning = NOT_HERE.get(name, ((), ""))
    if str(said.value).lower() in (*NEUTRAL, *neutral):
        found.idle(said.where, "it says what sd-scripts does anyway")
    elif name in IDLE:
        found.idle(said.where, IDLE[name])
    elif name in NOT_HERE:
        found.leave(said.where, f"{meaning}: not in lorasweep")
    else:
        found.ignore(said.where, "sd-scripts has no such option, and reads over it")


def _optimizer(options: Options, found: FoundSettings) -> None:
    """Class and arguments."""
    kind = options.pop("optimizer_type", "AdamW")
    for name, stands_for in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        if (old := options.is_on(name)) is not None:
            kind = Said(stands_for, old.where)
    args = _optimizer_args(options, found)
    if kind is None or is_off(kind.value):
        kind = Said("AdamW", "optimizer_type, which is not said")
    short = str(kind.value).rpartition(".")[2].lower()
    if short == "sgdnesterov":
        args = {"momentum": Said(0.9, kind.where), "nesterov": Said(True, kind.where), **args}
    option = _optimizer_options().get("sgd" if short == "sgdnesterov" else short)
    found.choose("optimizer", option or "adamw", kind.where)
    if option is None:
        found.leave(kind.where, "AdamW stands; optimizer.type=… on the command line may name it")
        for said in args.values():
            found.leave(said.where, "its optimiser is left out")
        return
    for name, default in CLASS_DEFAULTS.get(option, {}).items():
        where = f"{name} of {kind.where}, which is not said"
        args.setdefault(name, Said(default, where, is_default=True))
    for name, said in args.items():
        found.read(f"optimizer.args.{name}", said, _argument)


def _optimizer_options() -> dict[str, str]:
    """sd-scripts' name of an optimiser, in small letters -> the option of conf/optimizer."""
    found = {}
    for file in sorted((conf_dir() / "optimizer").glob("*.yaml")):
        kind = str(OmegaConf.select(OmegaConf.load(file), "type"))
        found[OPTIMIZERS.get(kind, kind).rpartition(".")[2].lower()] = file.stem
    return found


def _optimizer_args(options: Options, found: FoundSettings) -> dict[str, Said]:
    """By name, from a list of NAME=VALUE, or as metadata has them: weight_decay=0.1,betas=(…)."""
    said = options.pop("optimizer_args")
    if said is None or is_off(said.value) or said.value == []:
        if said is not None:
            found.idle(said.where, "it is empty")
        return {}
    label = said.where.partition("=")[0]
    try:
        if isinstance(said.value, list):
            pairs = dict(str(one).split("=") for one in said.value)
            values = {name: plain(value) for name, value in pairs.items()}
        else:
            values = _call_arguments(str(said.value))
        if not all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in values):
            raise ValueError
    except NOT_UNDERSTOOD:
        found.leave(said.where, "not understood")
        return {}
    return {name: Said(value, f"{label}: {name}={value}") for name, value in values.items()}


def _call_arguments(said: str) -> dict[str, Any]:
    if len(said) > MAX_LITERAL:
        raise ValueError("too long")
    call = ast.parse(f"f({said})", mode="eval").body
    if not isinstance(call, ast.Call):
        raise ValueError(said)
    return {one.arg: ast.literal_eval(one.value) for one in call.keywords if one.arg}


def _argument(value: Any) -> Any:
    """A value that a config can hold."""
    if isinstance(value, list | tuple):
        return [_argument(one) for one in value]
    if not isinstance(value, str | int | float | None):
        raise ValueError(value)
    return value


def _rates(options: Options, found: FoundSettings) -> None:
    """Learning rates by part; what is not said is learning_rate."""
    common = options.pop("learning_rate", 2e-6)
    left_out = {
        "text_encoder": options.is_on("network_train_unet_only"),
        "unet": options.is_on("network_train_text_encoder_only"),
    }
    used = False
    for part in _PARTS:
        setting, own = f"optimizer.{part}_lr", options.pop(f"{part}_lr")
        if (flag := left_out[part]) is not None:
            found.take(setting, 0.0, flag.where)
            if own is not None:
                found.idle(own.where, f"{flag.where} leaves this part out")
        elif own is not None and not is_off(own.value) and own.value != []:
            found.read(setting, own, _learning_rate)
        elif common is not None and not is_off(common.value):
            found.read(setting, common, _learning_rate)
            used = True
        else:
            found.leave(setting, f"the file has no {part}_lr; lorasweep's default stands")
    if common is not None and not used and not common.is_default:
        found.idle(common.where, "each part has a rate of its own")


def _learning_rate(said: Any) -> float:
    """A text encoder's may be a list, of which networks.lora and LyCORIS use the first."""
    value = plain(said)
    return float(value[0] if isinstance(value, list | tuple) else value)


def _schedule(options: Options, found: FoundSettings) -> None:
    said = options.pop("lr_scheduler", "constant")
    own, args = options.pop("lr_scheduler_type"), options.pop("lr_scheduler_args")
    option = str(said.value).partition(":")[0] if said is not None else ""
    option = "constant" if option == "constant_with_warmup" else option
    where = said.where if said is not None else "lr_scheduler, which is not said"
    if found.settings.get("optimizer.args.relative_step"):
        found.choose("lr_scheduler", "adafactor", f"{found.sources['optimizer']}: relative_step")
        if said is not None and not said.is_default:
            found.idle(where, "with relative_step Adafactor finds its rate itself")
    else:
        is_ours = option in groups()["lr_scheduler"]
        found.choose("lr_scheduler", option if is_ours else "constant", where)
        if not is_ours:
            found.leave(where, "constant stands")
    if own is not None:
        if is_off(own.value):
            found.idle(own.where, "it is empty")
        else:
            found.leave(own.where, f"a class of torch; {where} stands")
    _schedule_args(args, options, found)


def _schedule_args(args: Said | None, options: Options, found: FoundSettings) -> None:
    """The settings that only some schedules have."""
    kind = found.choices["lr_scheduler"]
    if args is not None and not is_off(args.value) and args.value != []:
        values = args.value if isinstance(args.value, list) else [args.value]
        label = args.where.partition("=")[0]
        for name, _, value in (str(one).partition("=") for one in values):
            said = Said(value.strip("'\""), f"{label}: {name}={value}")
            if kind == "piecewise_constant" and name == "step_rules":
                found.take("lr_scheduler.step_rules", said.value, said.where)
            elif kind == "polynomial" and name == "lr_end":
                rates = (found.settings.get(f"optimizer.{part}_lr") for part in _PARTS)
                share = partial(_share, of=next(filter(None, rates), 1.0))
                found.read("lr_scheduler.min_lr_ratio", said, share)
            else:
                found.leave(said.where, f"lr_scheduler={kind} has no such setting")
    elif args is not None:
        found.idle(args.where, "it is empty")
    for name, setting, kinds in (
        (
            "lr_scheduler_min_lr_ratio",
            "min_lr_ratio",
            ("cosine_with_min_lr", "warmup_stable_decay"),
        ),
        ("lr_decay_steps", "decay", ("warmup_stable_decay",)),
    ):
        prefix = "lr" if name == "decay_steps" else "lr_scheduler"
        said_of = options.pop(f"{prefix}_{name}", 0 if kind in kinds else OURS)
        if said_of is not None and kind in kinds:
            found.read(f"lr_scheduler.{setting}", said_of, number)
        elif said_of is not None:
            found.idle(said_of.where, f"lr_scheduler={kind} doesn't read it")


def _share(end: Any, of: float) -> float:
    """polynomial's last rate as a share of the first."""
    return number(end) / of


def _steps(options: Options, found: FoundSettings) -> None:
    """How long. sd-scripts reads max_train_steps only where there is no max_train_epochs."""
    epochs, steps = options.pop("max_train_epochs"), options.pop("max_train_steps", 1600)
    if (epoch := options.pop("epoch")) is not None:  # of kohya_ss's TOML
        limit = epochs or steps
        ends = f": {limit.where} says how long" if limit else ""
        found.ignore(epoch.where, f"sd-scripts has no such option, and reads over it{ends}")
    if epochs is not None and str(epochs.value) not in ("0", *NEUTRAL):
        found.read("trainer.max_train_epochs", epochs, whole)
        if steps is not None and not steps.is_default:
            found.idle(steps.where, f"{epochs.where} outdoes it")
        return
    if epochs is not None:
        found.idle(epochs.where, "it is off")
    if steps is None or str(steps.value) in NEUTRAL:
        found.leave(
            "trainer.max_train_epochs", "the file has no number; lorasweep's default stands"
        )
        return
    found.read("trainer.max_train_steps", steps, whole)
    if (number_of := found.settings.get("trainer.max_train_steps")) is not None:
        # an epoch has a step at least: the steps end it
        found.take("trainer.max_train_epochs", min(number_of, _MAX_EPOCHS), steps.where)


def _model(options: Options, found: FoundSettings) -> None:
    """The base model, if it is one of conf/'s; where others are is for a person to say."""
    named = options.pop("pretrained_model_name_or_path")
    known = model_named(str(named.value)) if named is not None else None
    if named is not None and known is not None:
        found.choose("model", known[0], named.where)
    elif named is not None:
        found.leave(named.where, "give model.path=FILE; else Stable Diffusion 1.5")
    if (said := options.is_on("v_parameterization")) is not None:
        found.take("model.prediction_type", "v_prediction", said.where)
    if (name := options.pop("output_name")) is not None:
        clean = re.sub(r"[^\w-]+", "-", str(name.value)).strip("-")[: MAX_NAME // 4]
        if clean:
            found.take("name", clean, name.where)
        else:
            found.idle(name.where, "it is empty")


def _data(options: Options, found: FoundSettings) -> None:
    """Where images and captions are, and which pictures are drawn."""
    for name in ("train_data_dir", "dataset_config"):
        if (said := options.pop(name)) is not None:
            if is_off(said.value):
                found.idle(said.where, "it is empty")
            else:
                found.leave(said.where, "places are for you to say: give dataset.image_dir=FOLDER")
    extension = options.pop("caption_extension", ".caption")
    old = options.pop("caption_extention")
    if old is not None and is_off(old.value):
        found.idle(old.where, "it is empty")
    elif old is not None:
        if extension is not None and not extension.is_default:
            found.idle(extension.where, f"{old.where} outdoes it")
        extension = old
    if extension is not None:
        found.take("captions.sidecar.suffix", str(extension.value), extension.where)
        if str(extension.value) != ".txt":
            found.notes.append(
                f"{extension.where}: captions are read from files that end in"
                f" {extension.value}, not in .txt"
            )
    every = options.pop("sample_every_n_epochs")
    if every is not None and str(every.value) in NEUTRAL:
        found.idle(every.where, "it is off; lorasweep draws after each epoch")
    elif every is not None:
        found.read("sampling.every_n_epochs", every, whole)
    if (prompts := options.pop("sample_prompts")) is not None:
        lines = prompts.value if isinstance(prompts.value, list) else []
        if lines:
            found.take("sampling.prompts", lines, prompts.where)
        else:
            found.leave(prompts.where, "no file is read; give sampling.prompts=[…]")


def _resolution(found: FoundSettings) -> None:
    """Sizes that aren't multiples of 8: sd-scripts computes the latents of the next smaller ones.

    Its VAE halves three times, rounding down: 650 pixels give 81 latents, as 648 do.
    """
    size, step = (
        found.settings.get(f"dataset.{one}") for one in ("resolution", "bucket_reso_steps")
    )
    if step is not None and step % _PIXELS:
        where = found.forget("dataset.bucket_reso_steps")
        found.leave(where, "sd-scripts refuses it, for it takes multiples of 64; 64 stands")
    if size is None or found.settings.get("dataset.enable_bucket"):
        return
    sides = [side // _PIXELS * _PIXELS for side in size]
    if sides != size:
        where = found.sources["dataset.resolution"]
        latents = " x ".join(str(side // _PIXELS) for side in sides)
        found.notes.append(
            f"{where}: not multiples of {_PIXELS}; sd-scripts trains it on latents of {latents},"
            f" the same as of {','.join(map(str, sides))}, which is taken"
        )
        found.change("dataset.resolution", sides)
