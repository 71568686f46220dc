"""Which device to compute on: what `auto` stands for, and that a named device is there."""

from __future__ import annotations

from collections.abc import Sequence

from lorasweep.core.settings import SettingsError


def resolve_device(device: str, key: str = "trainer.device") -> str:
    """`auto` is CUDA where there is a device, else the CPU.

    Raises SettingsError, which calls the setting `key`, for a device that is not there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError(f"{key}={device}: no CUDA device was found; use {key}=auto or cpu")
    index = int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise SettingsError(f"{key}={device}: there are {count} CUDA devices, from cuda:0")
    return device


def choose_devices(devices: str | Sequence[str], trainer_device: str = "auto") -> list[str]:
    """What `launcher.devices` stands for: auto is every CUDA device, or one worker on the CPU.

    With auto a `trainer.device` of its own is the only one. Raises SettingsError for a device that
    is not there.
    """
    import torch

    if isinstance(devices, str) and devices == "auto":
        if trainer_device != "auto":
            return choose_devices([trainer_device])
        return [f"cuda:{n}" for n in range(torch.cuda.device_count())] or ["cpu"]
    chosen = [devices] if isinstance(devices, str) else list(devices)
    known = {"cpu", "cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))}
    if not torch.cuda.is_available():
        known = {"cpu"}
    for device in chosen:
        if device not in known:
            raise SettingsError(
                f"launcher.devices={device}: there is no such device; give auto or some of"
                f" {', '.join(sorted(known))}"
            )
    if not chosen:
        raise SettingsError("launcher.devices is empty: give auto, cpu or [cuda:0,cuda:1]")
    return chosen
