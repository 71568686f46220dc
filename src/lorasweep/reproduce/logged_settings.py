"""The settings of a logged run, rebuilt so that they can be trained here.

They become a config folder from which the config is composed, as `lorasweep train --config-dir`
does: a place or an override of the command line means the same here as there.

Somebody else may have written the log. So `${` in it is text, no pickle and no class of others is
taken on its word, and a model that is not on this machine is fetched only for whoever names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import OmegaConf

from lorasweep.config.compose import compose, literal, plain_values, quoted
from lorasweep.config.conf_folder import PACKAGE, conf_dir
from lorasweep.config.run import COMPONENTS
from lorasweep.core.components import short_name
from lorasweep.core.foreign_files import parse_yaml
from lorasweep.reproduce.config_folder import TRAINED_GROUPS, write_config_folder
from lorasweep.reproduce.original_run import ReproduceError
from lorasweep.reproduce.trusted_settings import (
    names_class,
    refuse_classes,
    refuse_downloads,
    refuse_odd_values,
    refuse_programs,
)

PLACES = (
    "output_root",
    "cache_dir",
    "dataset.image_dir",
    "model.path",
    "model.revision",
    "model.config",
    "model.allow_pickle",
    "model.base_weights",
    "trainer.network_weights",
    "trainer.device",
    "trainer.path",
    "trainer.python",
    "tracking",
)
"""Settings that say where things are, not what is trained; they may differ here."""


@dataclass(frozen=True, kw_only=True)
class LoggedSettings:
    """Settings as a run logged them, resolved, with the places of this machine."""

    values: dict[str, Any]
    filled: Mapping[str, Any]
    """Settings that the run's lorasweep did not have yet, with today's defaults."""
    followed: Mapping[str, Any]
    """What changed along with an override, as alpha with the rank."""
    image_dir: Path | None
    """The folder of images that was given by hand; the log's is only looked at by name."""


def check_places(places: Sequence[str]) -> None:
    """Raise ReproduceError for a setting that is more than a place, or a class that is trusted."""
    for place in places:
        key = _key(place)
        is_place = any(key == name or key.startswith(f"{name}.") for name in PLACES)
        if not is_place and not names_class(key):
            raise ReproduceError(
                f"{place}: it would train something else; for a variation give it as --override"
                f" {place}. What may differ here is {', '.join(PLACES)}"
            )


def rebuild(
    logged: str, places: Sequence[str], changed: Sequence[str] = (), given: Sequence[str] = ()
) -> LoggedSettings:
    """The settings of a run's config.yaml, with places of this machine and overrides `changed`.

    `given` are the overrides that the run was started with. Raises ReproduceError, SettingsError
    or Hydra's errors.
    """
    _check_overrides(changed)
    before = _read(logged)
    _refuse_what_is_not_laid_out(before["dataset"])
    refuse_classes(before, places)
    refuse_programs(before["trainer"], [_key(one) for one in (*places, *changed)])
    if "python" in before["trainer"]:
        before["trainer"]["python"] = None  # a program too, and there is a default
    before["model"]["allow_pickle"] = False
    values = literal(before)
    filled = _fill_in(values)
    fixed = [_key(one) for one in [*changed, *given]]
    source = _with_rules(values, fixed) if changed else values
    model_name = before["tracking"].get("registered_model", before["name"])
    with TemporaryDirectory() as folder:
        file = write_config_folder(source, Path(folder), "logged-run")
        cfg = compose(
            [
                f"experiment={file.stem}",
                f"tracking.registered_model={quoted(str(model_name))}",
                *places,
                *changed,
            ],
            Path(folder),
        )
    new = plain_values(cfg)
    given_dir = Path(str(new["dataset"]["image_dir"]))
    moved = [_key(place) for place in places]
    refuse_downloads(new["model"], {*moved, *(_key(one) for one in changed)})
    return LoggedSettings(
        values=new,
        filled={f"{group}.{key}": new[group][key] for group, key in filled},
        followed={
            f"{group}.{key}": value
            for group in TRAINED_GROUPS
            for key, value in new[group].items()
            if value != before[group].get(key, value)
            and not any(f"{group}.{key}".startswith(one) for one in [*fixed, *moved])
        },
        image_dir=given_dir.expanduser() if "dataset.image_dir" in moved else None,
    )


def with_captions(values: Mapping[str, Any], image_dir: Path, jsonl: Path) -> dict[str, Any]:
    """The same settings on other folders: each arm reads its captions from one JSONL."""
    arms = {
        arm: {
            "_target_": "Sidecar",
            "repeats": node.get("repeats"),
            "suffix": None,
            "jsonl": str(jsonl),
            "text_key": arm,
            "tags": node.get("tags", True),
        }
        for arm, node in values["captions"].items()
    }
    dataset = {**values["dataset"], "image_dir": str(image_dir)}
    return {**values, "dataset": dataset, "captions": arms}


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _check_overrides(changed: Sequence[str]) -> None:
    for override in changed:
        if "=" not in override:
            raise ReproduceError(f"--override {override}: give it as KEY=VALUE")
        if (key := _key(override)) in ("captions", "metrics"):
            raise ReproduceError(
                f"--override {override}: {key} can't be swapped as a whole; write the settings by"
                " --as-config DIR and choose it when you train them"
            )


def _read(logged: str) -> dict[str, Any]:
    """The plain values of a config.yaml, with the embedded model and images where they lie here."""
    values: dict[str, Any] = parse_yaml(logged, "its config.yaml")
    refuse_odd_values(values)
    for node, key in ((values["model"], "path"), (values["dataset"], "image_dir")):
        path = str(node.get(key))
        inside = re.search(r"lorasweep/embedded/(.+)$", path)
        if inside is not None and ".." not in path and not Path(path).exists():
            node[key] = str(PACKAGE / "embedded" / inside[1])
    return values


def _refuse_what_is_not_laid_out(dataset: Mapping[str, Any]) -> None:
    """Images and captions are laid out again for captioners: kohya's folders have none."""
    others = (dataset.get(key) for key in ("reg_data_dir", "conditioning_data_dir"))
    if dataset.get("_target_") == "KohyaDataset" or any(one is not None for one in others):
        raise ReproduceError(
            "it was trained on kohya's folders or with masks, which are not laid out again from the"
            " log; train it again on them by the settings of its config.yaml"
        )


def _fill_in(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Add the settings that came with a later lorasweep; their groups and keys."""
    filled = []
    for group in COMPONENTS:
        for key, value in _option(group, values[group]).items():
            if key not in values[group]:
                values[group][key] = value
                filled.append((group, key))
    return filled


def _option(group: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """The option of conf/ that configures the same class, unresolved; {} if none does."""
    for file in sorted((conf_dir() / group).glob("*.yaml")):
        option: Any = OmegaConf.to_container(OmegaConf.load(file))
        if option.get("_target_") == short_name(str(node.get("_target_"))):
            return option  # type: ignore[no-any-return]
    return {}


def _with_rules(values: Mapping[str, Any], fixed: Sequence[str]) -> dict[str, Any]:
    """Put conf/'s own rules (`${half:${.rank}}`) back in where they give what was logged."""
    new = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for group in TRAINED_GROUPS:
        for key, rule in _option(group, values[group]).items():
            if not (isinstance(rule, str) and "${." in rule) or f"{group}.{key}" in fixed:
                continue
            draft = OmegaConf.create({group: {**values[group], key: rule}})
            if OmegaConf.select(draft, f"{group}.{key}") == values[group].get(key):
                new[group][key] = rule
    return new
