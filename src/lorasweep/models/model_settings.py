"""The settings that name a base model, checked before anything of it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from lorasweep.core.foreign_files import ForeignFileError, check_no_pipe
from lorasweep.core.settings import Settings, SettingsError

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
    zero_terminal_snr: bool | None = None  # later than runs of older versions

    def __post_init__(self) -> None:
        if not self.path.strip() or "\0" in self.path:
            raise SettingsError("model.path is empty: give a diffusers folder, a .safetensors file")
        file = Path(self.path)
        for key, given in (("path", self.path), ("config", self.config or "")):
            try:
                check_no_pipe(Path(given).expanduser())
            except ForeignFileError as error:
                raise SettingsError(f"model.{key}={given}: {error}") from None
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

    @property
    def is_single_file(self) -> bool:
        """One checkpoint file in the original Stable Diffusion layout, not a diffusers folder."""
        return Path(self.path).is_file()
