"""From composed YAML to a typed Run: hydra and omegaconf live here, and every check of a value."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep.core.settings import SettingsError, build, build_class, unknown_key
from lorasweep.core.text import shown
from lorasweep.tracking.store import explain as explain_store

if TYPE_CHECKING:
    from lorasweep.adapters.adapter import Adapter
    from lorasweep.data.captions.caption_images import Captioner
    from lorasweep.data.dataset import Dataset
    from lorasweep.judging.metrics.metric import Metric
    from lorasweep.judging.sampling import Sampling
    from lorasweep.models.load_model import Model
    from lorasweep.tracking import Tracking
    from lorasweep.training.native_trainer import NativeTrainer
    from lorasweep.training.optimizers import LRScheduler, Optimizer

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
MAX_NAME = 100  # bytes of a run's name; file systems allow 255, and numbers and endings are added


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
    tags: Mapping[str, str] = field(default_factory=dict)
    """Further tags in MLflow."""

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
        "named": lambda name, key="name": _name(name, None, key),
        "times": lambda a, b: a * b,
        "over": lambda a, b: a / b,
        "basename": lambda path: re.sub(r"[^\w-]+", "-", Path(path).name).strip("-") or "lora",
        "user_cache": lambda name: str(_user_cache() / name),
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    OmegaConf.register_new_resolver("begun", _begun, replace=True)


def _begun(kind: str, parent: str, new: str, *, _root_: DictConfig) -> str:
    """The folder in which this very command was broken off; else the new one.

    Kept for the command's life: a folder that was found is no longer free once we train there.
    """
    from lorasweep.runs import run_folder

    cache = OmegaConf.get_cache(_root_)["begun"]
    if (kind, parent) not in cache:
        if kind == "sweep":
            found = run_folder.find_sweep(Path(parent), sweep_digest(_root_))
        else:
            settings = run_folder.settings_digest(_settings(_root_))
            found = run_folder.find_run(Path(parent), settings)
        cache[kind, parent] = str(found or Path(parent) / new)
    return str(cache[kind, parent])


def sweep_digest(cfg: DictConfig) -> str:
    """A digest of a multirun: the settings that its jobs share, and what they differ in."""
    from lorasweep.runs import run_folder

    settings = run_folder.settings_digest(_settings(cfg))
    return run_folder.digest(settings, sorted(cfg.hydra.overrides.task))


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """The flat settings of a composed config, as a Run has them; {} where some are missing."""
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in _OF_SWEEP])
    try:
        return _flat(_resolved(own))
    except SettingsError:
        return {}


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """The config that `train` would run with these overrides. Raises Hydra's errors."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_resolvers()
    if config_dir is not None and not config_dir.is_dir():  # Hydra goes on without it
        raise SettingsError(f"--config-dir {config_dir}: there is no such folder")
    place = quoted(f"file://{config_dir.absolute()}") if config_dir else ""
    extra = [f"hydra.searchpath=[{place}]"] if config_dir else []
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra_compose("config", [*extra, *overrides])


@dataclass(frozen=True)
class Command:
    """A `lorasweep train` that can be given again: its words, and the folder it was given in."""

    argv: list[str]
    cwd: Path


def begun_by(folder: Path) -> Command:
    """The command by which a run's or a multirun's folder was begun, to go on there.

    Raises SettingsError where Hydra's files of it are missing.
    """
    multirun = folder / "multirun.yaml"
    file = multirun if multirun.is_file() else folder / ".hydra" / "hydra.yaml"
    try:
        hydra = OmegaConf.load(file).hydra
        sources = [one.path for one in hydra.runtime.config_sources if one.provider in _COMMAND]
        given = [*hydra.overrides.hydra, *hydra.overrides.task]
        cwd = Path(hydra.runtime.cwd)
    except (OSError, OmegaConfBaseException, AttributeError) as error:
        raise SettingsError(f"{file}: can't tell how it was begun ({error})") from None
    key = "hydra.sweep.dir" if multirun.is_file() else "hydra.run.dir"
    overrides = [one for one in given if not one.startswith(("hydra.mode=", f"{key}="))]
    folders = [word for path in sources for word in ("--config-dir", str(path))]
    flags = ["-m"] if multirun.is_file() else []
    return Command([*flags, *folders, *overrides, f"{key}={quoted(str(folder))}"], cwd)


def quoted(text: str) -> str:
    """A value for Hydra's grammar, whatever characters it has."""
    literal = text.replace("${", "\\${")  # no interpolation of OmegaConf's
    escaped = re.sub(r"\\+(?='|$)", lambda found: found[0] * 2, literal).replace("'", "\\'")
    return f"'{escaped}'"


def folder(value: object, key: str) -> Path:
    """A folder that a setting names, absolute. Raises SettingsError for no text."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise SettingsError(f"{key}={value}: give a folder")
    return Path(value).expanduser().absolute()


def saved_model(config_file: Path, *, trusted: bool) -> Model:
    """The base model of a run's config; one that came with a file may name no class, no pickle."""
    from lorasweep.models.load_model import Model

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
    for key in sorted(_NEEDED - values.keys()):
        raise SettingsError(f"{key} can't be removed: leave out ~{key}")
    run = Run(
        name=_name(values["name"], number),
        seed=_integer(values["seed"], "seed"),
        sweep=sweep,
        output_root=folder(values["output_root"], "output_root"),
        output_dir=output_dir.absolute(),
        cache_dir=folder(values["cache_dir"], "cache_dir"),
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
    line = explain(error) or explain_store(error)
    if line is None and type(error).__module__.startswith("lorasweep"):
        return str(error)
    return line


def explain(error: Exception) -> str | None:
    """One line for what the user can mend, naming key and remedy; None for any other error."""
    from hydra.errors import HydraException, OverrideParseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    if isinstance(error, OverrideParseException):
        cause = str(error).splitlines()[0]
        override = shown(str(error.override))
        return f"{override}: can't be read ({cause}); quote values that hold , [ ] {{ }} or ="
    if isinstance(error, SettingsError):
        return str(error)
    if isinstance(error, YAMLError):
        told = " ".join(str(error).split())
        return f"{shown(told, 300)}: it is not YAML; mend the file"
    if isinstance(error, UnicodeDecodeError):
        return f"a file of settings is not UTF-8 text ({error.reason}); save it so"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[:100]!r} can't be written as {error.encoding}; give it another name"
    if isinstance(error, ValueError) and "Config group override must be" in str(error):
        return "a group takes the name of an option, not null or a number: GROUP=OPTION"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return _explain_os(error) if isinstance(error, OSError) else None
    message = str(error)
    if named := re.search(
        r"(?s)raised while resolving interpolation: (\S*name=.*it names files\))", message
    ):
        return shown(named[1])
    if missing := re.search(r"[Mm]issing mandatory value: ([\w.]+)", message):
        return _explain_missing(missing[1])
    if "Ambiguous value for argument" in message:
        override = message.partition("'")[2].partition("'")[0]
        return f"{override}: several values make a sweep; train it by lorasweep train -m …"
    if option := re.search(r"Could not (?:find|load) '(.+?)/([^/']+)'", message):
        group, name = option.groups()
        if group == "hydra/launcher" and name in _LAUNCHERS:
            return f"hydra/launcher={name} is not installed: {_LAUNCHERS[name]}"
        options = getattr(error, "options", None) or groups().get(group, ["none"])
        return f"{group}={name}: there is no such option; choose one of {', '.join(options)}"
    if there := re.search(r"An item is already at '(.+?)'", message):
        return f"{there[1]} is there already: change it without the +, by {there[1]}=VALUE"
    if key := re.search(
        r"Could not (?:override|append to config|delete from config)[^']*'(.+?)'", message
    ):
        return _explain_key(key[1])
    if removed := re.match(r"Key '.+?' is not in struct\s+full_key: (\S+)", message):
        return f"{removed[1]} can't be removed: leave out ~{removed[1]}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:2])


_OF_THE_PLACE = {
    errno.EACCES: "make it accessible",
    errno.EPERM: "make it accessible",
    errno.EROFS: "give a place that can be written to",
    errno.ENOSPC: "free some disk, or give another place",
    errno.EDQUOT: "free some disk, or give another place",
    errno.EFBIG: "free some disk, or give another place",
    errno.EIO: "the disk or its connection is at fault",
    errno.ENOTDIR: "a file is where a folder is needed",
    errno.EEXIST: "a file is where a folder is needed",
    errno.EISDIR: "a folder is where a file is needed",
    errno.ENOENT: "give a place that exists",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "it is a link to itself",
    errno.EMFILE: "allow more open files (ulimit -n)",
}
"""What a person can do about errors of files and folders."""


def _explain_os(error: OSError) -> str | None:
    """One line for what files, folders and disks refuse; None for any other error."""
    remedy = _OF_THE_PLACE.get(error.errno or 0)
    if remedy is None:
        return None
    place = error.filename if error.filename2 is None else error.filename2
    where = (
        shown(os.fsdecode(place), 300) if isinstance(place, str | bytes | os.PathLike) else "a file"
    )
    return f"{where}: {error.strerror}; {remedy}"


_LAUNCHERS = {  # of Hydra's own, by the extra that brings them
    **dict.fromkeys(
        ("joblib", "submitit_local", "submitit_slurm"), "pip install 'lorasweep[cluster]'"
    ),
    "ray": "pip install 'lorasweep[ray]', or take launcher.pack_via=ray (lorasweep[cluster])",
}


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

    from lorasweep.sweeps.study.study_settings import StudySettings

    known = [f"study.{field.name}" for field in fields(StudySettings)]
    if ".".join(key.split(".")[:2]) in known:
        return f"{key}: to add to what is there, write ++{key}=…"
    return unknown_key(key, known)


def _yaml_keys(file: Path) -> list[str]:
    loaded = OmegaConf.load(file)
    return [str(key) for key in loaded if key not in ("_target_", "defaults")]


_COMMAND = ("command-line",)  # whence Hydra has the folder of --config-dir
_OF_SWEEP = ("hydra", "study")  # how a run came about, not what it is
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
_NEEDED = {*_COMPONENTS, "name", "seed", "output_root", "cache_dir"}
_KEYS = {*_NEEDED, "captions", "metrics", "pick", "launcher"}
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
    return {str(key): value for key, value in values.items() if key not in _OF_SWEEP}


def _name(name: object, number: int | None, key: str = "name") -> str:
    text = str(name)
    if name is None or not re.fullmatch(r"[\w-]+", text):
        raise SettingsError(
            f"{key}={shown(text)}: use letters, digits, - and _ only (it names files)"
        )
    if len(text.encode()) > MAX_NAME:
        raise SettingsError(f"{key}={text[:20]}…: use at most {MAX_NAME} bytes (it names files)")
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
    from lorasweep.adapters.kohya_names import adapted_parts

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
        key, _, value = override.partition("=")
        key = key.lstrip("+")
        if key in _COMPONENTS and value.startswith("["):
            raise SettingsError(f"{key}={value}: choose one option; several make a sweep, by -m")
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
