"""What a run is trained with beside its settings: base model, libraries, code, device.

It is kept with the run as `origin.json`, so that `lorasweep reproduce` can say what differs.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.foreign_files import ForeignFileError, parse_shaped, read_json, read_text
from lorasweep.models.load_model import Model

log = logging.getLogger(__name__)

ORIGIN, DIFF, PACK = "origin.json", "uncommitted.diff", "pack.json"
"""Names of the files, in a run's folder and in MLflow."""
START = "network_weights"
"""Key of origin.json: the LoRA file that a run began with."""
MERGED = "base_weights/"
"""Begins the names of files that are merged into the base, among its own."""
LIBRARIES = (
    "lorasweep",
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "numpy",
    "pillow",
    "tokenizers",
    "mlflow",
    "bitsandbytes",
    "lion-pytorch",
    "prodigyopt",
    "prodigy-plus-schedule-free",
    "dadaptation",
    "schedulefree",
    "pytorch-optimizer",
    "lycoris-lora",
)
TAGGED = ("lorasweep", "torch", "diffusers", "transformers", "safetensors", "mlflow")
"""Of these, those whose versions are tags of a run."""
MAX_DIFF = 1_000_000
"""Bytes of uncommitted changes that are kept."""
MAX_EPOCH = 1_000_000
"""Of a companion; more is no epoch, and the schedule of its pack would not end."""
_NOTED = "file_hashes.json"
_PARTS = (
    *("unet", "text_encoder", "vae", "tokenizer", "scheduler"),
    *("text_encoder_2", "tokenizer_2"),  # SDXL's
)
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.(safetensors|bin)")
_OTHERS = {".json", ".txt", ".model"}  # configs, and a tokenizer's vocabulary


def record(
    folder: Path, model: Model, cache_dir: Path, device: str, network_weights: str | None = None
) -> list[Path]:
    """Write origin.json, and uncommitted.diff if the code has changes; the files written."""
    code = sources()
    content = {
        "versions": versions(),
        "code": _without_diffs(code),
        "diff_is_cut": sum(len(str(one["diff"]).encode(errors="replace")) for one in code)
        > MAX_DIFF,
        "device": device_of(device),
        "model": identity(model, cache_dir),
        **_start(network_weights, cache_dir),
    }
    write_atomically(folder / ORIGIN, json.dumps(content, indent=1).encode())
    diff = "".join(str(one["diff"]) for one in code)
    if not diff:
        return [folder / ORIGIN]
    write_atomically(folder / DIFF, diff.encode(errors="replace")[:MAX_DIFF])
    return [folder / ORIGIN, folder / DIFF]


def is_made_alike(
    folder: Path, model: Model, cache_dir: Path, network_weights: str | None = None
) -> bool:
    """Was the run of a folder made with this very base model, these libraries and this code?

    And did it begin with the very `network_weights`, where it did not begin anew?
    """
    try:
        found = read_json(folder / ORIGIN)
    except (ForeignFileError, OSError):
        return False
    ours = {"versions": versions(), "code": _of_lorasweep(_without_diffs(sources()))}
    theirs = {"versions": found.get("versions"), "code": _of_lorasweep(found.get("code"))}
    known = found.get("model")
    sha256 = known.get("sha256") if isinstance(known, dict) else None
    start = _start(network_weights, cache_dir).get(START)
    is_same_start = sha256_of(found.get(START)) == sha256_of(start)
    is_same_base = sha256 is not None and sha256 == identity(model, cache_dir)["sha256"]
    return ours == theirs and is_same_base and is_same_start


def start_digest(network_weights: str | None, cache_dir: Path) -> str | None:
    """sha256 of the file that a run begins with; None where there is none or it begins anew."""
    return sha256_of(_start(network_weights, cache_dir).get(START))


def sha256_of(entry: object) -> str | None:
    """Of an entry of origin.json."""
    return str(entry["sha256"]) if isinstance(entry, dict) and "sha256" in entry else None


def _start(network_weights: str | None, cache_dir: Path) -> dict[str, Any]:
    if network_weights is None or not (path := Path(network_weights).expanduser()).is_file():
        return {}
    digest = _hashes({"file": path}, cache_dir / _NOTED)["file"]
    return {START: {"path": network_weights, "sha256": digest}}


def _without_diffs(code: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: one[key] for key in one if key != "diff"} for one in code]


def _of_lorasweep(code: object) -> list[Any]:
    """Of the checkouts, those of this code: the folder it was started in changes no result."""
    found = code if isinstance(code, list) else []
    return [one for one in found if isinstance(one, dict) and one.get("what") == "lorasweep"]


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what is computed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_tags() -> dict[str, str]:
    """Tags of versions, user and git commit, the latter two under MLflow's own names."""
    known = versions()
    tags = {f"version.{name}": known[name] for name in ("python", *TAGGED) if name in known}
    for one in sources():
        if one["what"] == "lorasweep":
            tags["mlflow.source.git.commit"] = one["commit"]
            tags["mlflow.source.git.dirty"] = str(one["dirty"]).lower()
    with suppress(KeyError, OSError, ImportError):  # a number without a name, as in containers
        tags["mlflow.user"] = getpass.getuser()
    return tags


def device_of(device: str) -> dict[str, Any]:
    """The properties of a device (cpu, cuda:1) that decide how sums are rounded."""
    import torch

    found: dict[str, Any] = {"type": torch.device(device).type, "system": sys.platform}
    if found["type"] == "cuda":
        return {
            **found,
            "name": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return {
        **found,
        "name": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


@cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # another system than Linux
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


@cache
def sources() -> list[dict[str, Any]]:
    """The git checkouts that a run depends on: of this code, and of the folder it was started in.

    Each has commit, dirty, and the diff of uncommitted changes with its sha256. An installed
    package and a folder outside of git are no checkouts.
    """
    package = Path(__file__).resolve().parent  # any folder of the checkout will do
    code = _checkout(package, tracked=Path(__file__).name)
    here = _checkout(Path.cwd())
    found = [("lorasweep", code), ("started in", here if here != code else None)]
    return [{"what": what, **_state(top)} for what, top in found if top is not None]


def _checkout(folder: Path, tracked: str | None = None) -> Path | None:
    """The top of the checkout that holds the folder; with `tracked`, only if it has that file."""
    if tracked is not None and git(folder, "ls-files", "--error-unmatch", tracked) is None:
        return None
    top = git(folder, "rev-parse", "--show-toplevel")
    return Path(top) if top and git(folder, "rev-parse", "--verify", "HEAD") else None


def _state(top: Path) -> dict[str, Any]:
    diff = git(top, "diff", "HEAD", "--no-color", "--no-ext-diff") or ""
    text = f"{diff}\n" if diff else ""
    return {
        "commit": git(top, "rev-parse", "--verify", "HEAD"),
        "dirty": bool(text),
        "diff_sha256": hashlib.sha256(text.encode(errors="replace")).hexdigest() if text else None,
        "diff": text,
    }


def git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command in `folder`, stripped; None if it fails or takes 20 seconds."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()


def identity(model: Model, cache_dir: Path) -> dict[str, Any]:
    """The base model by its content: sha256 of each file by name, and of all together.

    A file is hashed once and found again by path, size and time of change.
    """
    files = _hashes(dict(sorted(_files(model).items())), cache_dir / _NOTED)
    lines = "".join(f"{name} {digest}\n" for name, digest in files.items())
    return {
        "path": model.path,
        "sha256": hashlib.sha256(lines.encode()).hexdigest() if files else None,
        "files": files,
    }


def _files(model: Model) -> dict[str, Path]:
    """The files that a model is loaded from, by their names in its folder; and what is merged."""
    merged = enumerate(path for path, _ in model.merged_weights)
    return {**_own_files(model), **{f"{MERGED}{n}": file for n, file in merged}}


def _own_files(model: Model) -> dict[str, Path]:
    path = Path(model.path).expanduser()
    if path.is_file():
        return {"file": path}
    folder = path if path.is_dir() else hub_copy(model.path, model.revision)
    if folder is None:
        return {}
    found = {
        f"{part}/{file.name}": file
        for part in _PARTS
        for file in sorted((folder / part).glob("*"))
        if file.is_file() and (_WEIGHTS.fullmatch(file.name) or file.suffix in _OTHERS)
    }
    safe = {name.rpartition("/")[0] for name in found if name.endswith(".safetensors")}
    return {
        name: file
        for name, file in found.items()
        if not (name.endswith(".bin") and name.rpartition("/")[0] in safe)
    }


def hub_copy(repo_id: str, revision: str | None) -> Path | None:
    """The hub's copy of a model in the local cache; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _hashes(files: Mapping[str, Path], cache: Path) -> dict[str, str]:
    """sha256 of large files, by their keys; noted in `cache` by path, size and time of change."""
    before: dict[str, Any] = {}
    with suppress(OSError, ForeignFileError):
        before = read_json(cache)
    noted, found = dict(before), {}
    for key, path in files.items():
        place, state = str(path.resolve()), path.stat()
        stamp = [state.st_size, state.st_mtime_ns]
        match noted.get(place):
            case [size, changed, str(digest)] if [size, changed] == stamp:
                found[key] = digest
            case _:
                with path.open("rb") as file:
                    found[key] = hashlib.file_digest(file, "sha256").hexdigest()
                noted[place] = [*stamp, found[key]]
    if noted != before:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, json.dumps(noted, indent=1).encode())
    return found


def note_companions(
    folder: Path, name: str, members: Sequence[tuple[str, int]], failed: Iterable[str]
) -> Path:
    """Add to a run's pack.json the runs that it trained an epoch with; the file.

    `members` are (run, its own epoch) in the pack's order, `failed` the runs that failed in it.
    """
    path, epoch = folder / PACK, dict(members)[name]
    try:
        epochs = read_pack(read_text(path), path)
    except FileNotFoundError:
        epochs = {}
    except ForeignFileError as error:  # somebody has changed it
        log.warning("%s; it is begun anew", error)
        epochs = {}
    kept = {number: of for number, of in epochs.items() if number < epoch}
    kept[epoch] = {"members": [list(member) for member in members], "failed": sorted(failed)}
    write_atomically(path, json.dumps(kept).encode())
    return path


def read_pack(text: str | None, where: str | Path = PACK) -> dict[int, dict[str, Any]]:
    """pack.json: epoch of the run -> members, [name, epoch] in the pack's order, and failed.

    Raises ForeignFileError, which names it `where`, for a text of another shape.
    """
    found = parse_shaped(text or "{}", where, dict[PositiveInt, _PackEpoch])
    return {int(epoch): of for epoch, of in found.items()}


@dataclass(frozen=True)
class _PackEpoch:
    """The shape of an epoch in pack.json."""

    members: list[tuple[str, Annotated[int, Field(ge=1, le=MAX_EPOCH)]]]
    failed: list[str]
