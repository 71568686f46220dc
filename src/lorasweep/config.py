"""From composed YAML to a typed Run: hydra and omegaconf live here, and every check of a value."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep.settings import SettingsError, build, build_class, unknown_key

if TYPE_CHECKING:
    from lorasweep.adapters import Adapter
    from lorasweep.captions import Captioner
    from lorasweep.dataset import Dataset
    from lorasweep.metrics import Metric
    from lorasweep.models import Model
    from lorasweep.optimizers import LRScheduler, Optimizer
    from lorasweep.sampling import Sampling
    from lorasweep.tracking import Tracking
    from lorasweep.trainers.native import NativeTrainer

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Run:
    """One configured training: every component, typed and checked."""

    name: str
    seed: int
    sweep: str | None
    output_root: Path
    output_dir: Path
    cache_dir: Path
    model: Model
    dataset: Dataset
    captions: Mapping[str, Captioner]
    adapter: Adapter
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    trainer: NativeTrainer
    sampling: Sampling
    metrics: Mapping[str, Metric]
    tracking: Tracking
    config_yaml: str
    params: Mapping[str, Any]
    overrides: Sequence[str]
    number: int | None = None
    """In its sweep: of its job, and of its trial if there is a study."""

    def check(self) -> None:
        """Raise SettingsError for what can be known to be wrong before any work."""
        self.optimizer.check()
        self.sampling.check()

    def can_share_pack(self, other: Run) -> bool:
        """Can both train together? Base, data, batches and what is scored must be the same."""
        return self._shared() == other._shared()

    def _shared(self) -> tuple[object, ...]:
        own = {"max_train_epochs": 1, "noise_offset": 0.0, "min_snr_gamma": None}
        return (
            self.model,
            self.dataset,
            self.captions,
            replace(self.trainer, **own),  # type: ignore[arg-type]
            self.sampling,
            self.metrics,
            self.tracking,
            self.output_root,
        )


def conf_dir() -> Path:
    """The folder of options: inside the installed package, or the checkout's."""
    return _data_dir("conf")


def sweeps_dir() -> Path:
    """The folder of the sweeps that ship, likewise."""
    return _data_dir("sweeps")


def _data_dir(name: str) -> Path:
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parents[1] / name


def groups() -> dict[str, list[str]]:
    """The groups of conf/ and sweeps/, with the names of their options."""
    folders = [*sorted(path for path in conf_dir().iterdir() if path.is_dir()), sweeps_dir()]
    found = {folder.name: sorted(p.stem for p in folder.glob("*.yaml")) for folder in folders}
    return {name: options for name, options in found.items() if options}


def register_resolvers() -> None:
    """What conf/ may say in `${…}` beyond OmegaConf's own."""
    resolvers: dict[str, Any] = {
        "embedded": lambda path: str(PACKAGE / "embedded" / path),
        "half": lambda number: number / 2 if isinstance(number, int | float) else number,
        "times": lambda a, b: a * b,
        "over": lambda a, b: a / b,
        "basename": lambda path: re.sub(r"[^\w-]+", "-", Path(path).name).strip("-") or "lora",
        "user_cache": lambda name: str(_user_cache() / name),
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """The config that `train` would run with these overrides. Raises Hydra's errors."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_resolvers()
    extra = [f"hydra.searchpath=[file://{config_dir.absolute()}]"] if config_dir else []
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra_compose("config", [*extra, *overrides])


def quoted(text: str) -> str:
    """A value for Hydra's grammar, whatever characters it has."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def saved_model(config_file: Path, *, trusted: bool) -> Model:
    """The base model of a run's config; one that came with a file may name no class, no pickle."""
    from lorasweep.models import Model

    register_resolvers()
    try:
        node = OmegaConf.to_container(OmegaConf.load(config_file).model, resolve=True)
    except (OmegaConfBaseException, AttributeError) as error:
        first = str(error).splitlines()[0]
        raise SettingsError(f"{config_file} names no base model: {first}; give model=…") from None
    if not isinstance(node, dict):
        raise SettingsError(f"{config_file} names no base model; give model=…")
    node.pop("_target_", None)
    if not trusted:
        node["allow_pickle"] = False
    return build_class(Model, node, "model")  # type: ignore[no-any-return, arg-type]


def build_run(
    cfg: DictConfig,
    *,
    output_dir: Path,
    overrides: Sequence[str] = (),
    sweep: str | None = None,
    number: int | None = None,
) -> Run:
    """Check every value of a composed config and build its components.

    `number` is the job's in its sweep and completes the run's name. Raises SettingsError in one
    line that names the key and the remedy.
    """
    _check_complete(cfg)
    values = _resolved(cfg)
    for key in values:
        if key not in _KEYS:
            raise SettingsError(unknown_key(key, sorted(_KEYS)))
    run = Run(
        name=_name(values["name"], number),
        seed=_integer(values["seed"], "seed"),
        sweep=sweep,
        output_root=Path(values["output_root"]).expanduser().absolute(),
        output_dir=output_dir.absolute(),
        cache_dir=Path(values["cache_dir"]).expanduser().absolute(),
        captions=_group(values.get("captions"), "captions"),
        metrics=_group(values.get("metrics"), "metrics"),
        config_yaml=OmegaConf.to_yaml(OmegaConf.create(values)),
        params=_flat(values),
        overrides=tuple(overrides),
        number=number,
        **{key: build(values[key], key) for key in _COMPONENTS},
    )
    _check_places(run)
    _check_parts(run)
    _check_used(run)
    _warn(run)
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


def one_line(error: Exception) -> str | None:
    """What a person is told of an error; None for one of ours, which keeps its traceback."""
    line = explain(error)
    if line is None and type(error).__module__.startswith("lorasweep"):
        return str(error)
    return line


def explain(error: Exception) -> str | None:
    """One line for what the user can mend, naming key and remedy; None for any other error."""
    from hydra.errors import HydraException, OverrideParseException

    if isinstance(error, OverrideParseException):
        cause = str(error).splitlines()[0]
        return f"{error.override}: can't be read ({cause}); quote values that hold , [ ] {{ }} or ="
    if isinstance(error, SettingsError):
        return str(error)
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    message = str(error)
    if missing := re.search(r"[Mm]issing mandatory value: ([\w.]+)", message):
        return _explain_missing(missing[1])
    if "Ambiguous value for argument" in message:
        override = message.partition("'")[2].partition("'")[0]
        return f"{override}: several values make a sweep; train it by lorasweep train -m …"
    if option := re.search(r"Could not find '(.+?)/([^/']+)'", message):
        group, name = option.groups()
        if group == "hydra/launcher" and name in _LAUNCHERS:
            return f"hydra/launcher={name} is not installed: {_LAUNCHERS[name]}"
        return f"{group}={name}: there is no such option; choose one of {_options(group)}"
    if there := re.search(r"An item is already at '(.+?)'", message):
        return f"{there[1]} is there already: change it without the +, by {there[1]}=VALUE"
    if key := re.search(
        r"Could not (?:override|append to config|delete from config)[^']*'(.+?)'", message
    ):
        return _explain_key(key[1])
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:2])


_LAUNCHERS = {  # of Hydra's own, by the extra that brings them
    **dict.fromkeys(
        ("joblib", "submitit_local", "submitit_slurm"), "pip install 'lorasweep[cluster]'"
    ),
    "ray": "pip install 'lorasweep[ray]', or take launcher.pack_via=ray (lorasweep[cluster])",
}


def _options(group: str) -> str:
    names = {path.stem for path in (conf_dir() / group).glob("*.yaml")}
    return ", ".join(sorted(names)) or "none"


def _explain_key(key: str) -> str:
    """Why `key` can't be overridden: the group has no such setting, or there is no such group."""
    group, _, rest = key.partition(".")
    if group == "study":
        return _explain_study_key(key)
    files = list((conf_dir() / group).glob("*.yaml")) if rest else []
    having = {file.stem for file in files if rest in _yaml_keys(file)}
    if having:
        have = "have" if len(having) > 1 else "has"
        return f"{key}: only {group}={', '.join(sorted(having))} {have} it; choose that too"
    known = {f"{group}.{name}" for file in files for name in _yaml_keys(file)}
    return unknown_key(key, sorted(known or _KEYS))


def _explain_study_key(key: str) -> str:
    """Hydra lets nobody add to a mapping such as study.constraints, unless told by ++."""
    from dataclasses import fields

    from lorasweep.study.settings import StudySettings

    known = [f"study.{field.name}" for field in fields(StudySettings)]
    if ".".join(key.split(".")[:2]) in known:
        return f"{key}: to add to what is there, write ++{key}=…"
    return unknown_key(key, known)


def _yaml_keys(file: Path) -> list[str]:
    loaded = OmegaConf.load(file)
    return [str(key) for key in loaded if key not in ("_target_", "defaults")]


_COMPONENTS = (
    "model",
    "dataset",
    "adapter",
    "optimizer",
    "lr_scheduler",
    "trainer",
    "sampling",
    "tracking",
)
_KEYS = {
    *_COMPONENTS,
    "captions",
    "metrics",
    "name",
    "seed",
    "output_root",
    "cache_dir",
    "pick",
    "launcher",
}
_HINTS = {
    "dataset.image_dir": "give the folder of your images, e.g. dataset.image_dir=photos,"
    " or try experiment=demo"
}


def _check_complete(cfg: DictConfig) -> None:
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise SettingsError(_explain_missing(missing[0]))


def _explain_missing(key: str) -> str:
    return f"{key} is missing: {_HINTS.get(key, f'give it as {key}=VALUE')}"


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except (OmegaConfBaseException, TypeError) as error:
        raise SettingsError(str(error).splitlines()[0]) from None
    assert isinstance(values, dict)
    of_sweep = ("hydra", "study")  # how the run came about, not what it is
    return {str(key): value for key, value in values.items() if key not in of_sweep}


def _name(name: object, number: int | None) -> str:
    text = str(name)
    if not re.fullmatch(r"[\w-]+", text):
        raise SettingsError(f"name={text}: use letters, digits, - and _ only (it names files)")
    return text if number is None else f"{text}-{number}"


def _integer(value: object, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SettingsError(f"{key}={value}: must be a whole number")
    return value


def _group(nodes: Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    """Components of a group of which several can be chosen, by name."""
    if key == "captions" and not nodes:
        raise SettingsError("captions is empty: choose at least one arm, e.g. captions=[empty]")
    for name, node in (nodes or {}).items():
        if not re.fullmatch(r"[\w-]+", name):
            raise SettingsError(f"{key}.{name}: use letters, digits, - and _ (it names a folder)")
        if "_target_" not in node:
            raise SettingsError(
                f"{key}.{name} has settings but is not chosen: add its option to {key}=[…], or"
                " leave them out"
            )
    return {name: build(node, f"{key}.{name}") for name, node in (nodes or {}).items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _check_places(run: Run) -> None:
    image_dir = run.dataset.image_dir.resolve()
    if run.output_root.resolve().is_relative_to(image_dir):
        raise SettingsError(
            f"output_root={run.output_root} lies inside dataset.image_dir, so the next run would"
            " take its pictures for yours; give another output_root"
        )


def _check_parts(run: Run) -> None:
    from lorasweep.adapters.keys import adapted_parts

    adapted = adapted_parts(run.adapter.targets)
    trained = run.optimizer.trained_parts
    if not adapted & trained:
        raise SettingsError(
            f"adapter.targets={run.adapter.targets} adapts the {' and '.join(sorted(adapted))}"
            f" only, whose learning rate is 0; set optimizer.{min(adapted)}_lr"
        )
    for part in sorted(trained - adapted):
        log.warning(
            "optimizer.%s_lr has no effect: adapter.targets=%s has no adapters there",
            part,
            run.adapter.targets,
        )


_BUCKETING = [f"dataset.{name}_reso" for name in ("min_bucket", "max_bucket")]
_BUCKETING += ["dataset.bucket_reso_steps"]
_KERNELS = ["adapter.conv_rank", "adapter.conv_alpha"]
_DRAWING = [
    f"sampling.{name}"
    for name in ("prompts", "width", "height", "num_inference_steps", "guidance_scale", "seed")
]


def _check_used(run: Run) -> None:
    """Refuse overrides that nothing in this run reads; a file's values may wait for their turn."""
    unused: dict[str, str] = {}
    if not run.dataset.enable_bucket:
        unused |= dict.fromkeys(_BUCKETING, "dataset.enable_bucket=true")
    if run.sampling.every_n_epochs == 0:
        unused |= dict.fromkeys(_DRAWING, "sampling.every_n_epochs=1")
    if run.adapter.targets in ("attn-mlp", "unet-only"):
        unused |= dict.fromkeys(_KERNELS, "adapter.targets=full (or conv)")
    for override in run.overrides:
        key = override.partition("=")[0].lstrip("+")
        if key in unused:
            raise SettingsError(
                f"{key} has no effect without {unused[key]}; set that or leave it out"
            )


def _warn(run: Run) -> None:
    adapter, rslora = run.adapter, getattr(run.adapter, "rslora", False)
    for prefix in ("", "conv_"):
        rank = getattr(adapter, f"{prefix}rank", None)
        alpha = getattr(adapter, f"{prefix}alpha", None)
        if rank is not None and alpha is not None and alpha > rank and not rslora:
            log.warning(
                "adapter.%salpha=%g is larger than adapter.%srank=%d, which scales the delta up;"
                " the guide advises half of the rank: adapter.%salpha=%g",
                prefix,
                alpha,
                prefix,
                rank,
                prefix,
                rank / 2,
            )
    if getattr(adapter, "init", None) == "pissa" and run.trainer.save_dtype != "fp32":
        log.warning(
            "trainer.save_dtype=%s rounds adapter.init=pissa's factors, which are as large as the"
            " base's weights; keep the file exact by trainer.save_dtype=fp32",
            run.trainer.save_dtype,
        )
