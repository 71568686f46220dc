"""The nearest config of a LoRA file that kohya's scripts made, by its `ss_*` metadata.

What the metadata says and our settings can say is taken over; everything else is listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lorasweep.config.build_run import build_run, model_named
from lorasweep.config.compose import compose_without_images, literal, plain_values
from lorasweep.config.conf_folder import groups
from lorasweep.core.foreign_files import ForeignFileError, parse_json
from lorasweep.lora_files import checkpoint, info, read_lora_file
from lorasweep.lora_files.info import Info
from lorasweep.reproduce import kohya_options as kohya
from lorasweep.reproduce.config_folder import write_config_folder

Metadata = Mapping[str, str]
MAX_STEM = 80  # bytes of the file's own name that the run's takes over


@dataclass
class FoundSettings:
    """The settings by which a file may have been made."""

    name: str
    options: dict[str, str] = field(default_factory=dict)
    """Group -> option of conf/."""
    settings: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    """Group or setting -> what the file says, in its own words."""
    unknown: list[tuple[str, str]] = field(default_factory=list)
    """What is not known or can't be said here, and what stands instead."""
    arms: dict[str, int] = field(default_factory=dict)
    """Caption folders with their repeats."""
    empty_arms: set[str] = field(default_factory=set)
    """Those of them whose captions are all empty."""

    def choose(self, group: str, option: str, source: str) -> None:
        """Take an option of conf/."""
        self.options[group], self.sources[group] = option, source

    def take(self, setting: str, value: Any, source: str) -> None:
        """Take a setting."""
        self.settings[setting], self.sources[setting] = value, source

    def read(self, setting: str, said: str | None, key: str, convert: kohya.Converter) -> None:
        """Take a setting from the text of an entry, or list it as unknown."""
        if said is None:
            self.unknown.append((setting, f"no {key} in the file; the default stands"))
            return
        try:
            value = convert(said)
        except kohya.NOT_UNDERSTOOD:
            what = f"{setting} ({key}={said})"
            self.unknown.append((what, "not understood; the default stands"))
            return
        if value is not kohya.KEEP_DEFAULT:
            self.take(setting, value, f"{key}={said}")

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Setting, value, and by which entry, of all that is known."""
        for group, option in self.options.items():
            yield group, option, self.sources[group]
        for arm, repeats in self.arms.items():
            yield f"captions.{arm}.repeats", str(repeats), "ss_dataset_dirs"
        for setting, value in self.settings.items():
            yield setting, str(value), self.sources[setting]


def read_settings(path: Path) -> FoundSettings:
    """What a file's metadata, and where there is none its tensors, say of its training.

    Raises CheckpointError for a file that is no LoRA of Stable Diffusion.
    """
    tensors = info.described(read_lora_file.read(path))
    metadata = checkpoint.read_metadata(path)
    stem = re.sub(r"[^\w-]+", "-", metadata.get("ss_output_name") or path.stem).strip("-")
    short = stem.encode()[:MAX_STEM].decode(errors="ignore")
    found = FoundSettings(name=f"{short or 'lora'}-guess")
    _network(found, metadata, tensors)
    _optimizer(found, metadata)
    _schedule(found, metadata)
    for setting, (key, convert) in kohya.SETTINGS.items():
        found.read(setting, metadata.get(key), key, convert)
    for setting, (key, convert) in kohya.LATER_SETTINGS.items():
        if key in metadata:
            found.read(setting, metadata[key], key, convert)
    _dataset(found, metadata)
    _folders(found, metadata)
    _model(found, metadata)
    for key, (neutral, meaning) in kohya.NOT_IN_LORASWEEP.items():
        if (said := metadata.get(key)) is not None and said not in neutral:
            found.unknown.append((f"{key}={said}", f"{meaning}: not in lorasweep, left out"))
    _drop_without_effect(found.settings)
    if "modelspec.architecture" not in metadata:  # else it would have the range, were there one
        found.unknown.append(("min_timestep, max_timestep", "all timesteps are used"))
    _end_within_an_epoch(found, metadata)
    found.unknown += kohya.NEVER_LOGGED
    return found


def write_config(found: FoundSettings, folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Write a folder for `lorasweep train --config-dir`; its experiment's file.

    The images are left for the user to give. Raises SettingsError or Hydra's errors if the settings
    can't be trained here.
    """
    chosen = [f"{group}={option}" for group, option in found.options.items()]
    cfg = compose_without_images(["captions=[sidecar]", *chosen, *overrides])
    OmegaConf.set_struct(cfg, False)
    overridden = {one.partition("=")[0].lstrip("+") for one in overrides}
    for setting, value in found.settings.items():
        if setting not in overridden:
            OmegaConf.update(cfg, setting, literal(value), merge=False)
    values = plain_values(cfg)
    arms = {
        arm: {
            **({"_target_": "Empty"} if arm in found.empty_arms else values["captions"]["sidecar"]),
            "repeats": repeats,
        }
        for arm, repeats in found.arms.items()
    }
    values |= {"name": found.name, "captions": arms or values["captions"]}
    build_run(OmegaConf.create(literal(values)), output_dir=Path())
    values["dataset"]["image_dir"] = "???"
    return write_config_folder(literal(values), folder, found.name)


def _network(found: FoundSettings, metadata: Metadata, tensors: Info) -> None:
    """Adapter, rank, alpha and the network's arguments; by the tensors where there are none."""
    args = _parsed(metadata, "ss_network_args", dict)
    module = metadata.get("ss_network_module", "")
    adapter = _adapter(module, args, tensors)
    source = f"ss_network_module={module}" if module else f"tensors: {tensors.type}"
    found.choose("adapter", adapter, source)
    if adapter == "lycoris":
        algo = args.get("algo")
        found.take("adapter.algo", algo, f"ss_network_args: algo={algo}")
    _rank_and_alpha(found, metadata, args, tensors)
    for name, said in args.items():
        convert, adapters = kohya.NETWORK_ARGS.get(name, (str, ()))
        if adapter in adapters:
            found.read(f"adapter.{name}", str(said), f"ss_network_args: {name}", convert)
        elif name.startswith("loraplus_"):
            if adapter in ("lora", "locon", "dora"):
                found.read(
                    f"optimizer.{name}", str(said), f"ss_network_args: {name}", kohya.optional
                )
        elif name not in kohya.READ_ELSEWHERE and str(said) not in (
            "False",
            "None",
            "0",
            "0.0",
            "",
        ):
            found.unknown.append((f"ss_network_args: {name}={said}", "not taken over"))
    _targets(found, args.get("preset"), tensors.targets)
    stored = next(iter(tensors.dtypes), "")
    if stored in kohya.DTYPES:
        found.take("trainer.save_dtype", kohya.DTYPES[stored], f"tensors: {stored}")


def _adapter(module: str, args: Mapping[str, Any], tensors: Info) -> str:
    """The option of conf/adapter."""
    algo = str(args.get("algo", "locon")).lower() if module.startswith("lycoris") else ""
    if str(args.get("dora_wd", "False")) == "True" or "DoRA" in tensors.type:
        return "dora"
    if algo in ("loha", "lokr"):
        return algo
    if algo and algo not in ("lora", "locon"):
        return "lycoris"
    if "conv_dim" in args or algo == "locon" or "(LoCon)" in tensors.type:
        return "locon"
    by_type = {"LoHa": "loha", "LoKr": "lokr", "GLoRA": "lycoris", "OFT": "lycoris"}
    return next((one for name, one in by_type.items() if tensors.type.startswith(name)), "lora")


def _rank_and_alpha(
    found: FoundSettings, metadata: Metadata, args: Mapping[str, Any], tensors: Info
) -> None:
    ranks = [rank for of in tensors.ranks.values() for rank in of if rank.isdigit()]
    alphas = [alpha for alpha in tensors.alphas if alpha.replace(".", "", 1).isdigit()]
    rank, alpha = metadata.get("ss_network_dim", "None"), metadata.get("ss_network_alpha", "None")
    if rank not in kohya.OFF:
        found.read("adapter.rank", rank, "ss_network_dim", kohya.whole)
    elif ranks:
        found.take("adapter.rank", int(ranks[0]), f"tensors: rank {ranks[0]}")
    else:
        found.unknown.append(("adapter.rank", "the default stands"))
    if alpha not in kohya.OFF:
        found.read("adapter.alpha", alpha, "ss_network_alpha", float)
    elif alphas:
        found.take("adapter.alpha", float(alphas[0]), f"tensors: alpha {alphas[0]}")
    adapter = found.options["adapter"]
    if (dropout := metadata.get("ss_network_dropout", "None")) not in (*kohya.OFF, "0", "0.0"):
        if adapter in ("lora", "locon", "dora"):
            found.read("adapter.network_dropout", dropout, "ss_network_dropout", float)
        else:
            found.unknown.append((f"ss_network_dropout={dropout}", "this type has none here"))
    conv_alpha = args.get("conv_alpha", 1 if "conv_dim" in args else None)
    for setting, name, value, convert in (
        ("adapter.conv_rank", "conv_dim", args.get("conv_dim"), kohya.whole),
        ("adapter.conv_alpha", "conv_alpha", conv_alpha, float),
    ):
        if value is not None and adapter != "lora":
            found.read(setting, str(value), f"ss_network_args: {name}", convert)


def _targets(found: FoundSettings, preset: object, by_names: str) -> None:
    """By LyCORIS's preset, else by the names of the tensors."""
    small_only = found.options["adapter"] == "lora"
    if preset in kohya.PRESETS:
        targets = kohya.PRESETS[str(preset)]
        found.take("adapter.targets", targets, f"ss_network_args: preset={preset}")
    elif by_names not in ("attn-mlp", "conv", "full", "unet-only"):
        found.unknown.append((f"targets ({by_names})", "the adapter's default stands"))
    elif by_names in ("attn-mlp", "unet-only") or not small_only:
        found.take("adapter.targets", by_names, "tensors' names")


def _optimizer(found: FoundSettings, metadata: Metadata) -> None:
    """Class and its arguments, learning rates."""
    said = metadata.get("ss_optimizer", "")
    name, _, arguments = said.partition("(")
    short = name.rpartition(".")[2]
    found.choose("optimizer", kohya.OPTIMIZERS.get(short, "adamw"), f"ss_optimizer={said}")
    if not said:
        found.unknown.append(("optimizer", "no ss_optimizer in the file; AdamW stands"))
    elif short not in kohya.OPTIMIZERS:
        found.unknown.append((f"optimizer {name}", "AdamW stands; optimizer.type may name it"))
    try:
        for key, value in kohya.arguments(arguments.removesuffix(")")).items():
            found.take(f"optimizer.args.{key}", value, f"ss_optimizer: {key}={value}")
    except kohya.NOT_UNDERSTOOD:
        found.unknown.append((f"optimizer arguments {arguments}", "not understood; left out"))
    for setting, own in (("unet_lr", "ss_unet_lr"), ("text_encoder_lr", "ss_text_encoder_lr")):
        entries = [
            key for key in (own, "ss_learning_rate") if metadata.get(key, "") not in kohya.OFF
        ]
        key = entries[0] if entries else own
        rate = metadata[key] if entries else None
        found.read(f"optimizer.{setting}", rate, key, kohya.learning_rate)


def _schedule(found: FoundSettings, metadata: Metadata) -> None:
    said = metadata.get("ss_lr_scheduler", "")
    plain = "constant" if said == "constant_with_warmup" else said
    is_ours = plain in groups()["lr_scheduler"]
    found.choose("lr_scheduler", plain if is_ours else "constant", f"ss_lr_scheduler={said}")
    if not is_ours:
        found.unknown.append((f"lr_scheduler {said}", "constant stands"))
    if is_ours and plain not in ("constant", "linear", "cosine"):
        found.unknown.append((f"{plain}'s own settings (restarts, power …)", "the default stands"))


def _dataset(found: FoundSettings, metadata: Metadata) -> None:
    """How images and captions are read."""
    datasets = _parsed(metadata, "ss_datasets", list)
    if len(datasets) > 1:
        found.unknown.append((f"{len(datasets)} data sets", "the first one's settings are taken"))
    first: Mapping[str, Any] = datasets[0] if datasets and isinstance(datasets[0], dict) else {}
    for setting, (name, convert) in kohya.DATASET_SETTINGS.items():
        said = metadata.get(f"ss_{name}", str(first[name]) if name in first else None)
        found.read(setting, said, f"ss_{name}", convert)


def _folders(found: FoundSettings, metadata: Metadata) -> None:
    """An arm of captions for each of kohya's folders, with its repeats."""
    counts = []
    found.take("dataset.min_size", 1, "kohya trains on images of any size")
    tags = _parsed(metadata, "ss_tag_frequency", dict)
    for folder, entry in _parsed(metadata, "ss_dataset_dirs", dict).items():
        values = entry if isinstance(entry, dict) else {}
        repeats, images = values.get("n_repeats"), values.get("img_count")
        number, _, rest = folder.partition("_")
        arm = "".join(c if c.isalnum() or c in "-_" else "-" for c in (rest or folder)).strip("-")
        if not isinstance(repeats, int) or repeats < 1:
            found.unknown.append((f"repeats of {folder}", "left out"))
            continue
        found.arms[arm or number] = repeats
        if tags.get(folder) == {}:  # kohya counts a folder's tags; it found none
            found.empty_arms.add(arm or number)
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


_USUAL = {"sdxl": ("sdxl", "SDXL"), "sd_v2": ("sd21", "SD2.1")}
"""What ss_base_model_version begins with -> the option of conf/model, and its name."""


def _model(found: FoundSettings, metadata: Metadata) -> None:
    """The base model, by its name; its hash is kohya's and of a file."""
    name, digest = metadata.get("ss_sd_model_name", ""), metadata.get("ss_new_sd_model_hash", "")
    version = metadata.get("ss_base_model_version")
    if named := model_named(name):
        found.choose("model", named[0], f"ss_sd_model_name={name}")
    else:
        usual, told = next(
            (found for start, found in _USUAL.items() if str(version).startswith(start)),
            ("sd15", "SD1.5"),
        )
        found.choose("model", usual, f"ss_base_model_version={version}")
        sha = f", sha256 {digest[:16]}…" if len(digest) == 64 else ""
        found.unknown.append(
            (
                f"where the base model {name or '(no name)'}{sha} is",
                f"give model.path=FILE; else {told}",
            )
        )
    if metadata.get("ss_v_parameterization") == "True" or (
        metadata.get("modelspec.prediction_type") == "v"
    ):
        found.take("model.prediction_type", "v_prediction", "modelspec.prediction_type=v")


def _end_within_an_epoch(found: FoundSettings, metadata: Metadata) -> None:
    """kohya ends at max_train_steps; ss_num_epochs are the epochs that it begins until then."""
    try:
        steps, epochs, batches, accumulated = (
            int(metadata.get(key, default))
            for key, default in (
                ("ss_max_train_steps", "0"),
                ("ss_num_epochs", "0"),
                ("ss_num_batches_per_epoch", "0"),
                ("ss_gradient_accumulation_steps", "1"),
            )
        )
    except ValueError:
        return
    whole = epochs * -(-batches // max(accumulated, 1))
    if 0 < steps < whole:
        found.take("trainer.max_train_steps", steps, f"ss_max_train_steps={steps}")


def _drop_without_effect(settings: dict[str, Any]) -> None:
    """Drop settings that do nothing beside the others; kohya lets such settings stand."""
    shuffles = settings.get("dataset.shuffle_caption") or settings.get(
        "dataset.caption_tag_dropout_rate"
    )
    if not shuffles:
        settings.pop("dataset.keep_tokens", None)
    if not settings.get("trainer.noise_offset"):
        settings.pop("trainer.adaptive_noise_scale", None)
    if not settings.get("dataset.enable_bucket"):
        for name in ("bucket_no_upscale", "min_bucket_reso", "max_bucket_reso"):
            settings.pop(f"dataset.{name}", None)


def _parsed(metadata: Metadata, key: str, kind: type) -> Any:
    """The JSON of an entry; an empty list or object where it is missing or something else."""
    try:
        return parse_json(metadata.get(key, "null"), key, kind)
    except ForeignFileError:
        return kind()
