"""What the settings of a log may make this machine do, since somebody else may have written them.

Of a log's own accord only lorasweep's classes run, no file is read as captions, and nothing is
downloaded. Whoever wants more names it on the command line.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lorasweep.config.conf_folder import PACKAGE, conf_dir
from lorasweep.config.run import COMPONENTS, Run
from lorasweep.core.components import short_name
from lorasweep.core.foreign_files import ForeignFileError, inside
from lorasweep.core.settings import name_for_files
from lorasweep.core.text import shown
from lorasweep.reproduce.original_run import ReproduceError
from lorasweep.runs import provenance
from lorasweep.runs.provenance import hub_copy

_OPTIMIZER = "optimizer.type"
_FETCH = "what a log names is not downloaded"


def names_class(key: str) -> bool:
    """Is it a setting whose value is a class?"""
    return key == _OPTIMIZER or key.endswith("._target_")


def refuse_odd_values(values: Mapping[str, Any]) -> None:
    """Raise SettingsError unless values are a run's: plain, under names that can name files.

    Hydra would read `defaults` at the top of a group as a list of further files.
    """
    for group in COMPONENTS:
        node = values.get(group)
        if not isinstance(node, dict) or "defaults" in node:
            raise ReproduceError(f"its config.yaml has no {group}: it is not a run of lorasweep's")
    if not isinstance(values["model"].get("path"), str):  # a default would be another model
        raise ReproduceError("its config.yaml has no model.path")
    name_for_files(values.get("name"), "its config.yaml: name")
    for group in ("captions", "metrics"):
        nodes = values.get(group) or {}
        if not isinstance(nodes, dict) or "defaults" in nodes:
            raise ReproduceError(f"its config.yaml: {group} are no settings by name")
        for name, node in nodes.items():
            name_for_files(name, f"its config.yaml: {group}")
            if not isinstance(node, dict):
                raise ReproduceError(f"its config.yaml: {group}.{name} has no settings")
    for key, value in _leaves(values, ""):
        if not isinstance(value, str | int | float | None):
            raise ReproduceError(f"its config.yaml: {shown(key)} is a {type(value).__name__}")


def refuse_classes(values: Mapping[str, Any], places: Sequence[str]) -> None:
    """Raise ReproduceError for a class that isn't lorasweep's, unless `places` has it again."""
    foreign = {key: name for key, name in _classes(values) if not _is_ours(key, name)}
    for key, name in foreign.items():
        if f"{key}={name}" not in places:
            raise ReproduceError(
                f"its {key} is {shown(name)}, which is not lorasweep's: it would run as the code"
                f" that it is. If you trust it, add {key}={shown(name)}"
            )
    for place in places:
        key = place.partition("=")[0].lstrip("+")
        if names_class(key) and key not in foreign:
            raise ReproduceError(f"{place}: only a class that the log names can be given again")


def refuse_programs(trainer: Mapping[str, Any], named: Collection[str]) -> None:
    """Raise ReproduceError for a trainer that runs programs, unless they are `named` by hand."""
    is_program = short_name(str(trainer.get("_target_"))) == "SdScriptsTrainer"
    if is_program and "trainer.path" not in named:
        raise ReproduceError(
            f"it was trained by sd-scripts in {shown(str(trainer.get('path')))}, and no program"
            " runs because a log names it; give your own checkout as trainer.path=FOLDER"
        )


def refuse_downloads(model: Mapping[str, Any], named: Collection[str]) -> None:
    """Raise ReproduceError for a base model that isn't here; `named` are settings given by hand."""
    path, config = str(model.get("path")), model.get("config")
    named = set(named)
    if not named & {"model", "model.path"} and not _is_here(path, model.get("revision")):
        if Path(path).is_absolute() or path.startswith((".", "~")):
            raise ReproduceError(
                f"its base model {shown(path)} is not here; give the same one as model.path=FOLDER"
            )
        raise ReproduceError(
            f"its base model {shown(path)} is not on this machine, and {_FETCH}; if you want it,"
            f" add model.path={shown(path)}, or give a copy as model.path=FOLDER"
        )
    from_hub = Path(path).is_file() and config is not None and _copy(str(config), None) is None
    if from_hub and not named & {"model", "model.config"}:
        raise ReproduceError(
            f"its model.config {shown(str(config))} is not on this machine, and {_FETCH}; if you"
            f" want it, add model.config={shown(str(config))}, or give a diffusers folder"
        )


def refuse_other_weights(
    origin: Mapping[str, Any] | None, run: Run, named: Collection[str]
) -> None:
    """Raise ReproduceError for LoRA files that a log names, unless they are the very ones of then.

    `named` are settings given by hand. A log could name any file of this machine.
    """
    then, cache = origin or {}, run.cache_dir
    model, now = then.get("model"), provenance.identity(run.model, cache)["files"]
    files = model.get("files") if isinstance(model, dict) else None
    known = files if isinstance(files, dict) else {}
    merged = [name for name in now if name.startswith(provenance.MERGED)]
    pairs = {
        "model.base_weights": [(known.get(name), now[name]) for name in merged],
        "trainer.network_weights": [
            (
                provenance.sha256_of(then.get(provenance.START)),
                provenance.start_digest(run.network_weights, cache),
            )
        ],
    }
    for key, digests in pairs.items():
        if key not in named and any(before != here for before, here in digests):
            raise ReproduceError(
                f"its {key} names a file that is another here than it was trained with; if it is"
                f" right, give it as {key}=FILE"
            )


def captioner(node: Mapping[str, Any], image_dir: Path | None) -> dict[str, Any]:
    """The settings of a logged captioner, as it may run here: from this machine's files alone.

    Captions are read from a file only below `image_dir`, the folder that was given by hand. Raises
    ReproduceError for what may not be used.
    """
    target = short_name(str(node.get("_target_")))
    if target not in _shipped("captions"):
        raise ReproduceError(f"{shown(target)} is not lorasweep's")
    if (jsonl := node.get("jsonl")) is not None:
        for folder in filter(None, (PACKAGE / "embedded", image_dir)):
            try:
                return {**node, "jsonl": str(inside(folder.absolute(), Path(str(jsonl))))}
            except ForeignFileError:
                continue
        raise ReproduceError(f"{shown(str(jsonl))} is not in the folder of images that you gave")
    if (model := node.get("model")) is not None:
        copy = _copy(str(model), node.get("revision"))
        if copy is None:
            raise ReproduceError(f"{shown(str(model))} is not on this machine, and {_FETCH}")
        return {**node, "model": str(copy), "revision": None}  # a hub id would ask the hub
    return dict(node)


def _classes(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings that name classes which a run is made of; its captions come from the log."""
    for group in COMPONENTS:
        if group != "tracking":  # this machine's
            yield f"{group}._target_", str(values[group].get("_target_"))
    for name, node in (values.get("metrics") or {}).items():
        yield f"metrics.{name}._target_", str(node.get("_target_"))
    yield _OPTIMIZER, str(values["optimizer"].get("type"))


def _is_ours(key: str, name: str) -> bool:
    if key != _OPTIMIZER:
        return short_name(name) in _shipped(key.partition(".")[0])
    files = (conf_dir() / "optimizer").glob("*.yaml")
    known = {str(OmegaConf.select(OmegaConf.load(file), "type")) for file in files}
    return name in known or re.fullmatch(r"(torch\.optim\.)?\w+", name) is not None


def _shipped(group: str) -> set[str]:
    """The classes of the options in conf/."""
    found = set()
    for file in (conf_dir() / group).glob("*.yaml"):
        option: Any = OmegaConf.to_container(OmegaConf.load(file))
        nodes = option.values() if group in ("captions", "metrics") else [option]
        found |= {str(node.get("_target_")) for node in nodes}
    return found


def _is_here(path: str, revision: object) -> bool:
    """Is a base model whole on this machine? The rest of a copy in the cache would be fetched."""
    if Path(path).expanduser().exists():
        return True
    copy = _copy(path, revision)
    parts = ["unet", "vae", "text_encoder"]
    if copy is not None and (copy / "tokenizer_2").is_dir():  # SDXL
        parts.append("text_encoder_2")
    return copy is not None and all(any((copy / part).glob("*.safetensors")) for part in parts)


def _copy(path: str, revision: object) -> Path | None:
    """A file or folder of this machine, or the copy of the hub's in the cache; None elsewhere."""
    if Path(path).expanduser().exists():
        return Path(path)
    repo_id, rest = "/".join(path.split("/")[:2]), path.split("/")[2:]
    name = re.fullmatch(r"\w[\w-]*(?:[./]\w[\w-]*)*", str(revision or "main"))
    if name is None or any(part in ("", ".", "..") for part in rest):
        return None
    copy = hub_copy(repo_id, None if revision is None else str(revision))
    return None if copy is None else Path(copy, *rest)


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, one in value.items():
            if not isinstance(name, str):
                yield f"a name in {key}", (name,)
            yield from _leaves(one, f"{key}.{name}".strip("."))
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one, key)
    else:
        yield key, value
