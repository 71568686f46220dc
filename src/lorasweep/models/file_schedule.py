"""What a single file says of its noise schedule: what it predicts, and whether it ends in noise.

There is no standard for Stable Diffusion 1.x. The empty tensors `v_pred` and `ztsnr` are what
ComfyUI (comfy/supported_models.py), Forge and others look for; `modelspec.prediction_type` is
sd-scripts' metadata (library/sai_model_spec.py), `ss_zero_terminal_snr` that of its runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

V_PRED, ZTSNR = "v_pred", "ztsnr"
_PREDICTION = "modelspec.prediction_type"
_USUAL = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}


def of_file(path: Path) -> dict[str, Any]:
    """What a .safetensors file says, as keys of diffusers' scheduler_config.json; empty: nothing.

    The file has been checked (model_files.check_file).
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return said(file.keys(), file.metadata() or {})


def said(names: Iterable[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the names of a file's tensors and its metadata say, as `of_file`."""
    held = set(names)
    found: dict[str, Any] = {}
    if V_PRED in held or metadata.get(_PREDICTION) == "v":
        found["prediction_type"] = "v_prediction"
    elif metadata.get(_PREDICTION) == "epsilon":
        found |= {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    if ZTSNR in held or metadata.get("ss_zero_terminal_snr") == "True":
        found["rescale_betas_zero_snr"] = True
    return found


def as_said(schedule: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata by which a file says what this schedule is."""
    import torch

    is_v = schedule.get("prediction_type") == "v_prediction"
    is_zero = bool(schedule.get("rescale_betas_zero_snr"))
    names = [V_PRED] * is_v + [ZTSNR] * is_zero
    return {name: torch.empty(0) for name in names}, {_PREDICTION: "v" if is_v else "epsilon"}


def changes(own: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """What `told` changes of a model's `own` schedule.

    One that ends in pure noise must be sampled from there (arXiv 2305.08891), which not every
    sampler can.
    """
    found = {key: value for key, value in told.items() if own.get(key) != value}
    if not own.get("rescale_betas_zero_snr"):
        if told.get("rescale_betas_zero_snr"):
            found |= {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
        else:
            found.pop("rescale_betas_zero_snr", None)  # absent is false
    return found


def untold(schedule: Mapping[str, Any]) -> list[str]:
    """What of a schedule no file can say and no program that reads files guesses."""
    return [
        f"{key}={schedule[key]}"
        for key, usual in _USUAL.items()
        if schedule.get(key, usual) != usual
    ]
