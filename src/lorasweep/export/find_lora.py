"""Which LoRA file a word on the command line means, and which base model it belongs to."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep import tracking
from lorasweep.config.build_run import absolute_folder, model_named, saved_model
from lorasweep.config.compose import compose_without_images
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.settings import SettingsError, build
from lorasweep.core.text import shown
from lorasweep.judging.pick_rule import rank, with_finite_score
from lorasweep.lora_files import checkpoint
from lorasweep.tracking.store import sqlite_path

if TYPE_CHECKING:
    from lorasweep.models.load_model import Model
    from lorasweep.tracking import Candidate, Tracking


class OriginError(ValueError):
    """A word that names no LoRA, or one of an unknown base; the message says what to do."""


@dataclass(frozen=True)
class FoundLoRA:
    """A LoRA file with its base model."""

    path: Path
    name: str
    model: Model
    lines: tuple[str, ...]
    """How both were found, for a person."""
    exports: Path
    """Where exports go that are given no place."""


def find(word: str, overrides: Sequence[str], config_dir: Path | None = None) -> FoundLoRA:
    """The LoRA that `word` means: a .safetensors file, a run's name, or a checkpoint's (RUN-e012).

    Of a run it is the checkpoint that `lorasweep pick` would rank first among the run's in its
    newest sweep. The base model is the one that the overrides name (model=…, model.path=…), else
    the one it was trained on. Raises OriginError.
    """
    cfg = compose_without_images(overrides, config_dir)
    lines: list[str] = []
    if word.endswith(".safetensors") or (Path(word).exists() and not Path(word).is_dir()):
        path, model = Path(word), None
    else:
        path, model, lines = _of_run(word, cfg)
    if _names_model(overrides):
        model = build(cfg.model, "model")
    elif model is None:
        found = trained_on(path, cfg)
        if found is None:
            raise OriginError(
                f"{path}: {unknown_base(path)}; give model=OPTION or model.path=FOLDER"
            )
        model, where = found
        lines = [*lines, where]
    return FoundLoRA(path, path.stem, model, tuple(lines), Path(cfg.output_root) / "exports")


def _names_model(overrides: Sequence[str]) -> bool:
    """Do the overrides choose the base model? Raises SettingsError where they only change it."""
    keys = [override.partition("=")[0].lstrip("+") for override in overrides]
    if {"model", "model.path", "experiment"} & set(keys):
        return True
    if changed := [key for key in keys if key.startswith("model.")]:
        raise SettingsError(f"{changed[0]} changes a model: say which by model=… or model.path=…")
    return False


def _of_run(name: str, cfg: Any) -> tuple[Path, Model, list[str]]:
    settings: Tracking = build(cfg.tracking, "tracking")
    output_root = absolute_folder(cfg.output_root, "output_root")
    uri = settings.resolve(output_root)
    found = tracking.candidates(uri, settings.experiment)
    wanted = [one for one in found if name in (one.run, one.name)]
    if not wanted:
        runs = ", ".join(sorted({one.run for one in found})) or "none yet"
        raise OriginError(
            f"{name} is neither a .safetensors file nor a run's name; runs are: {runs}. Runs below"
            " another folder are found by output_root=FOLDER"
        )
    newest = [one for one in wanted if one.sweep == wanted[-1].sweep]
    chosen, why = _best(newest, cfg.pick.by)
    path = chosen.path
    if not path.is_file():
        path = output_root / "exports" / chosen.path.name
        tracking.fetch_file(uri, chosen, path)
    model = _base_of_run(uri, chosen)
    lines = [f"{chosen.name} of sweep {chosen.sweep}, {why}: {path}", f"Its base: {model.path}"]
    return path, model, lines


def _best(candidates: Sequence[Candidate], by: str) -> tuple[Candidate, str]:
    """The checkpoint that a person expects of a run, and why it is that."""
    scored = with_finite_score(candidates, by)
    if len(candidates) == 1:
        return candidates[0], "its only checkpoint"
    if not scored:
        return candidates[-1], f"its newest, for none has a {by}"
    best = rank(scored, by)[0]
    return best, f"the best of its {len(candidates)} by {by} ({best.scores[by]:.4f})"


def trained_on(path: Path, cfg: Any) -> tuple[Model, str] | None:
    """The base model of a file, and how it was found; None for one that nothing names.

    By the config that lies beside it, by its metadata, or by the run in the tracking store of `cfg`
    that wrote it. Raises SettingsError for a config beside it that can't be read.
    """
    metadata = checkpoint.read_metadata(path)
    for file in (path.parent / "config.yaml", path.parent / ".hydra" / "config.yaml"):
        if file.is_file():
            model = saved_model(file, trusted=False)
            return model, f"Base model, of {file}: {model.path}"
    if named := model_named(metadata.get("ss_sd_model_name", "")):
        option, model = named
        return model, f"Base model, by its metadata: {model.path} (model={option})"
    return _by_hash(metadata.get("sshs_model_hash"), cfg)


def unknown_base(path: Path) -> str:
    """Why the base of a file isn't known, in words that name the file's own."""
    named = checkpoint.read_metadata(path).get("ss_sd_model_name", "")
    says = f"its metadata says {shown(named)}" if named else "its metadata doesn't say"
    return f"which base model is it for? {says}"


def _by_hash(wanted: str | None, cfg: Any) -> tuple[Model, str] | None:
    """The base of the run whose checkpoint has this hash; a store that isn't there has none."""
    settings: Tracking = build(cfg.tracking, "tracking")
    uri = settings.resolve(Path(cfg.output_root).absolute())
    store = sqlite_path(uri)
    if not wanted or (store is not None and not store.is_file()):
        return None
    for one in tracking.candidates(uri, settings.experiment):
        if one.path.is_file() and _hash_of(one.path) == wanted:
            model = _base_of_run(uri, one)
            return model, f"Base model, of {one.name} in the tracking store: {model.path}"
    return None


def _hash_of(path: Path) -> str | None:
    try:
        return checkpoint.read_metadata(path).get("sshs_model_hash")
    except CheckpointError:  # a run's file that was cut since
        return None


def _base_of_run(uri: str, candidate: Candidate) -> Model:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(tracking.config_of(uri, candidate))
        return saved_model(file, trusted=True)
