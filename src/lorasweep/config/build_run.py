"""From a composed config to a typed Run: every value is checked on the way."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lorasweep.config.checks import CHECKS, Check
from lorasweep.config.compose import compose_without_images, flat, plain_values
from lorasweep.config.conf_folder import groups
from lorasweep.config.hydra_messages import cannot_be_removed, missing_value
from lorasweep.config.resolvers import register_resolvers
from lorasweep.config.run import COMPONENTS, KEYS, NEEDED, Run
from lorasweep.core.settings import (
    SettingsError,
    build,
    build_class,
    name_for_files,
    unknown_key,
)
from lorasweep.core.text import shown
from lorasweep.training.training_run import RunTraining

if TYPE_CHECKING:
    from lorasweep.data.dataset import Dataset
    from lorasweep.models.load_model import Model

log = logging.getLogger(__name__)


def build_run(
    cfg: DictConfig,
    *,
    output_dir: Path,
    overrides: Sequence[str] = (),
    sweep: str | None = None,
    number: int | None = None,
    checks: Sequence[Check] = CHECKS,
) -> Run:
    """Check every value of a composed config and build its components.

    `number` is the job's in its sweep and completes the run's name. Raises SettingsError in one
    line that names the key and the remedy.
    """
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise SettingsError(missing_value(missing[0]))
    values = plain_values(cfg)
    for key in values:
        if key not in KEYS:
            raise SettingsError(unknown_key(key, sorted(KEYS)))
    for key in sorted(NEEDED - values.keys()):
        raise SettingsError(cannot_be_removed(key))
    name = name_for_files(values["name"], "name")
    components = {key: build(values[key], key) for key in COMPONENTS if key != "trainer"}
    run = Run(
        name=name if number is None else f"{name}-{number}",
        seed=_integer(values["seed"], "seed"),
        sweep=sweep,
        output_root=absolute_folder(values["output_root"], "output_root"),
        output_dir=output_dir.absolute(),
        cache_dir=absolute_folder(values["cache_dir"], "cache_dir"),
        captions=_captions(values.get("captions"), components["dataset"]),
        metrics=_several(values.get("metrics"), "metrics"),
        config_yaml=OmegaConf.to_yaml(OmegaConf.create(values)),
        params=flat(values),
        overrides=tuple(overrides),
        number=number,
        **components,
        **_trainer(values["trainer"]),
    )
    for check in checks:
        for warning in check(run) or ():
            log.warning(warning)
    return run


def job_identity(hydra_cfg: DictConfig) -> dict[str, Any]:
    """Where a Hydra job writes and which sweep it belongs to, as `build_run` takes it.

    A single run is a sweep of its own, named like one: NAME-DATE-TIME.
    """
    output_dir = Path(hydra_cfg.runtime.output_dir)
    number = hydra_cfg.job.num if str(hydra_cfg.mode) == "RunMode.MULTIRUN" else None
    folder = output_dir if number is None else Path(hydra_cfg.sweep.dir).absolute()
    return {
        "output_dir": output_dir,
        "overrides": tuple(hydra_cfg.overrides.task),
        "sweep": f"{folder.parent.name}-{folder.name}",
        "number": number,
    }


def saved_model(config: Mapping[str, Any], where: object) -> Model:
    """The base model that a run's config names, which others may have written.

    It names no class, allows no pickle, and asks for nothing of this machine (`${oc.env:…}`).
    """
    from lorasweep.models.load_model import Model

    node = config.get("model")
    if not isinstance(node, dict):
        raise SettingsError(f"{where} names no base model; give model=…")
    for key, value in node.items():
        if "${" in str(value) and not re.fullmatch(r"\$\{embedded:\w+\}", str(value)):
            raise SettingsError(f"{where} gives model.{shown(str(key))} by reference; give model=…")
    register_resolvers()
    plain: Any = OmegaConf.to_container(OmegaConf.create(node), resolve=True)
    plain.pop("_target_", None)
    # pictures are compared with those of programs that read 75 tokens and no weights
    ours = {"allow_pickle": False, "max_token_length": 75, "weighted_captions": False}
    return build_class(Model, {**plain, **ours}, "model")  # type: ignore[no-any-return]


def model_named(name: str) -> tuple[str, Model] | None:
    """The option of conf/model whose model has this path, or this last part of it; its model too.

    Of programs that log a model's name alone.
    """
    for option in groups()["model"] if name else ():
        model = build(compose_without_images([f"model={option}"]).model, "model")
        if name in (model.path, Path(model.path).name):
            return option, model
    return None


def absolute_folder(value: object, key: str) -> Path:
    """A folder that a setting names, absolute. Raises SettingsError for no text."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise SettingsError(f"{key}={value}: give a folder")
    return Path(value).expanduser().absolute()


def _trainer(node: Any) -> dict[str, Any]:
    """What is written under `trainer`: the pack's settings, and a run's own."""
    own, shared = {}, node
    if isinstance(node, Mapping):
        names = {one.name for one in fields(RunTraining)}
        own = {key: value for key, value in node.items() if key in names}
        shared = {key: value for key, value in node.items() if key not in names}
    trainer = build(shared, "trainer")
    return {"trainer": trainer, **vars(build_class(RunTraining, own, "trainer"))}


def _integer(value: object, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SettingsError(f"{key}={value}: must be a whole number")
    return value


def _captions(nodes: Mapping[str, Any] | None, dataset: Dataset) -> dict[str, Any]:
    if not nodes and not dataset.is_kohyas:
        raise SettingsError("captions is empty: choose at least one arm, e.g. captions=[empty]")
    return _several(nodes, "captions")


def _several(nodes: Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    """Components of a group of which several can be chosen, by name."""
    for name, node in (nodes or {}).items():
        if not re.fullmatch(r"\w[\w-]*", name):
            raise SettingsError(f"{key}.{name}: use letters, digits, - and _ (it names a folder)")
        if not isinstance(node, Mapping):
            raise SettingsError(
                f"{key}.{name}={node}: change one of its settings, as {key}.{name}.KEY"
            )
        if "_target_" not in node:
            raise SettingsError(
                f"{key}.{name} has settings but is not chosen: add its option to {key}=[…], or"
                " leave them out"
            )
    return {name: build(node, f"{key}.{name}") for name, node in (nodes or {}).items()}
