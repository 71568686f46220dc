"""Probes of this machine, for `lorasweep doctor`: libraries, devices, disks, models, tracking.

Each returns lines of doctor's table. Nothing is downloaded, and nothing that is written stays.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.error import HTTPError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import Request, urlopen

from lorasweep.config.checks import check_place
from lorasweep.config.run import Run
from lorasweep.core.settings import SettingsError
from lorasweep.core.text import size_of
from lorasweep.data import dataset
from lorasweep.models.base_model import PRECISIONS, Precision, torch_dtype
from lorasweep.models.devices import choose_devices, resolve_device
from lorasweep.models.model_files import read_sizes
from lorasweep.runs.provenance import hub_copy
from lorasweep.tracking.store import TrackingError, check_experiment, public_uri, sqlite_path

if TYPE_CHECKING:
    from omegaconf import DictConfig

Level = Literal["OK", "warning", "problem"]

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "onnxruntime", "mlflow")
OPTIONAL = {
    "bitsandbytes": "optimizer=adamw8bit",
    "lion-pytorch": "optimizer=lion",
    "prodigyopt": "optimizer=prodigy",
    "prodigy-plus-schedule-free": "optimizer=prodigy_plus_schedulefree",
    "dadaptation": "optimizer=dadapt_adam",
    "schedulefree": "optimizer=adamw_schedulefree",
    "pytorch-optimizer": "optimizer=came",
    "peft": "loading LoRA files in diffusers",
    "hydra-joblib-launcher": "hydra/launcher=joblib",
}
"""Package -> what wants it."""
GB = 1e9
LOW_DISK, NO_DISK = 10 * GB, 1 * GB  # the guide's recipe writes 15 GB of checkpoints
TIMEOUT = 2  # seconds that a server has to answer
SLOW_ON_CPU = 256 * 256  # pixels; a step of SD1.5 takes seconds there and above
_MODEL_FILES = {
    "text_encoder": ("*model.safetensors", "*-of-*.safetensors"),
    "unet": ("*model.safetensors", "*-of-*.safetensors"),
    "vae": ("*model.safetensors", "*-of-*.safetensors"),
    "tokenizer": ("*.json",),
    "scheduler": ("scheduler_config.json",),
}
"""What a diffusers folder must hold by sub-folder: one file that matches one of the patterns."""
_CAPTIONER_FILES = {
    "WD14": (("model.onnx", "model_optimized.onnx"), ("selected_tags.csv", "tag_mapping.json")),
    "Kosmos2": (("*.safetensors",), ("*.json",)),
}
"""Files that a captioner needs: one of each kind."""


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    text: str
    level: Level = "OK"
    remedy: str = ""


def problem_of(check: str, error: Exception) -> Finding:
    """A problem in the words of an error, whose remedy follows its first semicolon."""
    text, _, remedy = str(error).partition("; ")
    return Finding(check, text, "problem", remedy)


def versions() -> Iterator[Finding]:
    """Python and the libraries."""
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info < (3, 14):
        yield Finding("Python", version)
    else:
        yield Finding("Python", version, "warning", "use Python 3.11 to 3.13")
    installed = {name: _version(name) for name in LIBRARIES}
    listed = ", ".join(f"{name} {version}" for name, version in installed.items() if version)
    if missing := [name for name, version in installed.items() if version is None]:
        text = f"{', '.join(missing)} not installed"
        yield Finding("libraries", text, "problem", f"pip install {' '.join(missing)}")
    yield Finding("libraries", listed)
    if find_spec("torchvision") is not None:
        yield _torchvision()


def _torchvision() -> Finding:
    """Nothing here needs it, and one that doesn't fit torch breaks transformers and diffusers."""
    try:
        import torchvision  # type: ignore[import-not-found]  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        text = f"doesn't fit this torch ({str(error).splitlines()[0]}), so models can't be loaded"
        return Finding("torchvision", text, "problem", "pip uninstall torchvision")
    return Finding("torchvision", f"{_version('torchvision')}, not needed")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def devices(run: Run, launcher: DictConfig) -> Iterator[Finding]:
    """What there is to train on, and what the run and a sweep would take."""
    import torch

    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(f"cuda:{index}", f"{name}, {free / GB:.1f} of {total / GB:.1f} GB free")
    yield Finding("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}")
    try:
        device = resolve_device(run.trainer.device)
    except SettingsError as error:
        yield problem_of("trainer.device", error)
        return
    yield _trainer_device(run, device)
    yield _precision(run, device)
    yield _workers(launcher, run)


def _workers(launcher: DictConfig, run: Run) -> Finding:
    """What a sweep would train on."""
    asked = launcher.devices if isinstance(launcher.devices, str) else list(launcher.devices)
    try:
        devices = choose_devices(asked, run.trainer.device)
    except SettingsError as error:
        return problem_of("launcher.devices", error)
    text = f"a sweep has {len(devices)} worker{'s' if len(devices) > 1 else ''}"
    return Finding("launcher.devices", f"{text}: {', '.join(devices)}")


def _trainer_device(run: Run, device: str) -> Finding:
    text = f"{run.trainer.device}: trains on {device}"
    width, height = run.dataset.size
    if device == "cpu" and width * height >= SLOW_ON_CPU:
        remedy = f"a CUDA device for {width}x{height} pixels, or try experiment=demo"
        return Finding("trainer.device", f"{text}, which is slow", "warning", remedy)
    return Finding("trainer.device", text)


def _precision(run: Run, device: str) -> Finding:
    import torch

    works = [precision for precision in PRECISIONS if _computes(device, precision)]
    text = f"{run.trainer.precision} asked; {', '.join(works)} work on {device}"
    if run.trainer.precision not in works:
        return Finding("precision", text, "problem", f"trainer.precision={works[-1]}")
    is_emulated = device.startswith("cuda") and not torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    if run.trainer.precision == "bf16" and is_emulated:
        text += "; bf16 only by slow emulation"
        return Finding("precision", text, "warning", "trainer.precision=fp16")
    return Finding("precision", text)


def _computes(device: str, precision: Precision) -> bool:
    """Does a tiny step work there, forward and backward?"""
    import torch

    dtype = torch_dtype(precision)
    try:
        ones = torch.ones(8, 8, device=device, requires_grad=True)
        kind = torch.device(device).type
        with torch.autocast(kind, dtype, enabled=precision != "fp32"):
            product = ones @ ones
        product.float().sum().backward()
    except RuntimeError:
        return False
    return product.dtype == dtype and bool((product == 8).all())


def disk(key: str, folder: Path) -> Finding:
    """Can the folder of a setting be written, and how much is free?"""
    try:
        check_place(key, folder)
        parent = _existing(folder)
        free = shutil.disk_usage(parent).free
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(b"written")
    except SettingsError as error:
        return problem_of(key, error)
    except OSError as error:
        text = f"{folder} can't be written: {error.strerror}"
        return Finding(key, text, "problem", f"{key}=FOLDER that you can write to")
    text = f"{folder}: {size_of(free)} free"
    if free >= LOW_DISK:
        return Finding(key, text)
    remedy = f"free some, or {key}=FOLDER on a larger disk"
    return Finding(key, text, "problem" if free < NO_DISK else "warning", remedy)


def _existing(path: Path) -> Path:
    """The path or the nearest above it that exists, where what is missing would be made."""
    return next(place for place in (path, *path.parents) if place.exists())


@dataclass
class Hub:
    """The Hugging Face hub: what its cache holds, and can the rest be fetched?"""

    was_needed: bool = False

    @cached_property
    def is_offline(self) -> bool:
        """Is HF_HUB_OFFLINE set?"""
        from huggingface_hub.constants import HF_HUB_OFFLINE

        return bool(HF_HUB_OFFLINE)

    @cached_property
    def is_reachable(self) -> bool:
        """Does it answer in time?"""
        from huggingface_hub.constants import ENDPOINT

        return not self.is_offline and isinstance(_answer(ENDPOINT), int)

    def folder(self, path: str, revision: str | None) -> Path | None:
        """The folder `path`, or the copy in the cache of the hub's `path`; None if not here."""
        if Path(path).is_dir():
            return Path(path)
        repo_id, subfolder = "/".join(path.split("/")[:2]), path.split("/")[2:]
        copied = hub_copy(repo_id, revision)
        return None if copied is None else Path(copied, *subfolder)

    def absent(self, key: str, path: str, lacks: str) -> Finding:
        """What to say of a hub id whose files are not all here."""
        self.was_needed = True
        repo_id = "/".join(path.split("/")[:2])
        if self.is_reachable:
            text = f"{path}: {lacks}; it will be downloaded"
            return Finding(key, text, "warning", f"hf download {repo_id}, to do it now")
        why = "HF_HUB_OFFLINE is set" if self.is_offline else "the hub is out of reach"
        remedy = (
            f"where the hub is in reach, hf download {repo_id} --local-dir FOLDER; {key}=FOLDER"
        )
        return Finding(key, f"{path}: {lacks}, and {why}", "problem", remedy)

    def finding(self) -> Finding:
        """The hub's own line; it is asked only if something is to come from it."""
        if self.is_offline:
            remedy = "unset HF_HUB_OFFLINE to download" if self.was_needed else ""
            return Finding("hub", "HF_HUB_OFFLINE is set: nothing is downloaded", "OK", remedy)
        if not self.was_needed:
            return Finding("hub", "HF_HUB_OFFLINE is not set; nothing is to be downloaded")
        state = "in reach" if self.is_reachable else "out of reach"
        return Finding("hub", f"HF_HUB_OFFLINE is not set; the hub is {state}")


def base_model(run: Run, hub: Hub) -> Finding:
    """Are the files of the base model here?"""
    model = run.model
    if not model.is_single_file:
        pickles = ("*.bin",) if model.allow_pickle else ()
        needed = {part: (*names, *pickles) for part, names in _MODEL_FILES.items()}
        sizes = read_sizes(model)
        if sizes is not None and sizes.is_sdxl:
            needed |= {f"{part}_2": needed[part] for part in ("text_encoder", "tokenizer")}
        return _diffusers_folder("model.path", model.path, model.revision, hub, needed)
    size = Path(model.path).stat().st_size
    if model.config is None:
        remedy = "model.config=HUB_ID or FOLDER of a diffusers model like it"
        return Finding("model.config", "null, but a single file needs it", "problem", remedy)
    configs = dict.fromkeys(_MODEL_FILES, ("*.json",))
    config = _diffusers_folder("model.config", model.config, None, hub, configs)
    text = f"{model.path}: one file, {size / GB:.2f} GB; its config {config.text}"
    return Finding("model.path", text, config.level, config.remedy)


def _diffusers_folder(
    key: str, path: str, revision: str | None, hub: Hub, needed: Mapping[str, Sequence[str]]
) -> Finding:
    folder = hub.folder(path, revision)
    is_local = Path(path).is_dir()
    if folder is None:
        return hub.absent(key, path, "not in the hub's cache")
    lacks = [part for part, names in needed.items() if not _holds(folder / part, names)]
    if not lacks:
        return Finding(key, f"{path}: {'a folder' if is_local else 'in the hub cache'}")
    if not is_local:
        return hub.absent(key, path, f"no {', '.join(lacks)} in the hub's cache")
    remedy = "give the folder of a whole diffusers model with .safetensors weights"
    return Finding(key, f"{path}: no {', '.join(lacks)} in it", "problem", remedy)


def captioners(run: Run, hub: Hub) -> Iterator[Finding]:
    """A line for each chosen arm whose captioner is a model."""
    for arm, captioner in run.captions.items():
        needed = _CAPTIONER_FILES.get(type(captioner).__name__)
        if needed is None:
            continue
        key = f"captions.{arm}.model"
        path = str(Path(captioner.model).expanduser())  # type: ignore[attr-defined]
        folder = hub.folder(path, captioner.revision)  # type: ignore[attr-defined]
        lacks = [names[0] for names in needed if folder is None or not _holds(folder, names)]
        if not lacks:
            yield Finding(key, f"{path}: found")
        elif folder is not None and Path(path).is_dir():
            text = f"{path}: no {' and no '.join(lacks)} in it"
            yield Finding(key, text, "problem", "download the whole model, or captions=sidecar")
        else:
            yield hub.absent(key, path, "not in the hub's cache")


def _holds(folder: Path, patterns: Sequence[str]) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


NO_IMAGES = Finding("dataset.image_dir", "not given", "OK", "dataset.image_dir=FOLDER to train")


def images(run: Run) -> Finding:
    """Can the images that would be drawn be read, and are there enough?"""
    settings = run.dataset
    try:
        drawn = dataset.select(settings)  # opens those that would be drawn, as train does
    except SettingsError as error:
        return problem_of("dataset.image_dir", error)
    text = f"{settings.image_dir}: {drawn.summary(settings)}"
    if settings.wanted is not None and drawn.num_usable < settings.wanted:
        text += f"; {settings.wanted} wanted"
        return Finding("dataset.image_dir", text, "warning", "fewer are trained on and held out")
    return Finding("dataset.image_dir", text)


def tracking_store(run: Run) -> Finding:
    """Can MLflow's store be written, or does its server answer?"""
    uri = run.tracking.resolve(run.output_root)
    database = sqlite_path(uri)
    if database is not None:
        found = _sqlite(database)
        return found if found.level == "problem" else _deleted_experiment(run, uri) or found
    if urlsplit(uri).scheme not in ("http", "https"):
        text = f"{public_uri(uri)}: a database server, not tried"
        return Finding("tracking.uri", text, "warning")
    answer = _answer(f"{uri.rstrip('/')}/health")
    if answer == 200:
        found = Finding("tracking.uri", f"{public_uri(uri)} answers")
        return _deleted_experiment(run, uri) or found
    remedy = "start the server, or tracking.uri=null for a file under output_root"
    if isinstance(answer, int):
        text = f"{public_uri(uri)} answers with HTTP status {answer}"
        return Finding("tracking.uri", text, "warning", "is it an MLflow server, and yours to use?")
    return Finding("tracking.uri", f"{public_uri(uri)}: {answer}", "problem", remedy)


def _deleted_experiment(run: Run, uri: str) -> Finding | None:
    """A line if the experiment was deleted in MLflow, or the store can't be opened."""
    try:
        check_experiment(uri, run.tracking.experiment)
    except TrackingError as error:
        return problem_of("tracking.experiment", error)
    return None


def _sqlite(database: Path) -> Finding:
    """Write where the store is or will be; nothing stays."""
    remedy = "another output_root or tracking.uri"
    try:
        if database.exists():
            _lock(database)
            return Finding("tracking.uri", f"{database}: can be written")
        with tempfile.TemporaryDirectory(dir=_existing(database.parent)) as folder:
            _lock(Path(folder) / "probe.db")
    except (OSError, sqlite3.Error) as error:
        return Finding("tracking.uri", f"{database} can't be written: {error}", "problem", remedy)
    return Finding("tracking.uri", f"{database}: can be made")


def _lock(database: Path) -> None:
    """Begin to write and take it back: sees files that are read-only, damaged or locked."""
    with closing(sqlite3.connect(database, timeout=TIMEOUT)) as connection:
        connection.isolation_level = None  # we begin and end ourselves
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("CREATE TABLE lorasweep_doctor (written INTEGER)")
        connection.execute("ROLLBACK")


def _answer(url: str) -> int | str:
    """The HTTP status of a URL, or why there is none within the time."""
    parts = urlsplit(url)
    without_user = parts._replace(netloc=parts.netloc.rpartition("@")[2])  # urllib can't read it
    try:
        with urlopen(Request(urlunsplit(without_user), method="GET"), timeout=TIMEOUT) as response:
            return int(response.status)
    except HTTPError as error:
        return int(error.code)
    except (OSError, HTTPException, ValueError) as error:
        return f"no answer ({getattr(error, 'reason', error)})"


def optional_packages() -> Iterator[Finding]:
    """Packages that some options need."""
    for package, purpose in OPTIONAL.items():
        version = _version(package)
        if version is None:
            yield Finding(package, f"not installed; for {purpose}", "OK", f"pip install {package}")
        else:
            yield Finding(package, f"{version}; for {purpose}")
