"""Files and folders that appear complete under their name, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp"  # ends the hidden names of files that are being written


class DiskFullError(RuntimeError):
    """There is no room for a file; what was written before is complete."""


class TargetError(ValueError):
    """Something is at the path to write to; the message says how to go on."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to the disk, then rename: no reader ever sees a partial file.

    Raises DiskFullError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        size = len(content) / 1e6
        raise DiskFullError(
            f"{path.parent}: no room for {path.name} ({size:.1f} MB): {error.strerror}; make room,"
            " and the same command goes on"
        ) from None


def delete_temporaries(folder: Path) -> None:
    """Delete what a killed process left half written; no other may be writing into `folder` now."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


@contextmanager
def staged(target: Path, overwrite: bool) -> Iterator[Path]:
    """A path beside `target`, of the same name, to write a file or folder at and to check it.

    It is renamed to `target` at the end; after an error nothing is left of it. An existing target
    stays until then. Raises TargetError at once for one that is not to be overwritten.
    """
    check_free(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        new = folder / target.name
        yield new
        _flush(new)
        _replace(target, new, folder / "old")
    finally:
        shutil.rmtree(folder)


def check_free(target: Path, overwrite: bool) -> None:
    """Raise TargetError if something lies at `target` that is not to be overwritten."""
    if target.exists() and not overwrite:
        raise TargetError(f"{target} exists already: give another path, or --overwrite")
    if target.is_dir() and overwrite and not _is_ours(target):
        raise TargetError(f"{target} is a folder, but not a diffusers model's: give another path")


def _is_ours(folder: Path) -> bool:
    """Overwriting deletes a folder, so it must be what would be written there."""
    return (folder / "model_index.json").is_file() or not any(folder.iterdir())


def _replace(target: Path, new: Path, old: Path) -> None:
    """A folder can't be replaced in one step: the old one comes back if the second step fails."""
    if not target.is_dir():
        new.replace(target)
        return
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise


def _flush(new: Path) -> None:
    """Make it readable by all and flush it to the disk, before it is renamed."""
    for path in new.rglob("*") if new.is_dir() else [new]:
        if path.is_file():
            path.chmod(0o644)  # safetensors writes for its owner alone
            with path.open("rb") as file:
                os.fsync(file.fileno())
