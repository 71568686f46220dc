"""Which LoRA file a word on the command line means, and which base model it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep import tracking
from lorasweep.config.build_run import absolute_folder, model_named, saved_model
from lorasweep.config.compose import compose_without_images
from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.foreign_files import parse_yaml, read_yaml
from lorasweep.core.settings import SettingsError, build
from lorasweep.core.text import listed, shown
from lorasweep.export import diffusers_folder
from lorasweep.judging.pick_rule import comparable, rank, with_finite_score
from lorasweep.lora_files import checkpoint
from lorasweep.tracking.moved_store import follow_move
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
    given = build(cfg.model, "model") if _names_model(overrides) else None
    lines: list[str] = []
    if word.endswith(".safetensors") or (Path(word).exists() and not Path(word).is_dir()):
        path = Path(word)
        found = trained_on(path, cfg) if given is None else None
    else:
        path, lines, found = _of_run(word, cfg, needs_base=given is None)
    if given is not None:
        model = given
    elif found is not None:
        model = _on_this_machine(found[0])
        lines = [*lines, found[1]]
    else:
        raise OriginError(f"{path}: {unknown_base(path)}; give model=OPTION or model.path=FOLDER")
    return FoundLoRA(path, path.stem, model, tuple(lines), Path(cfg.output_root) / "exports")


def _names_model(overrides: Sequence[str]) -> bool:
    """Do the overrides choose the base model? Raises SettingsError where they only change it."""
    keys = [override.partition("=")[0].lstrip("+") for override in overrides]
    if {"model", "model.path", "experiment"} & set(keys):
        return True
    if changed := [key for key in keys if key.startswith("model.")]:
        raise SettingsError(f"{changed[0]} changes a model: say which by model=… or model.path=…")
    return False


def _on_this_machine(model: Model) -> Model:
    """A model that a file or a store names, not the person; so it isn't downloaded."""
    config = model.config if model.is_single_file else None
    source, revision = (config, None) if config else (model.path, model.revision)
    if (model.is_single_file and not config) or diffusers_folder.downloaded(source, revision):
        return model
    raise OriginError(
        f"the base model, {shown(source)}, is not on this machine; model.path={shown(model.path)}"
        " fetches it from the hub, model.path=FOLDER gives a copy"
    )


def _of_run(
    name: str, cfg: Any, *, needs_base: bool
) -> tuple[Path, list[str], tuple[Model, str] | None]:
    """A run's file, how it was found, and its base with a line about it."""
    settings: Tracking = build(cfg.tracking, "tracking")
    output_root = absolute_folder(cfg.output_root, "output_root")
    follow_move(settings, output_root)
    uri = settings.resolve(output_root)
    found = tracking.candidates(uri, settings.experiment)
    wanted = [one for one in found if name in (one.run, one.name)]
    if not wanted:
        runs = listed(sorted({one.run for one in found})) or "none yet"
        raise OriginError(
            f"{name} is neither a .safetensors file nor a run's name; runs are: {runs}. Runs below"
            " another folder are found by output_root=FOLDER"
        )
    newest = [one for one in wanted if one.sweep == wanted[-1].sweep]
    chosen, why = _best(newest, cfg.pick.by)
    base = None
    if needs_base:
        model = _base_of_run(uri, chosen)
        base = model, f"Its base: {model.path}"
    path = tracking.local_file(chosen, output_root)
    if path is None:
        path = output_root / "exports" / chosen.path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, tracking.read_checkpoint(uri, chosen, output_root))
    lines = [shown(f"{chosen.name} of sweep {chosen.sweep}, {why}: {path}", 1000)]
    return path, lines, base


def _best(candidates: Sequence[Candidate], by: str) -> tuple[Candidate, str]:
    """The checkpoint that a person expects of a run, and why it is that."""
    if chosen := next((one for one in candidates if one.chosen_by), None):
        who = "chosen by a person" if chosen.chosen_by == "person" else "picked by the rule"
        return chosen, f"{who} in its sweep"
    by = comparable(candidates, by)
    scored = with_finite_score(candidates, by)
    if len(candidates) == 1:
        return candidates[0], "its only checkpoint"
    if not scored:
        return candidates[-1], f"its newest, for none has a {by}"
    best = rank(scored, by)[0].file
    return best, f"the best of its {len(candidates)} by {by} ({best.scores[by]:.4f})"


def trained_on(path: Path, cfg: Any) -> tuple[Model, str] | None:
    """The base model of a file, and how it was found; None for one that nothing names.

    By the config that lies beside it, by its metadata, or by the run in the tracking store of `cfg`
    that wrote it. Raises SettingsError for a config beside it that can't be read.
    """
    metadata = checkpoint.read_metadata(path)
    for file in (path.parent / "config.yaml", path.parent / ".hydra" / "config.yaml"):
        if file.is_file():
            model = saved_model(read_yaml(file), file)
            return model, f"Base model, of {file}: {model.path}"
    if named := model_named(metadata.get("ss_sd_model_name", "")):
        option, model = named
        return model, f"Base model, by its metadata: {model.path} (model={option})"
    return _by_hash(checkpoint.data_hash(path), cfg)


def unknown_base(path: Path) -> str:
    """Why the base of a file isn't known, in words that name the file's own."""
    named = checkpoint.read_metadata(path).get("ss_sd_model_name", "")
    says = f"its metadata says {shown(named)}" if named else "its metadata doesn't say"
    return f"which base model is it for? {says}"


def _by_hash(wanted: str, cfg: Any) -> tuple[Model, str] | None:
    """The base of the run whose checkpoint has this hash; a store that isn't there has none."""
    settings: Tracking = build(cfg.tracking, "tracking")
    output_root = absolute_folder(cfg.output_root, "output_root")
    follow_move(settings, output_root)
    uri = settings.resolve(output_root)
    store = sqlite_path(uri)
    if store is not None and not store.is_file():
        return None
    for one in tracking.candidates(uri, settings.experiment):
        if one.hash == wanted:
            model = _base_of_run(uri, one)
            return model, f"Base model, of {one.name} in the tracking store: {model.path}"
    return None


def _base_of_run(uri: str, candidate: Candidate) -> Model:
    where = f"config.yaml of {shown(candidate.run)}"
    return saved_model(parse_yaml(tracking.config_of(uri, candidate), where), where)
