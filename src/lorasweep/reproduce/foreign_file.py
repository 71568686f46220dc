"""The nearest config of a LoRA file that kohya's scripts made, by its `ss_*` metadata.

What the metadata says and our settings can say is taken over; everything else is listed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from lorasweep.config.compose import compose_without_images
from lorasweep.lora_files import checkpoint, info
from lorasweep.reproduce import kohya_options, recipe

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Guess:
    """Settings by which a file may have been made."""

    name: str
    options: dict[str, str] = field(default_factory=dict)
    """Group -> option of conf/."""
    settings: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    """Setting -> what the file says, in its own words."""
    unknown: list[tuple[str, str]] = field(default_factory=list)
    """What is not known or can't be said here, and what stands instead."""
    arms: dict[str, int] = field(default_factory=dict)
    """Caption folders with their repeats."""

    def take(self, setting: str, value: Any, said: str) -> None:
        """Note a setting."""
        self.settings[setting], self.sources[setting] = value, said

    def write(self, folder: Path, overrides: Sequence[str] = ()) -> Path:
        """Write a folder for `lorasweep train --config-dir`; its experiment's file.

        Raises SettingsError if the settings can't be trained here.
        """
        values = self.values(overrides)
        run = {**values, "dataset": {**values["dataset"], "image_dir": "lorasweep"}}
        recipe.build(run, Path(), "check")
        return recipe.write_config(values, folder, self.name)

    def values(self, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """The whole config, resolved; its images are left for the user to give."""
        chosen = [f"{group}={option}" for group, option in self.options.items()]
        cfg = compose_without_images(["captions=[sidecar]", *chosen])
        OmegaConf.set_struct(cfg, False)
        for setting, value in self.settings.items():
            OmegaConf.update(cfg, setting, value, merge=False)
        for override in overrides:
            OmegaConf.update(cfg, override.partition("=")[0], _value(override), merge=False)
        resolved = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(resolved, dict)
        values = {
            str(key): value for key, value in resolved.items() if key not in ("hydra", "study")
        }
        sidecar = values["captions"]["sidecar"]
        arms = {arm: {**sidecar, "repeats": repeats} for arm, repeats in self.arms.items()}
        dataset = {**values["dataset"], "image_dir": "???"}
        return {
            **values,
            "name": self.name,
            "captions": arms or {"sidecar": sidecar},
            "dataset": dataset,
        }


def guess(path: Path) -> Guess:
    """What a file's metadata, and where there is none its tensors, say of its training.

    Raises CheckpointError for a file that is no LoRA.
    """
    told = info.inspect(path)
    metadata = checkpoint.read_metadata(path)
    stem = re.sub(r"[^\w-]+", "-", metadata.get("ss_output_name") or path.stem).strip("-")
    found = Guess(name=f"{stem or 'lora'}-guess")
    kohya_options.network(found, metadata, told)
    kohya_options.optimizer(found, metadata)
    for setting, (key, convert) in kohya_options.PLAIN.items():
        _plain(found, metadata, setting, key, convert)
    kohya_options.data(found, metadata)
    kohya_options.model(found, metadata)
    for key, (neutral, meaning) in kohya_options.NOT_HERE.items():
        if (said := metadata.get(key)) is not None and said not in neutral:
            found.unknown.append((f"{key}={said}", f"{meaning}: not in lorasweep, left out"))
    _reconcile(found)
    found.unknown += kohya_options.NEVER_TOLD
    return found


def table(found: Guess) -> Table:
    """What is known, by which entry, and what is not."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=escape(found.name), title_justify="left")
    for column in ("setting", "value", "from the file, or instead"):
        shown.add_column(column, overflow="fold")
    for group, option in found.options.items():
        shown.add_row(group, escape(option), escape(_printable(found.sources.get(group, ""))))
    for arm, repeats in found.arms.items():
        shown.add_row(f"captions.{escape(arm)}.repeats", str(repeats), "ss_dataset_dirs")
    for setting, value in found.settings.items():
        shown.add_row(setting, escape(str(value)), escape(_printable(found.sources[setting])))
    for what, instead in found.unknown:
        shown.add_row(escape(_printable(what)), "[yellow]not known[/yellow]", escape(instead))
    return shown


def _plain(
    found: Guess, metadata: Mapping[str, str], setting: str, key: str, convert: Callable[[str], Any]
) -> None:
    said = metadata.get(key)
    if said is None:
        found.unknown.append((setting, f"no {key} in the file; the default stands"))
        return
    try:
        value = convert(said)
    except (ValueError, KeyError, SyntaxError, TypeError):
        found.unknown.append((f"{setting} ({key}={said})", "not understood; the default stands"))
        return
    if value is not kohya_options.LEAVE:
        found.take(setting, value, f"{key}={said}")


def _reconcile(found: Guess) -> None:
    """Drop what has no effect together; kohya lets such settings stand."""
    settings = found.settings
    shuffles = settings.get("dataset.shuffle_caption") or settings.get(
        "dataset.caption_tag_dropout_rate"
    )
    if settings.get("dataset.keep_tokens") and not shuffles:
        del settings["dataset.keep_tokens"]  # no effect without shuffling
    if not settings.get("dataset.enable_bucket"):
        for name in ("bucket_no_upscale", "min_bucket_reso", "max_bucket_reso"):
            settings.pop(f"dataset.{name}", None)


def _value(override: str) -> Any:
    node = OmegaConf.from_dotlist([override])
    return OmegaConf.select(node, override.partition("=")[0])


def _printable(text: str) -> str:
    cut = text if len(text) <= 120 else f"{text[:119]}…"
    return "".join(char if char.isprintable() else "?" for char in cut)
