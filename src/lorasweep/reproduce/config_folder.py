"""Settings as a folder of options for `lorasweep train --config-dir FOLDER experiment=NAME`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lorasweep.config.run import COMPONENTS
from lorasweep.core.text import shown

TRAINED_GROUPS = tuple(group for group in COMPONENTS if group != "tracking")
"""The groups of which a run has one option each, but for the tracking store."""


def write_config_folder(
    values: Mapping[str, Any], folder: Path, name: str, comment: str = ""
) -> Path:
    """Write an option of every group and an experiment that chooses them; the experiment's file.

    In the values `${…}` is a rule of conf/'s: what others may have written is to be `literal`.

    Places of a machine and the tracking store, which may hold a password, are left out.
    """
    defaults: list[Any] = []
    for group in TRAINED_GROUPS:
        _write(folder / group / f"{name}.yaml", dict(values[group]))
        defaults.append({f"override /{group}": name})
    for group in ("captions", "metrics"):
        path = folder / group / f"{name}.yaml"
        _write(path, dict(values.get(group) or {}), f"# @package {group}\n")
        defaults.append({f"override /{group}": [name]})
    rest = {key: values[key] for key in ("name", "seed") if key in values}
    file = folder / "experiment" / f"{name}.yaml"
    # of others' words, which may have line ends: what follows one would be a setting
    said = f"# {shown(comment, 500)}\n" if comment else ""
    head = f"# @package _global_\n{said}"
    _write(file, {"defaults": defaults, **rest}, head)
    return file


def _write(path: Path, content: Mapping[str, Any], head: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + OmegaConf.to_yaml(OmegaConf.create(dict(content))), encoding="utf-8")
