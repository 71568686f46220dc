"""The nearest config of a LoRA file that kohya's scripts made, by its `ss_*` metadata.

What the metadata says and our settings can say is taken over; everything else is listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasweep.core.foreign_files import ForeignFileError, parse_json
from lorasweep.lora_files import checkpoint, info, read_lora_file
from lorasweep.lora_files.info import Info
from lorasweep.reproduce.found_settings import FoundSettings, Said
from lorasweep.reproduce.kohya_network import MODULES
from lorasweep.reproduce.kohya_settings import take_over
from lorasweep.training.sd_scripts_options import OPTIONS, is_off

Metadata = Mapping[str, str]
MAX_STEM = 80  # bytes of the file's own name that the run's takes over

_OTHER_NAMES = {
    "ss_num_epochs": "max_train_epochs",
    "ss_batch_size_per_device": "train_batch_size",
    "ss_debiased_estimation": "debiased_estimation_loss",
    "ss_sd_model_name": "pretrained_model_name_or_path",
}
"""Entry -> sd-scripts' option, where that isn't the entry's name after `ss_`."""
_FACTS = frozenset(
    {
        *("ss_base_model_version", "ss_bucket_info", "ss_dataset_dirs", "ss_datasets", "ss_epoch"),
        *("ss_max_train_steps", "ss_new_sd_model_hash", "ss_new_vae_hash", "ss_optimizer"),
        *("ss_num_batches_per_epoch", "ss_num_train_images", "ss_num_validation_images"),
        *("ss_output_name", "ss_reg_dataset_dirs", "ss_sd_model_hash", "ss_session_id", "ss_steps"),
        *("ss_sd_scripts_commit_hash", "ss_tag_frequency", "ss_total_batch_size", "ss_vae_hash"),
        *("ss_training_finished_at", "ss_training_started_at", "ss_vae_name"),
    }
)
"""Entries that are read elsewhere, or say how a training went and not what it was told."""
_TYPES = {
    "DoRA": {"algo": "locon", "dora_wd": "True"},
    "LoHa": {"algo": "loha"},
    "LoKr": {"algo": "lokr"},
    "GLoRA": {"algo": "glora"},
    "OFT": {"algo": "diag-oft"},
}
"""Beginning of what `info` calls a file's type -> LyCORIS's arguments of it."""
_USUAL = (("sdxl", "sdxl"), ("sd_v2", "sd21"))
"""What ss_base_model_version begins with -> the option of conf/model."""
_BASE = ("base_model_version", "new_sd_model_hash")
_TARGETS = ("attn-mlp", "conv", "full", "unet-only")
_DTYPES = {"float32": "float", "float16": "fp16", "bfloat16": "bf16"}
_NEVER_LOGGED = (
    ("the images", "give them as dataset.image_dir=FOLDER; kohya logs their number alone"),
    (
        "the captions",
        "read from .txt files beside the images; kohya logs their tags' numbers alone",
    ),
    ("order, noise and first weights", "kohya draws them otherwise from the same seed"),
    ("latents", "kohya's are one random draw of the VAE, ours its most likely value"),
)
"""What no entry says, and what stands instead."""


def read_settings(path: Path) -> FoundSettings:
    """What a file's metadata, and where there is none its tensors, say of its training.

    Raises CheckpointError for a file that is no LoRA of Stable Diffusion.
    """
    tensors = info.described(read_lora_file.read(path))
    metadata = checkpoint.read_metadata(path)
    stem = re.sub(r"[^\w-]+", "-", metadata.get("ss_output_name") or path.stem).strip("-")
    short = stem.encode()[:MAX_STEM].decode(errors="ignore")
    found = FoundSettings(name=f"{short or 'lora'}-guess")
    found.take("name", found.name, f"ss_output_name={metadata.get('ss_output_name')}")
    options = _options(metadata)
    _of_tensors(options, metadata, tensors, found)
    take_over(options, found, with_defaults=False)
    if (number := len(_parsed(metadata, "ss_datasets", list))) > 1:
        found.leave(f"{number} data sets", "the first one's settings are taken")
    _folders(found, metadata)
    _end_within_an_epoch(found, metadata)
    if "model" not in found.choices:
        version, digest = (metadata.get(f"ss_{name}") for name in _BASE)
        usual = next((name for start, name in _USUAL if str(version).startswith(start)), "sd15")
        found.choose("model", usual, f"ss_base_model_version={version}")
        if len(digest or "") == 64:
            found.leave(f"the base model, sha256 {digest}", "give it as model.path=FILE")
    if "modelspec.architecture" not in metadata:  # else it would have the range, were there one
        found.leave("min_timestep, max_timestep", "all timesteps are used")
    told = {row.said.partition("=")[0].partition(":")[0] for row in found.rows}
    for key in sorted(metadata.keys() - told):
        if key in _FACTS or not key.startswith("ss_"):
            found.idle(key, "a fact of that training")
        else:
            found.ignore(key, "nobody knows what it is")
    for what, instead in _NEVER_LOGGED:
        found.leave(what, instead)
    return found


def _options(metadata: Metadata) -> dict[str, Said]:
    """The entries as sd-scripts' options, with those of the first data set."""
    options = {}
    for key, value in metadata.items():
        if key not in _FACTS and (key.startswith("ss_") or key in _OTHER_NAMES):
            name = _OTHER_NAMES.get(key, key.removeprefix("ss_"))
            options[name] = Said(value, f"{key}={value}")
    first, comma, last = metadata.get("modelspec.timestep_range", "").partition(",")
    if comma:
        where = f"modelspec.timestep_range={first},{last}"
        options |= {"min_timestep": Said(first, where), "max_timestep": Said(last, where)}
    if metadata.get("modelspec.prediction_type") == "v":
        options["v_parameterization"] = Said(True, "modelspec.prediction_type=v")
    kind, _, arguments = metadata.get("ss_optimizer", "").partition("(")
    if kind:
        options["optimizer_type"] = Said(kind, f"ss_optimizer={kind}")
        arguments = arguments.removesuffix(")")
        options["optimizer_args"] = Said(arguments, f"ss_optimizer={arguments}")
    for name, value in _first_dataset(metadata).items():
        option = _OTHER_NAMES.get(f"ss_{name}", name)
        if option in OPTIONS:
            options[option] = Said(value, f"ss_datasets: {name}={value}")
    return options


def _first_dataset(metadata: Metadata) -> Mapping[str, Any]:
    """The settings of the first of several data sets, and of its first folder."""
    datasets = _parsed(metadata, "ss_datasets", list)
    first = datasets[0] if datasets and isinstance(datasets[0], dict) else {}
    subsets = first.get("subsets")
    subset = subsets[0] if isinstance(subsets, list) and subsets else {}
    return {**(subset if isinstance(subset, dict) else {}), **first}


def _of_tensors(
    options: dict[str, Said], metadata: Metadata, tensors: Info, found: FoundSettings
) -> None:
    """Add what the tensors say where the metadata says nothing."""
    module = options.get("network_module")
    if module is None or module.value not in MODULES:
        if module is not None:
            found.leave(module.where, "lorasweep has no such network; its tensors speak")
        kinds = [args for name, args in _TYPES.items() if tensors.type.startswith(name)]
        where = f"tensors: {tensors.type}"
        options["network_module"] = Said(MODULES[1] if kinds else MODULES[0], where)
        if kinds:
            options["network_args"] = Said(kinds[0], where)
    ranks = [rank for of in tensors.ranks.values() for rank in of if rank.isdigit()]
    alphas = [alpha for alpha in tensors.alphas if alpha.replace(".", "", 1).isdigit()]
    for name, values in (("network_dim", ranks), ("network_alpha", alphas)):
        said = options.get(name)
        if said is not None and is_off(said.value):
            del options[name]
        if name not in options and values:
            options[name] = Said(values[0], f"tensors: {name.removeprefix('network_')} {values[0]}")
    if "(LoCon)" in tensors.type and "network_args" not in options and "network_dim" in options:
        rank = options["network_dim"].value
        options["network_args"] = Said({"conv_dim": rank}, f"tensors: {tensors.type}")
    if tensors.targets in _TARGETS:
        is_small = tensors.targets in ("attn-mlp", "unet-only")
        if is_small or "(LoCon)" in tensors.type or options["network_module"].value != MODULES[0]:
            options["targets"] = Said(tensors.targets, "tensors' names")
    else:
        found.leave(f"targets ({tensors.targets})", "the adapter's default stands")
    stored = next(iter(tensors.dtypes), "")
    if stored in _DTYPES:
        options["save_precision"] = Said(_DTYPES[stored], f"tensors: {stored}")


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
            found.leave(f"repeats of {folder}", "left out")
            continue
        found.take_arm(arm or number, repeats, f"ss_dataset_dirs: {folder}")
        if tags.get(folder) == {}:  # kohya counts a folder's tags; it found none
            found.empty_arms.add(arm or number)
        counts.append(images if isinstance(images, int) else 0)
    if not counts:
        found.leave("folders and repeats", "one arm of .txt files, conf/'s repeats")
        return
    if max(counts) > 0:
        found.take("dataset.num_images", max(counts), f"ss_dataset_dirs: {max(counts)} images")
        found.take("dataset.num_holdout", 0, "kohya trains on all images")
    if len(counts) > 1:
        found.leave(
            f"{len(counts)} folders", "taken as arms of the same images, each with .txt captions"
        )


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


def _parsed(metadata: Metadata, key: str, kind: type) -> Any:
    """The JSON of an entry; an empty list or object where it is missing or something else."""
    try:
        return parse_json(metadata.get(key, "null"), key, kind)
    except ForeignFileError:
        return kind()
