"""Digests of settings: by them a command finds the folder in which it was broken off."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasweep.config.compose import flat, plain_values
from lorasweep.core.components import first_name
from lorasweep.core.settings import SettingsError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_PLACES = (
    *("output_root", "cache_dir", "tracking.", "launcher.", "pick."),
    *("trainer.path", "trainer.python"),
)
_LATER: Mapping[str, object] = {
    "trainer.max_train_steps": None,
    "trainer.noise_offset_random_strength": False,
    "trainer.adaptive_noise_scale": 0.0,
    "trainer.multires_noise_iterations": 0,
    "trainer.multires_noise_discount": 0.3,
    "trainer.ip_noise_gamma": 0.0,
    "trainer.ip_noise_gamma_random_strength": False,
    "trainer.min_timestep": 0,
    "trainer.max_timestep": 1000,
    "trainer.loss_type": "l2",
    "trainer.huber_schedule": "snr",
    "trainer.huber_c": 0.1,
    "trainer.huber_scale": 1.0,
    "trainer.debiased_estimation_loss": False,
    "trainer.scale_v_pred_loss_like_noise_pred": False,
    "trainer.v_pred_like_loss": 0.0,
    "trainer.network_weights": None,
    "trainer.dim_from_weights": False,
    "model.zero_terminal_snr": None,
    "model.max_token_length": 75,
    "model.weighted_captions": False,
    "model.base_weights": [],
    "model.base_weights_multiplier": [],
    "optimizer.loraplus_lr_ratio": None,
    "optimizer.loraplus_unet_lr_ratio": None,
    "optimizer.loraplus_text_encoder_lr_ratio": None,
    "lr_scheduler.min_lr_ratio": None,
    "dataset.caption_prefix": None,
    "dataset.caption_suffix": None,
    "dataset.caption_separator": ",",
    "dataset.keep_tokens_separator": None,
    "dataset.secondary_separator": None,
    "dataset.enable_wildcard": False,
    "dataset.token_warmup_min": 1,
    "dataset.token_warmup_step": 0,
    "dataset.alpha_mask": False,
    "dataset.reg_data_dir": None,
    "dataset.conditioning_data_dir": None,
    "dataset.prior_loss_weight": 1.0,
    "metrics.validation.num_swaps": 3,  # these add a score, and change none
    "metrics.validation.swap_from": 0.5,
}
"""Settings that older versions lack -> the value with which a run goes on as theirs were."""
_STATES = ("trainer.keep_states", "trainer.save_every_n_steps")
NUM_EPOCHS = "trainer.max_train_epochs"
"""The one setting of the training that may change on the way: it may grow."""


def run_digest(cfg: DictConfig) -> str:
    """The digest of the run that a composed config describes."""
    try:
        return settings_digest(flat(plain_values(cfg)))
    except SettingsError:  # some are missing: told where the run is built
        return settings_digest({})


def sweep_digest(cfg: DictConfig) -> str:
    """A digest of a multirun: the settings that its jobs share, and what they differ in."""
    return _digest(run_digest(cfg), sorted(cfg.hydra.overrides.task))


def settings_digest(params: Mapping[str, Any]) -> str:
    """A digest of flat settings (`Run.params`), but for places and what doesn't change a result."""
    named = {
        key: first_name(value) if key.endswith("._target_") else value
        for key, value in that_count(params).items()
    }
    return _digest(sorted(named.items(), key=str))


def digests_with_fewer_epochs(params: Mapping[str, Any]) -> dict[str, int]:
    """The digests that settings would have with fewer epochs, and how many those are."""
    fewer = range(1, int(params.get(NUM_EPOCHS) or 1))
    return {settings_digest({**params, NUM_EPOCHS: number}): number for number in fewer}


def that_count(params: Mapping[str, Any]) -> dict[str, Any]:
    """The flat settings that a run must have again to go on."""
    return {
        key: value
        for key, value in params.items()
        if not changes_nothing(key)
        and not (key in _LATER and value == _LATER[key])
        and not _shuffles_as_ever(key, value, params)
    }


def _shuffles_as_ever(key: str, value: object, params: Mapping[str, Any]) -> bool:
    """Is it captions.ARM.tags, and its captions are read as by versions that had no such key?"""
    if not (key.startswith("captions.") and key.endswith(".tags")):
        return False
    changed = ("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step")
    return bool(value) or not any(params.get(f"dataset.{one}") for one in changed)


def changes_nothing(key: str) -> bool:
    """Does the setting change no result? A run or a sweep goes on with another value of it."""
    return key.startswith((*_PLACES, *_STATES)) or key.endswith(".device")


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()
