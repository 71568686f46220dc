"""Weights of a captioner, from a folder or the Hugging Face hub."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lorasweep.data.captions.caption_images import CaptionerError


@dataclass(frozen=True)
class Weights:
    """Where the files are, and what they are."""

    folder: Path
    revision: str
    """The hub's commit, or the hash of a folder's files: equal means the same model."""


def find_weights(
    model: str, revision: str | None, patterns: tuple[str, ...], needed: str
) -> Weights:
    """The files of `model` that match `patterns`, downloaded if it is a hub id and they are new.

    `model` is a folder, `owner/name` or `owner/name/subfolder` (the last as in kohya's tagger).
    HF_HUB_OFFLINE is respected. Raises CaptionerError that says to download what is `needed`.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        files = [path for path in folder.iterdir() if _matches(path.name, patterns)]
        if not files:
            raise not_found(model, needed, "none in that folder")
        if odd := [path.name for path in files if not path.is_file()]:
            raise not_found(model, needed, f"{odd[0]} is not a file")
        return Weights(folder, f"sha256:{_hash_files(files)}")
    hub_id = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+))?", model)
    if hub_id is None:
        raise not_found(model, needed, "it is neither a folder nor a hub id")
    return _from_hub(hub_id[1], hub_id[2] or "", revision, patterns, needed)


def not_found(model: str, needed: str, reason: str) -> CaptionerError:
    """The one line for weights that can't be found."""
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)+", model) is not None
    source = "/".join(model.split("/")[:2]) if is_hub_id else "OWNER/NAME"
    return CaptionerError(
        f"model={model}: no weights found ({reason}); download {needed} where the hub is in reach "
        f"(hf download {source} --local-dir FOLDER), copy FOLDER to this machine and set model to "
        "it, or read captions that you have with captions=sidecar"
    )


@lru_cache(maxsize=64)  # one answer a process: the hub may get a new commit while we caption
def _from_hub(
    repo_id: str, subfolder: str, revision: str | None, patterns: tuple[str, ...], needed: str
) -> Weights:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    model = f"{repo_id}/{subfolder}" if subfolder else repo_id
    wanted = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
    try:
        snapshot = snapshot_download(repo_id, revision=revision, allow_patterns=wanted)
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set: nothing is downloaded" if HF_HUB_OFFLINE else "out of reach"
        reason = f"no such folder, not in the hub's cache, and {why}"
        raise not_found(model, needed, reason) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise not_found(model, needed, str(error).partition("\n")[0]) from None
    folder = Path(snapshot) / subfolder
    if not folder.is_dir() or not any(_matches(path.name, patterns) for path in folder.iterdir()):
        raise not_found(model, needed, "none there")
    return Weights(folder, f"{model}@{Path(snapshot).name}")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _hash_files(files: Iterable[Path]) -> str:
    parts = [f"{path.name} {_hash_file(path)}\n" for path in sorted(files)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    state = path.stat()
    return _hash_state(path.resolve(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)  # gigabytes: read once a process, however many runs it prepares
def _hash_state(path: Path, _size: int, _mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
