"""The settings of a logged run, rebuilt so that they can be trained here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep.config.build_run import build_run
from lorasweep.config.compose import compose_without_images
from lorasweep.config.conf_folder import PACKAGE, conf_dir
from lorasweep.config.resolvers import register_resolvers
from lorasweep.config.run import Run
from lorasweep.core.components import short_name
from lorasweep.core.settings import SettingsError, unknown_key

PLACES = (
    "output_root",
    "cache_dir",
    "dataset.image_dir",
    "model.path",
    "model.revision",
    "model.config",
    "trainer.device",
    "tracking",
)
"""Settings that say where things are, not what is trained; they may differ here."""
_COMPONENTS = ("model", "dataset", "adapter", "optimizer", "lr_scheduler", "trainer", "sampling")
_SINGLE = (*_COMPONENTS, "tracking")
_SIDECAR = "Sidecar"


class ReproduceError(SettingsError):
    """What keeps a run from being made again; the message names it and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings as a run logged them, resolved."""

    values: dict[str, Any]
    filled: Mapping[str, Any] = field(default_factory=dict)
    """What the log lacks, for its lorasweep did not have it: today's defaults."""
    followed: Mapping[str, Any] = field(default_factory=dict)
    """What changed along with an override, as alpha with the rank."""


def check_places(places: Sequence[str]) -> None:
    """Raise ReproduceError for a setting that is more than a place."""
    for place in places:
        key = place.partition("=")[0].lstrip("+")
        if not any(key == name or key.startswith(f"{name}.") for name in PLACES):
            raise ReproduceError(
                f"{place}: it would train something else; for a variation give it as --override"
                f" {place}. What may differ here is {', '.join(PLACES)}"
            )


def rebuild(
    logged: str, places: Sequence[str], changed: Sequence[str] = (), given: Sequence[str] = ()
) -> Recipe:
    """The recipe of a run's config.yaml, with places of this machine and the overrides `changed`.

    `given` are the overrides that the run was started with. Raises ReproduceError or SettingsError.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.create(logged))
    except (OmegaConfBaseException, ValueError) as error:
        raise ReproduceError(
            f"its config.yaml can't be read: {str(error).splitlines()[0]}"
        ) from None
    assert isinstance(values, dict)
    recipe = _completed({str(key): value for key, value in values.items()})
    recipe = _varied(recipe, changed, given)
    return Recipe(
        values=_placed(recipe.values, places), filled=recipe.filled, followed=recipe.followed
    )


def build(values: Mapping[str, Any], output_dir: Path, sweep: str, **further: Any) -> Run:
    """The run of plain values. Raises SettingsError."""
    from dataclasses import replace

    register_resolvers()
    cfg = OmegaConf.create(dict(values))
    return replace(build_run(cfg, output_dir=output_dir, sweep=sweep), **further)


def with_captions(values: Mapping[str, Any], image_dir: Path, jsonl: Path) -> dict[str, Any]:
    """The same settings on other folders: each arm reads its captions from one JSONL."""
    arms = {
        arm: {
            "_target_": _SIDECAR,
            "repeats": node["repeats"],
            "suffix": None,
            "jsonl": str(jsonl),
            "text_key": arm,
        }
        for arm, node in values["captions"].items()
    }
    dataset = {**values["dataset"], "image_dir": str(image_dir)}
    return {**values, "dataset": dataset, "captions": arms}


def relocated(path: str) -> str:
    """A path of the installed package, where that lies here; any other as it is."""
    inside = re.search(r"lorasweep/embedded/(.+)$", path)
    if inside is None or Path(path).exists():
        return path
    return str(PACKAGE / "embedded" / inside[1])


def write_config(values: Mapping[str, Any], folder: Path, name: str, of: str = "") -> Path:
    """Write options of every group and an experiment that chooses them; the experiment's file.

    `lorasweep train --config-dir FOLDER experiment=NAME` runs it. Places of a machine and the
    tracking store, which may hold a password, are left out.
    """
    defaults: list[Any] = []
    for group in _COMPONENTS:
        node = dict(values[group])
        if group == "trainer":
            node["device"] = "auto"
        _write(folder / group / f"{name}.yaml", node)
        defaults.append({f"override /{group}": name})
    for group in ("captions", "metrics"):
        path = folder / group / f"{name}.yaml"
        _write(path, dict(values.get(group) or {}), f"# @package {group}\n")
        defaults.append({f"override /{group}": [name]})
    rest = {key: values[key] for key in ("name", "seed") if key in values}
    path = folder / "experiment" / f"{name}.yaml"
    head = f"# @package _global_\n# {of}\n" if of else "# @package _global_\n"
    _write(path, {"defaults": defaults, **rest}, head)
    return path


def _write(path: Path, content: Mapping[str, Any], head: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + OmegaConf.to_yaml(OmegaConf.create(dict(content))), encoding="utf-8")


def _option(group: str, target: str) -> dict[str, Any]:
    """The YAML of the option of a group that configures this class, unresolved; {} if none does."""
    for file in sorted((conf_dir() / group).glob("*.yaml")):
        loaded = OmegaConf.to_container(OmegaConf.load(file))
        if isinstance(loaded, dict) and loaded.get("_target_") == short_name(target):
            return {str(key): value for key, value in loaded.items()}
    return {}


def _completed(values: dict[str, Any]) -> Recipe:
    """Fill in settings that came with a later lorasweep."""
    register_resolvers()
    filled = {}
    for group in _SINGLE:
        node = values.get(group)
        if not isinstance(node, dict):
            raise ReproduceError(f"its config.yaml has no {group}: it is not a run of lorasweep's")
        for key, value in _option(group, str(node.get("_target_"))).items():
            if key not in node:
                node[key] = value
                filled[f"{group}.{key}"] = value
    if not filled:
        return Recipe(values=values)
    resolved = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    assert isinstance(resolved, dict)
    found = {key: _at(resolved, key) for key in filled}
    return Recipe(values={str(key): value for key, value in resolved.items()}, filled=found)


def _varied(recipe: Recipe, changed: Sequence[str], given: Sequence[str]) -> Recipe:
    """Apply overrides; what follows from others by conf/, such as alpha from the rank, does so."""
    if not changed:
        return recipe
    keys = [one.partition("=")[0].lstrip("+") for one in [*changed, *given]]
    values = _with_rules(recipe.values, keys)
    cfg = OmegaConf.create(values)
    for override in changed:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ReproduceError(f"--override {override}: give it as KEY=VALUE")
        cfg = _changed(cfg, key.lstrip("+"), override.lstrip("+"))
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    new = {str(key): value for key, value in resolved.items()}
    followed = {
        f"{group}.{key}": value
        for group in _COMPONENTS
        for key, value in new[group].items()
        if value != recipe.values[group].get(key, value)
        and not any(f"{group}.{key}".startswith(one) for one in keys)
    }
    return Recipe(values=new, filled=recipe.filled, followed=followed)


def _changed(cfg: Any, key: str, override: str) -> Any:
    """The config with one override applied; a whole option where the key is a group's."""
    if key in ("captions", "metrics"):
        raise ReproduceError(
            f"--override {override}: {key} can't be swapped as a whole; write the settings by"
            " --as-config DIR and choose it when you train them"
        )
    value = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    if key in _COMPONENTS:
        option = compose_without_images([override])[key]
        OmegaConf.update(cfg, key, OmegaConf.to_container(option, resolve=True), merge=False)
        return cfg
    if "." in key and _at(OmegaConf.to_container(cfg), key, _MISSING) is _MISSING:
        known = [f"{key.rpartition('.')[0]}.{name}" for name in _siblings(cfg, key)]
        raise ReproduceError(unknown_key(key, known) if known else f"{key}: no such setting")
    OmegaConf.update(cfg, key, _at(value, key), merge=False)
    return cfg


def _siblings(cfg: Any, key: str) -> list[str]:
    parent = _at(OmegaConf.to_container(cfg), key.rpartition(".")[0], {})
    return sorted(parent) if isinstance(parent, dict) else []


def _with_rules(values: Mapping[str, Any], fixed: Sequence[str]) -> dict[str, Any]:
    """Put conf/'s own rules (`${half:${.rank}}`) back in where they give what was logged."""
    new = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for group in _COMPONENTS:
        for key, rule in _option(group, str(values[group]["_target_"])).items():
            if not (isinstance(rule, str) and "${." in rule) or f"{group}.{key}" in fixed:
                continue
            draft = OmegaConf.create({group: {**values[group], key: rule}})
            if OmegaConf.select(draft, f"{group}.{key}") == values[group].get(key):
                new[group][key] = rule
    return new


def _placed(values: dict[str, Any], places: Sequence[str]) -> dict[str, Any]:
    """The settings with what is elsewhere on this machine."""
    here = compose_without_images(places)
    keys = {place.partition("=")[0].lstrip("+") for place in places}
    values = {**values, "output_root": here.output_root, "cache_dir": here.cache_dir}
    tracking = OmegaConf.to_container(here.tracking)
    assert isinstance(tracking, dict)
    model_name = values["tracking"].get("registered_model", "lorasweep")
    values["tracking"] = {**tracking, "registered_model": model_name}
    for key in ("model.path", "model.revision", "model.config", "trainer.device"):
        group, _, name = key.partition(".")
        if key in keys or group in keys:
            values[group] = {**values[group], name: here[group][name]}
    image_dir = str(values["dataset"]["image_dir"])
    if "dataset.image_dir" in keys:
        image_dir = str(here.dataset.image_dir)
    values["dataset"] = {**values["dataset"], "image_dir": relocated(image_dir)}
    path = relocated(str(values["model"]["path"]))
    values["model"] = {**values["model"], "path": path}
    if Path(path).is_absolute() and not Path(path).exists():
        raise ReproduceError(
            f"its base model {path} is not here; give the same one as model.path=FOLDER"
        )
    return values


_MISSING = object()


def _at(node: Any, key: str, default: Any = None) -> Any:
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return default
        node = node[part]
    return node
