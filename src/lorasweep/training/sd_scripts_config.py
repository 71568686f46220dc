"""lorasweep's settings in the words of kohya's sd-scripts, as the TOML that train_network.py reads.

Every setting is written, or refused by name: `check` does so before anything starts. Those that one
option says alone are in the table `sd_scripts_options.OPTIONS`; here is what only several say.
What each word means was read from sd-scripts' code of February 2026.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorasweep.adapters.kohya_names import adapted_parts
from lorasweep.core.settings import SettingsError
from lorasweep.data.dataset import Dataset
from lorasweep.data.kohya_folders import MASKS
from lorasweep.data.subset_settings import SubsetSettings
from lorasweep.models.base_model import BaseModel
from lorasweep.models.model_settings import ModelSettings
from lorasweep.models.noise_schedule import NoiseSchedule
from lorasweep.models.stable_diffusion import StableDiffusion
from lorasweep.training.optimizers import KOHYAS_NAMES, Optimizer
from lorasweep.training.sd_scripts_options import OPTIONS
from lorasweep.training.training_run import SdScriptsTrainer, TrainingRun

Value = str | int | float | bool | Sequence[str] | Sequence[float]
Section = Mapping[str, Value | None]
"""Settings of sd-scripts by its names; None is sd-scripts' own default, and not written."""

PROMPTS, DATASET = "sample_prompts.txt", "dataset.toml"
"""Names of the files that the TOML refers to, in the folder that sd-scripts writes to."""

ADAFACTOR = "transformers.optimization.Adafactor"
OPTIMIZERS = {
    **{dotted: name for name, dotted in KOHYAS_NAMES.items()},
    ADAFACTOR: "Adafactor",
    "AdamW": "AdamW",
}
"""Classes that sd-scripts has names of its own for; others it takes by their dotted path."""
_ATTENTION = ("sdpa", "xformers", "mem_eff_attn")
VAE_SCALE = 0.18215  # what sd-scripts multiplies latents by, whatever the VAE's config says
_BUCKET_STEP = 64
_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
}
_UNET: Mapping[str, object] = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "use_linear_projection": False,  # which is Stable Diffusion 2's
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
}
_WIDTHS = re.compile(r"^BLOCK_OUT_CHANNELS\b.*= *\(([\d, ]+\d)\)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a process of sd-scripts begins, and where it writes."""

    output_dir: Path
    logging_dir: Path
    num_steps: int
    """Optimizer steps in all, from the first epoch on."""
    save_state: bool
    epochs_behind: int = 0
    resume: Path | None = None
    """The state that it goes on from, of the end of those epochs."""


class ToldBase(Protocol):
    """What sd-scripts is told of a base model, which need not be loaded."""

    @property
    def settings(self) -> ModelSettings: ...

    @property
    def noise_schedule(self) -> NoiseSchedule: ...


class ToldImage(Protocol):
    """What sd-scripts is told of an image: of its folder."""

    @property
    def path(self) -> Path: ...

    @property
    def repeats(self) -> int: ...

    @property
    def settings(self) -> SubsetSettings: ...

    @property
    def is_reg(self) -> bool: ...


class ToldData(Protocol):
    """What sd-scripts is told of a data set."""

    @property
    def items(self) -> Sequence[ToldImage]: ...

    @property
    def settings(self) -> Dataset: ...


def check(
    trainer: SdScriptsTrainer, run: TrainingRun, model: ModelSettings, dataset: Dataset
) -> None:
    """Raise SettingsError, naming the setting, for what sd-scripts can't be told."""
    if model.revision is not None and not Path(model.path).expanduser().exists():
        raise _cannot(
            f"model.revision={model.revision}", "download it and give its folder as model.path"
        )
    if model.allow_pickle:
        raise _cannot("model.allow_pickle=true", "convert the base model to .safetensors")
    if dataset.enable_bucket and dataset.bucket_reso_steps % _BUCKET_STEP:
        raise _cannot(
            f"dataset.bucket_reso_steps={dataset.bucket_reso_steps}",
            f"it takes multiples of {_BUCKET_STEP}",
        )
    if dataset.conditioning_data_dir is not None and dataset.reg_data_dir is not None:
        raise _cannot("dataset.conditioning_data_dir with dataset.reg_data_dir", "leave out one")
    _network(run)
    _optimizer(run.optimizer)


def check_base(base: BaseModel, checkout: Path) -> None:
    """Raise SettingsError for a base model that sd-scripts can't take or would compute otherwise.

    Its UNet's shape is fixed in its code, that of SD1.x; the widths are asked of the checkout.
    """
    where = f"model.path={base.settings.path}"
    if not isinstance(base, StableDiffusion):
        raise _cannot(f"{where} is no Stable Diffusion 1.x", "give one that is")
    unet = base.unet.config
    shape = {**_UNET, "block_out_channels": _widths(checkout)}
    for name, expected in shape.items():
        if expected is not None and _shown(unet[name]) != _shown(expected):
            raise _cannot(
                f"{where} has a UNet of {name} {_shown(unet[name])}",
                f"it takes those of {_shown(expected)} alone",
            )
    scale = base.latent_scale
    if abs(scale - VAE_SCALE) > 1e-6:
        raise _cannot(
            f"{where} has a VAE of scaling factor {scale:g}", f"it takes {VAE_SCALE} for any VAE"
        )
    schedule = base.noise_schedule.scheduler.config
    for name, expected in _SCHEDULE.items():
        found = schedule.get(name)
        if found != expected:
            raise _cannot(f"{where} has a noise schedule of {name} {found}", f"it has {expected}")


def _widths(checkout: Path) -> Sequence[int] | None:
    """Of the UNet's blocks, as a checkout has them; None where it doesn't say."""
    code = checkout.expanduser() / "library" / "original_unet.py"
    found = _WIDTHS.search(code.read_text(errors="replace")) if code.is_file() else None
    return [int(number) for number in found[1].split(",")] if found else None


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Iterable) else str(value)


def text_of(sections: Mapping[str, Section], comment: str) -> bytes:
    """The TOML file."""
    lines = [f"# {comment}"]
    for name, section in sections.items():
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in section.items() if value is not None]
    return ("\n".join(lines) + "\n").encode()


def kohya_settings(
    trainer: SdScriptsTrainer, run: TrainingRun, base: ToldBase, data: ToldData, start: Start
) -> dict[str, Section]:
    """All that sd-scripts is told of a run, in the sections of the file."""
    drawn = trainer.sample_every_n_epochs or None
    sections: dict[str, Section] = {
        "model": _model(base),
        "network": _network(run),
        "optimizer": _optimizer(run.optimizer),
        "lr_scheduler": _lr_scheduler(run),
        "training": _training(trainer, start),
        "loss": {
            "v_parameterization": base.noise_schedule.prediction_type == "v_prediction",
            "zero_terminal_snr": base.noise_schedule.is_zero_terminal_snr,
        },
        "data": _data(data, start),
        "saving": {
            "output_dir": str(start.output_dir),
            "output_name": run.name,
            "save_model_as": "safetensors",
            "save_every_n_epochs": 1,
            "save_state": start.save_state,
            "resume": None if start.resume is None else str(start.resume),
            # the state's own count of steps is wrong once a run has been resumed
            "initial_epoch": None if start.resume is None else start.epochs_behind + 1,
            "logging_dir": str(start.logging_dir),
            "log_with": "tensorboard",
        },
        "samples": {
            "sample_every_n_epochs": drawn,
            "sample_prompts": str(start.output_dir / PROMPTS) if drawn else None,
        },
    }
    alone = _said_alone(trainer, run, base.settings, data.settings)
    return {name: {**alone.get(name, {}), **section} for name, section in sections.items()}


def dataset_config(data: ToldData) -> str | None:
    """sd-scripts' dataset config where it needs one: its folders are not all read alike, or masked.

    Captions that are sentences are not shuffled.
    """
    shared = data.settings.own()
    folders = {item.path.parent: item for item in data.items}
    own = {
        folder: {key: value for key, value in item.settings.own().items() if value != shared[key]}
        for folder, item in folders.items()
    }
    masks = data.items[0].path.parents[2] / MASKS / "train"
    is_alike = not any(own.values()) and not any(item.is_reg for item in data.items)
    if is_alike and not masks.is_dir():
        return None
    lines = ["# Written by lorasweep: not all folders are read alike.", "[[datasets]]"]
    for folder, item in folders.items():
        subset: dict[str, Value] = {
            "image_dir": str(folder),
            "num_repeats": int(folder.name.partition("_")[0]),
            **own[folder],
        }
        if masks.is_dir():
            subset["conditioning_data_dir"] = str(masks)
        else:
            subset |= {"class_tokens": folder.name.partition("_")[2], "is_reg": item.is_reg}
        lines += ["", "[[datasets.subsets]]"]
        lines += [f"{key} = {_toml(value)}" for key, value in subset.items()]
    return "\n".join(lines) + "\n"


def sample_prompts(trainer: SdScriptsTrainer, size: tuple[int, int]) -> str:
    """The lines of the file of prompts; pictures are of the training resolution if unsaid."""
    width, height = size
    return "".join(
        line
        + ("" if " --w " in line else f" --w {width}")
        + ("" if " --h " in line else f" --h {height}")
        + "\n"
        for line in trainer.sample_prompts
    )


def _said_alone(
    trainer: SdScriptsTrainer, run: TrainingRun, model: ModelSettings, dataset: Dataset
) -> dict[str, dict[str, Value | None]]:
    """The options that each say one of our settings, by section."""
    owners: dict[str, tuple[object, ...]] = {
        "": (run,),
        "model": (model,),
        "adapter": (run.adapter,),
        "optimizer": (run.optimizer,),
        "lr_scheduler": (run.lr_scheduler,),
        "trainer": (run, trainer),
        "dataset": (dataset,),
    }
    values = {}
    for name, option in OPTIONS.items():
        group, _, setting = option.setting.rpartition(".")
        owner = next(one for one in owners[group] if hasattr(one, setting))
        values[name] = getattr(owner, setting)
    found: dict[str, dict[str, Value | None]] = {}
    for name, option in OPTIONS.items():
        has_effect = not option.needs or any(values[one] for one in option.needs)
        said = option.tell(values[name]) if has_effect else None
        found.setdefault(option.section, {})[name] = said
    return found


def _model(base: ToldBase) -> Section:
    path = Path(base.settings.path).expanduser()
    name = str(path.absolute()) if path.exists() else base.settings.path  # a hub id
    return {
        "pretrained_model_name_or_path": name,
        "no_half_vae": True,  # ours computes in fp32, and fp16 gives NaN
    }


def _network(run: TrainingRun) -> Section:
    """The adapter, of networks.lora or lycoris.kohya."""
    adapter, optimizer = run.adapter, run.optimizer
    targets = adapter.targets
    if not isinstance(targets, str):
        raise _cannot(
            f"adapter.targets={list(targets)}", "give a preset's name, such as attn-mlp or full"
        )
    entries = adapter.metadata()
    module = entries["ss_network_module"]
    if getattr(adapter, "init", "kaiming") != "kaiming":
        raise _cannot(f"adapter.init={getattr(adapter, 'init', None)}", "set it to kaiming")
    if module == "lycoris.kohya":
        if targets == "conv":
            raise _cannot(f"adapter.targets=conv with {type(adapter).__name__}", "take full")
        if getattr(adapter, "block_ranks", None) is not None:
            raise _cannot("adapter.block_ranks with LyCORIS's networks", "set them to null")
        if optimizer.block_lr_weights is not None:
            raise _cannot("optimizer.block_lr_weights with LyCORIS's networks", "set them to null")
    args: dict[str, str] = json.loads(entries.get("ss_network_args", "{}"))
    args = {**args, **optimizer.network_args()}
    args.pop("dropout", None)  # sd-scripts adds network_dropout itself
    # LyCORIS takes the text False for true in some arguments, and has it for their default
    said = {key: value for key, value in args.items() if value != "False" or key == "wd_on_output"}
    parts = adapted_parts(targets) & optimizer.trained_parts - {"text_encoder_2"}
    dropout = entries["ss_network_dropout"]
    return {
        "network_module": module,
        "network_dim": int(entries["ss_network_dim"]),
        "network_alpha": float(entries["ss_network_alpha"]),
        "network_dropout": None if dropout == "None" else float(dropout),
        "network_args": [f"{key}={value}" for key, value in said.items()] or None,
        "network_train_unet_only": parts == {"unet"},
        "network_train_text_encoder_only": parts == {"text_encoder"},
    }


def _optimizer(optimizer: Optimizer) -> Section:
    kind = OPTIMIZERS.get(optimizer.type, optimizer.type)
    if kind == optimizer.type and "." not in kind and kind not in (*KOHYAS_NAMES, "AdamW"):
        kind = f"torch.optim.{kind}"  # torch's Adafactor is another than sd-scripts'
    args = dict(optimizer.args)
    if optimizer.type == ADAFACTOR:
        args.setdefault("relative_step", True)  # the class's own default, and sd-scripts' too
    if odd := [name for name, value in args.items() if "=" in f"{name}{value!r}"]:
        raise _cannot(f"optimizer.args.{odd[0]}={args[odd[0]]}", "its values can't hold a =")
    rates = optimizer.part_rates
    unet, text_encoder = (rates[part] or None for part in ("unet", "text_encoder"))
    return {
        "optimizer_type": kind,
        "optimizer_args": [f"{name}={value!r}" for name, value in args.items()] or None,
        "learning_rate": unet or text_encoder,
        "unet_lr": unet,
        "text_encoder_lr": text_encoder,
    }


def _lr_scheduler(run: TrainingRun) -> Section:
    schedule, optimizer = run.lr_scheduler, run.optimizer
    kind = schedule.type
    args = []
    if kind == "piecewise_constant":
        args = [f"step_rules={schedule.step_rules!r}"]
    elif kind == "polynomial" and schedule.min_lr_ratio:
        end = schedule.min_lr_ratio * optimizer.main_rate
        args = [f"lr_end={end!r}"]
    is_named = kind in ("cosine_with_min_lr", "warmup_stable_decay")
    decay = schedule.decay or 0
    return {
        "lr_scheduler": "constant_with_warmup" if kind == "constant" and schedule.warmup else kind,
        "lr_decay_steps": decay if 0 < decay < 1 else int(decay),
        "lr_scheduler_min_lr_ratio": schedule.min_lr_ratio if is_named else None,
        "lr_scheduler_args": args or None,
    }


def _training(trainer: SdScriptsTrainer, start: Start) -> Section:
    attention = {str(name): True for name in _ATTENTION if name == trainer.attention}
    return {
        # max_train_epochs would outdo the steps
        "max_train_steps": start.num_steps,
        **attention,
        "max_data_loader_n_workers": 0,  # latents are cached: further processes gain nothing
    }


def _data(data: ToldData, start: Start) -> Section:
    return {
        "train_data_dir": str(data.items[0].path.parent.parent),
        "dataset_config": str(start.output_dir / DATASET) if dataset_config(data) else None,
        "caption_extension": data.settings.caption_extension,
        "masked_loss": (data.items[0].path.parents[2] / MASKS / "train").is_dir(),
        "cache_latents": True,
    }


def _toml(value: Value) -> str:
    """A value as TOML has it; JSON's texts are TOML's too."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Iterable):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)


def _cannot(what: str, remedy: str) -> SettingsError:
    return SettingsError(f"{what}: trainer=sd_scripts can't do that; {remedy}, or trainer=native")
