"""A base model on the command line: a folder, file or hub id, or the name of an option (sd15)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorasweep.models.load_model import Model


def model_path(word: str) -> str:
    """A model's own path; of an option of conf/model (embedded, sd15) what it says."""
    from lorasweep.config.compose import compose_without_images
    from lorasweep.config.conf_folder import groups

    if word not in groups()["model"] or Path(word).exists():
        return word
    return str(compose_without_images([f"model={word}"]).model.path)


def model_of(word: str, config: str | None) -> Model:
    """The model of a word, with conf/model/sd15's other values. Raises SettingsError."""
    from lorasweep.config.compose import compose_without_images, quoted
    from lorasweep.core.settings import build

    configs = [f"model.config={quoted(model_path(config))}"] if config else []
    chosen = ["model=sd15", f"model.path={quoted(model_path(word))}"]
    model: Model = build(compose_without_images([*chosen, *configs]).model, "model")
    return model
