"""The settings that name a base model, checked before anything of it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from lorasweep.core.foreign_files import ForeignFileError, check_no_pipe
from lorasweep.core.settings import Settings, SettingsError, Texts

PICKLED = {".ckpt", ".pt", ".pth", ".bin"}


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Which base model, and how it is read; `load_model.Model` adds how to load it."""

    path: str
    revision: str | None
    config: str | None
    allow_pickle: bool
    clip_skip: PositiveInt
    prediction_type: Literal["epsilon", "v_prediction"] | None
    zero_terminal_snr: bool | None = None  # these are later than runs of older versions
    max_token_length: Literal[75, 150, 225] = 75
    weighted_captions: bool = False
    base_weights: Texts = ()
    base_weights_multiplier: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.path.strip() or "\0" in self.path:
            raise SettingsError("model.path is empty: give a diffusers folder, a .safetensors file")
        file = Path(self.path)
        for key, given in (("path", self.path), ("config", self.config or "")):
            try:
                check_no_pipe(Path(given).expanduser())
            except ForeignFileError as error:
                raise SettingsError(f"model.{key}={given}: {error}") from None
        self._check_base_weights()
        pickled = file.suffix.lower() in PICKLED
        if file.is_file():  # anything but safetensors may be a pickle, whatever its name
            pickled = file.suffix.lower() != ".safetensors"
        if pickled and not self.allow_pickle:
            raise SettingsError(
                f"model.path={self.path} is a pickled checkpoint, which can run any code when"
                " loaded; convert it to .safetensors, or trust it by model.allow_pickle=true"
            )
        looks_local = file.suffix.lower() in PICKLED | {".safetensors"} or file.is_absolute()
        if (looks_local or self.path.startswith((".", "~"))) and not file.exists():
            raise SettingsError(
                f"model.path={self.path}: no such file or folder; give a diffusers folder, a"
                " .safetensors file, a hub id, or model=embedded for the demo's model"
            )

    def _check_base_weights(self) -> None:
        for given in self.base_weights:
            check_weights_file("model.base_weights", given)
        if len(self.base_weights_multiplier) > len(self.base_weights):
            raise SettingsError(
                f"model.base_weights_multiplier has {len(self.base_weights_multiplier)} numbers for"
                f" {len(self.base_weights)} files of model.base_weights; give one for each"
            )

    @property
    def num_chunks(self) -> int:
        """How many passes of the text encoder read a prompt."""
        return self.max_token_length // 75

    @property
    def told_schedule(self) -> dict[str, Any]:
        """What the settings say of the noise schedule, as keys of scheduler_config.json."""
        told = {
            "prediction_type": self.prediction_type,
            "rescale_betas_zero_snr": self.zero_terminal_snr,
        }
        return {key: value for key, value in told.items() if value is not None}

    @property
    def merged_weights(self) -> list[tuple[Path, float]]:
        """The LoRA files that are merged into the base, each with its multiplier."""
        files = [Path(given).expanduser() for given in self.base_weights]
        more = len(files) - len(self.base_weights_multiplier)
        return list(zip(files, [*self.base_weights_multiplier, *[1.0] * more], strict=True))

    @property
    def is_single_file(self) -> bool:
        """One checkpoint file in the original Stable Diffusion layout, not a diffusers folder."""
        return Path(self.path).is_file()


def check_weights_file(key: str, given: str) -> None:
    """Raise SettingsError unless the setting `key` names a .safetensors file that is there."""
    file = Path(given).expanduser()
    try:
        check_no_pipe(file)
    except ForeignFileError as error:
        raise SettingsError(f"{key}={given}: {error}") from None
    if file.suffix.lower() != ".safetensors":
        raise SettingsError(
            f"{key}={given}: give a LoRA as .safetensors; `lorasweep export FILE --to kohya"
            " --allow-pickle` makes one of an older .ckpt or .pt"
        )
    if not file.is_file():
        raise SettingsError(f"{key}={given}: no such file; give a LoRA file on this machine")
