"""The words of kohya's scripts, kohya_ss and OneTrainer for our settings, and "did you mean".

Every message that refuses an unknown key, flag, command or program asks here what was meant.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

SETTING_OF = {
    # kohya's scripts (train_network.py), most of which kohya_ss's saved TOML and JSON share
    "pretrained_model_name_or_path": "model.path",
    "train_data_dir": "dataset.image_dir",
    "dataset_config": "dataset.image_dir",
    "output_dir": "output_root",
    "output_name": "name",
    "network_module": "adapter",
    "network_dim": "adapter.rank",
    "network_alpha": "adapter.alpha",
    "network_args": "adapter",
    "conv_dim": "adapter.conv_rank",
    "learning_rate": "optimizer.unet_lr and optimizer.text_encoder_lr",
    "optimizer_type": "optimizer",
    "optimizer_args": "optimizer.args",
    "lr_scheduler_type": "lr_scheduler",
    "lr_warmup_steps": "lr_scheduler.warmup",
    "lr_decay_steps": "lr_scheduler.decay",
    "lr_scheduler_min_lr_ratio": "lr_scheduler.min_lr_ratio",
    "lr_scheduler_num_cycles": "lr_scheduler.num_cycles",
    "lr_scheduler_power": "lr_scheduler.power",
    "lr_scheduler_timescale": "lr_scheduler.timescale",
    "train_batch_size": "trainer.batch_size",
    "max_train_epochs": "trainer.max_train_epochs",
    "max_train_steps": "trainer.max_train_steps",
    "mixed_precision": "trainer.precision",
    "save_precision": "trainer.save_dtype",
    "noise_offset": "trainer.noise_offset",
    "min_snr_gamma": "trainer.min_snr_gamma",
    "max_grad_norm": "optimizer.max_grad_norm",
    "sample_every_n_epochs": "sampling.every_n_epochs",
    "sample_prompts": "sampling.prompts",
    "num_repeats": "captions.ARM.repeats",
    # kohya_ss's form, its keys and labels
    "lycoris_preset": "adapter.targets",
    "network_rank": "adapter.rank",
    "lora_type": "adapter",
    "lr_warmup": "lr_scheduler.warmup",
    "epoch": "trainer.max_train_epochs",
    "epochs": "trainer.max_train_epochs",
    "max_resolution": "dataset.resolution",
    "caption_dropout": "dataset.caption_dropout_rate",
    # OneTrainer
    "base_model_name": "model.path",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "learning_rate_scheduler": "lr_scheduler",
    "learning_rate_warmup_steps": "lr_scheduler.warmup",
    "train_dtype": "trainer.precision",
    "output_dtype": "trainer.save_dtype",
    # what one types half remembering ours
    "dim": "adapter.rank",
    "lr": "optimizer.unet_lr and optimizer.text_encoder_lr",
    "bs": "trainer.batch_size",
}
"""A word -> the setting that means it, or the two that do. Words that end like ours (unet_lr,
resolution, gradient_checkpointing) need no row: any key is found by its last part."""

_CACHED = "an image's latents are computed once, so that it can't change from step to step"
WHY_NOT = {
    "color_aug": _CACHED,
    "random_crop": _CACHED,
    "face_crop_aug_range": _CACHED,
}
"""A word that no setting here can mean -> why."""

EXPORT_OF = {
    "a1111": "kohya",
    "automatic1111": "kohya",
    "forge": "kohya",
    "comfyui": "kohya",
    "kohya_ss": "kohya",
    "diffusers": "diffusers-lora",
}
"""A program -> the form of `lorasweep export` that it reads."""


def meant(word: str, known: Iterable[str]) -> str | None:
    """The setting or the known name that somebody meant by an unknown word; None for no idea.

    `word` may be a dotted key, a flag, or a word of another trainer in any case.
    """
    known = [one for one in known if one != word]
    last = word.lstrip("-+~").rpartition(".")[2].lower().replace("-", "_")
    if setting := SETTING_OF.get(last):
        return setting if setting != word else None
    same_end = [one for one in known if one.rpartition(".")[2] == last]
    near = same_end if len(same_end) == 1 else get_close_matches(word, known, n=1)
    return near[0] if near else None
