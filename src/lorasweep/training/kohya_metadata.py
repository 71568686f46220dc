"""kohya's metadata of a checkpoint (`ss_*`, modelspec), as sd-scripts writes it.

Options that we don't have stand at kohya's value for off. The hashes of the weights are left to the
checkpoint's writer.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from lorasweep import __version__
from lorasweep.adapters.unet_blocks import Ranked
from lorasweep.data.latents import Item
from lorasweep.models.base_model import BaseModel
from lorasweep.models.model_settings import ModelSettings
from lorasweep.training.training_batches import steps_per_epoch
from lorasweep.training.training_run import NativeTrainer, TrainingData, TrainingRun
from lorasweep.training.training_state import TrainingState

_OFF: Mapping[str, object] = {
    "ss_color_aug": False,
    "ss_face_crop_aug_range": None,
    "ss_fp8_base": False,
    "ss_fp8_base_unet": False,
    "ss_full_fp16": False,
    "ss_lowram": False,
    "ss_max_validation_steps": None,
    "ss_num_validation_images": 0,  # of kohya's own kind; our hold-out set is not in the folders
    "ss_random_crop": False,
    "ss_resize_interpolation": None,
    "ss_sd_scripts_commit_hash": "(unknown)",
    "ss_training_comment": None,
    "ss_validate_every_n_epochs": None,
    "ss_validate_every_n_steps": None,
    "ss_validation_seed": None,
    "ss_validation_split": 0.0,
}
"""What sd-scripts writes of options that aren't used."""
_PRECISION = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}


def pack_metadata(trainer: NativeTrainer, base: BaseModel, data: TrainingData) -> dict[str, str]:
    """The entries that the runs of a pack share, and that stay the same in every epoch."""
    width, height = data.settings.size
    values = {
        **_OFF,
        **_data(data),
        **base.file_hashes,
        "ss_num_batches_per_epoch": steps_per_epoch(data.items, trainer.batch_size),
        "ss_batch_size_per_device": trainer.batch_size,
        "ss_total_batch_size": trainer.batch_size,
        "ss_gradient_accumulation_steps": trainer.gradient_accumulation_steps,
        "ss_gradient_checkpointing": trainer.gradient_checkpointing,
        "ss_mixed_precision": _PRECISION[trainer.precision],
        "ss_clip_skip": base.settings.clip_skip,
        "ss_max_token_length": max_token_length(base.settings),
        **base.metadata,
        "ss_sd_model_name": Path(base.settings.path).name,
        "ss_zero_terminal_snr": base.noise_schedule.is_zero_terminal_snr,
        "lorasweep_version": __version__,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation_version": f"lorasweep/{__version__}",
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": base.noise_schedule.modelspec_word,
        "modelspec.encoder_layer": base.settings.clip_skip,
    }
    return {key: str(value) for key, value in values.items()}


def max_token_length(settings: ModelSettings) -> int | None:
    """kohya's option, of which 75 is None."""
    return settings.max_token_length if settings.num_chunks > 1 else None


def run_metadata(state: TrainingState, base: BaseModel) -> dict[str, str]:
    """A run's own entries, as they are now."""
    run, optimizer = state.run, type(state.optimizer)
    rates = run.optimizer.text_encoder_lr
    args = ",".join(f"{key}={value}" for key, value in run.optimizer.args.items())
    values = {
        "ss_session_id": state.session_id,
        "ss_training_started_at": state.started,
        "ss_training_finished_at": time.time(),
        "ss_output_name": run.name,
        "ss_learning_rate": run.optimizer.unet_lr,
        "ss_unet_lr": run.optimizer.unet_lr,
        "ss_text_encoder_lr": list(rates) if isinstance(rates, tuple) else rates,
        "ss_optimizer": f"{optimizer.__module__}.{optimizer.__name__}{args and f'({args})'}",
        "ss_lr_scheduler": run.lr_scheduler.type,
        "ss_lr_warmup_steps": run.lr_scheduler.warmup_as_given,
        "ss_max_grad_norm": run.optimizer.max_grad_norm,
        "ss_epoch": state.num_epochs,
        "ss_num_epochs": state.max_train_epochs,
        "ss_steps": state.num_steps,
        "ss_max_train_steps": state.max_train_steps,
        "ss_noise_offset": run.noise_offset or None,
        "ss_noise_offset_random_strength": run.noise_offset_random_strength,
        "ss_adaptive_noise_scale": run.adaptive_noise_scale or None,
        "ss_multires_noise_iterations": run.multires_noise_iterations or None,
        "ss_multires_noise_discount": run.multires_noise_discount,
        "ss_ip_noise_gamma": run.ip_noise_gamma or None,
        "ss_ip_noise_gamma_random_strength": run.ip_noise_gamma_random_strength,
        "ss_loss_type": run.loss_type,
        "ss_huber_schedule": run.huber_schedule,
        "ss_huber_c": run.huber_c,
        "ss_huber_scale": run.huber_scale,
        "ss_min_snr_gamma": run.min_snr_gamma,
        "ss_debiased_estimation": run.debiased_estimation_loss,
        "ss_seed": run.seed,
        **_network(run, is_sdxl="text_encoder_2" in base.parts),
        **state.network,
        "modelspec.title": run.name,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
    }
    if (run.min_timestep, run.max_timestep) != (0, 1000):
        values["modelspec.timestep_range"] = f"{run.min_timestep},{run.max_timestep}"
    return {key: str(value) for key, value in values.items()}


def _network(run: TrainingRun, *, is_sdxl: bool) -> dict[str, str]:
    """The adapter's entries; kohya keeps the optimiser's weights by block among their args.

    An adapter doesn't know of SDXL, which has other blocks.
    """
    entries = run.adapter.metadata()
    more = run.optimizer.network_args(is_sdxl=is_sdxl)
    if is_sdxl and isinstance(run.adapter, Ranked):
        doubled = int(1 / getattr(run.adapter, "num_trained", 1))
        more |= run.adapter.block_args(doubled, is_sdxl=True)
    if more:
        args = {**json.loads(entries.get("ss_network_args", "{}")), **more}
        entries["ss_network_args"] = json.dumps(args)
    return entries


def _data(training_data: TrainingData) -> dict[str, object]:
    items, data = training_data.items, training_data.settings
    width, height = data.size
    read = [item.settings for item in items]  # sentences keep their order
    trained = [item for item in items if not item.is_reg]
    of_reg = _dataset_dirs([item for item in items if item.is_reg])
    return {
        "ss_num_train_images": sum(item.repeats for item in trained),
        "ss_num_reg_images": sum(one["n_repeats"] * one["img_count"] for one in of_reg.values()),
        "ss_prior_loss_weight": data.prior_loss_weight,
        "ss_resolution": f"({width}, {height})",
        "ss_enable_bucket": data.enable_bucket,
        "ss_bucket_no_upscale": data.bucket_no_upscale,
        "ss_min_bucket_reso": data.min_bucket_reso if data.enable_bucket else None,
        "ss_max_bucket_reso": data.max_bucket_reso if data.enable_bucket else None,
        "ss_bucket_info": _bucket_info(items) if data.enable_bucket else "null",
        "ss_cache_latents": True,
        "ss_flip_aug": any(one.flip_aug for one in read),
        "ss_shuffle_caption": any(one.shuffle_caption for one in read),
        "ss_keep_tokens": data.keep_tokens,
        "ss_caption_dropout_rate": data.caption_dropout_rate,
        "ss_caption_dropout_every_n_epochs": data.caption_dropout_every_n_epochs,
        "ss_caption_tag_dropout_rate": max(one.caption_tag_dropout_rate for one in read),
        "ss_dataset_dirs": json.dumps(_dataset_dirs(trained)),
        "ss_reg_dataset_dirs": json.dumps(of_reg),
        "ss_tag_frequency": json.dumps(_tag_frequency(items)),
    }


def _by_folder(items: Sequence[Item]) -> Mapping[str, list[Item]]:
    folders = defaultdict(list)
    for item in items:
        folders[item.path.parent.name].append(item)
    return folders


def _dataset_dirs(items: Sequence[Item]) -> dict[str, dict[str, int]]:
    return {
        folder: {"n_repeats": int(folder.partition("_")[0]), "img_count": len(members)}
        for folder, members in _by_folder(items).items()
    }


def _tag_frequency(items: Sequence[Item]) -> dict[str, dict[str, int]]:
    """How often each comma-separated part of the captions stands in a folder, in lower case."""
    return {
        folder: dict(
            Counter(
                tag.strip().lower()
                for item in members
                for tag in item.caption.split(",")
                if tag.strip()
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
    errors = [abs(item.bucket[0] / item.bucket[1] - _ratio(item.path)) for item in items]
    return json.dumps({"buckets": buckets, "mean_img_ar_error": sum(errors) / len(errors)})


@cache
def _ratio(path: Path) -> float:
    """Width to height of an image that is trained on."""
    from PIL import Image

    with Image.open(path) as image:
        return image.width / image.height
