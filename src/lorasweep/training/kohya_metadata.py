"""kohya's metadata of a checkpoint (`ss_*`, modelspec), as sd-scripts writes it."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep import __version__
from lorasweep.data.latents import Item
from lorasweep.training.training_batches import steps_per_epoch

if TYPE_CHECKING:
    from lorasweep.training.native_trainer import NativeTraining
    from lorasweep.training.run_state import RunState
    from lorasweep.training.trainer import TrainingRun

_PRECISION = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}


def kohya_metadata(training: NativeTraining, state: RunState) -> dict[str, str]:
    """All entries but the hashes, which the writer adds; options we don't have are left out."""
    values = {
        **_run(training, state),
        **_data(training),
        **_network(state.run),
        **training.base.file_hashes,
    }
    return {**_modelspec(training, state), **{key: str(value) for key, value in values.items()}}


def _run(training: NativeTraining, state: RunState) -> dict[str, object]:
    settings, run, base = training.settings, state.run, training.base
    num_steps = run.max_train_epochs * training.steps_per_epoch
    optimizer = type(state.optimizer)
    return {
        "ss_session_id": state.session_id,
        "ss_training_started_at": state.started,
        "ss_training_finished_at": time.time(),
        "ss_output_name": run.name,
        "ss_learning_rate": run.optimizer.unet_lr,
        "ss_unet_lr": run.optimizer.unet_lr,
        "ss_text_encoder_lr": run.optimizer.text_encoder_lr,
        "ss_optimizer": f"{optimizer.__module__}.{optimizer.__name__}",
        "ss_lr_scheduler": run.lr_scheduler.type,
        "ss_lr_warmup_steps": run.lr_scheduler.warmup_steps(num_steps),
        "ss_max_grad_norm": run.optimizer.max_grad_norm,
        "ss_epoch": state.num_epochs,
        "ss_num_epochs": run.max_train_epochs,
        "ss_steps": state.num_steps,
        "ss_max_train_steps": num_steps,
        "ss_gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "ss_gradient_checkpointing": settings.gradient_checkpointing,
        "ss_mixed_precision": _PRECISION[settings.precision],
        "ss_noise_offset": run.noise_offset or None,
        "ss_min_snr_gamma": run.min_snr_gamma,
        "ss_loss_type": "l2",
        "ss_seed": run.seed,
        "ss_clip_skip": base.settings.clip_skip,
        "ss_v2": False,
        "ss_base_model_version": base.base_model_version,
        "ss_sd_model_name": Path(base.settings.path).name,
        "ss_zero_terminal_snr": bool(base.scheduler_config.get("rescale_betas_zero_snr", False)),
        "ss_training_comment": None,
        "lorasweep_version": __version__,
    }


def _network(run: TrainingRun) -> dict[str, str]:
    """The adapter's entries; kohya keeps the optimiser's weights by block among their args."""
    entries = run.adapter.metadata()
    weights = run.optimizer.network_args()
    if weights:
        args = {**json.loads(entries.get("ss_network_args", "{}")), **weights}
        entries["ss_network_args"] = json.dumps(args)
    return entries


def _data(training: NativeTraining) -> dict[str, object]:
    items, data = training.data.items, training.data.settings
    width, height = data.size
    return {
        "ss_num_train_images": sum(item.repeats for item in items),
        "ss_num_reg_images": 0,
        "ss_num_batches_per_epoch": steps_per_epoch(items, training.settings.batch_size),
        "ss_batch_size_per_device": training.settings.batch_size,
        "ss_total_batch_size": training.settings.batch_size,
        "ss_resolution": f"({width}, {height})",
        "ss_enable_bucket": data.enable_bucket,
        "ss_bucket_no_upscale": data.bucket_no_upscale,
        "ss_min_bucket_reso": data.min_bucket_reso if data.enable_bucket else None,
        "ss_max_bucket_reso": data.max_bucket_reso if data.enable_bucket else None,
        "ss_bucket_info": _bucket_info(items) if data.enable_bucket else "null",
        "ss_cache_latents": True,
        "ss_flip_aug": data.flip_aug,
        "ss_shuffle_caption": data.shuffle_caption,
        "ss_keep_tokens": data.keep_tokens,
        "ss_caption_dropout_rate": data.caption_dropout_rate,
        "ss_caption_dropout_every_n_epochs": data.caption_dropout_every_n_epochs,
        "ss_caption_tag_dropout_rate": data.caption_tag_dropout_rate,
        "ss_dataset_dirs": json.dumps(_dataset_dirs(items)),
        "ss_reg_dataset_dirs": "{}",
        "ss_tag_frequency": json.dumps(_tag_frequency(items)),
    }


def _modelspec(training: NativeTraining, state: RunState) -> dict[str, str]:
    width, height = training.data.settings.size
    prediction = {"v_prediction": "v"}.get(training.base.prediction_type, "epsilon")
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": training.base.architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": state.run.name,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": prediction,
        "modelspec.encoder_layer": str(training.base.settings.clip_skip),
    }


def _by_folder(items: Sequence[Item]) -> Mapping[str, list[Item]]:
    folders = defaultdict(list)
    for item in items:
        folders[item.path.parent.name].append(item)
    return folders


def _dataset_dirs(items: Sequence[Item]) -> dict[str, dict[str, int]]:
    return {
        folder: {"n_repeats": members[0].repeats, "img_count": len(members)}
        for folder, members in _by_folder(items).items()
    }


def _tag_frequency(items: Sequence[Item]) -> dict[str, dict[str, int]]:
    """How often each comma-separated part of the captions stands in a folder."""
    return {
        folder: dict(
            Counter(
                tag.strip() for item in members for tag in item.caption.split(",") if tag.strip()
            )
        )
        for folder, members in _by_folder(items).items()
    }


def _bucket_info(items: Sequence[Item]) -> str:
    counts = Counter({item.bucket: 0 for item in items})
    for item in items:
        counts[item.bucket] += item.repeats
    buckets = {
        str(number): {"resolution": list(size), "count": count}
        for number, (size, count) in enumerate(sorted(counts.items()))
    }
    return json.dumps({"buckets": buckets})
