"""Files and folders that appear whole, under their name, or not at all."""

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
    """There is no room for a file; what was written before it is whole."""


class TargetError(ValueError):
    """The place to write to is taken; the message says how to go on."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to the disk, then rename: no reader ever sees a part of it.

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
    """Delete what a killed process was writing into a folder that no other writes into now."""
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
    room = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        place = room / target.name
        yield place
        _flush(place)
        _replace(target, place, room / "old")
    finally:
        shutil.rmtree(room)


def check_free(target: Path, overwrite: bool) -> None:
    """Raise TargetError if something lies at `target` that is not to be overwritten."""
    if target.exists() and not overwrite:
        raise TargetError(f"{target} exists already: give another path, or --overwrite")
    if target.is_dir() and overwrite and not _is_ours(target):
        raise TargetError(f"{target} is a folder, but not a diffusers model's: give another path")


def _is_ours(folder: Path) -> bool:
    """Overwriting deletes a folder, so it must be what would be written there."""
    return (folder / "model_index.json").is_file() or not any(folder.iterdir())


def _replace(target: Path, place: Path, old: Path) -> None:
    """A folder can't be replaced in one step: what was there comes back if the second fails."""
    if not target.is_dir():
        place.replace(target)
        return
    target.rename(old)
    try:
        place.rename(target)
    except OSError:
        old.rename(target)
        raise


def _flush(place: Path) -> None:
    """Readable by all and on the disk, before the rename makes it count."""
    for path in place.rglob("*") if place.is_dir() else [place]:
        if path.is_file():
            path.chmod(0o644)  # safetensors writes for its owner alone
            with path.open("rb") as file:
                os.fsync(file.fileno())
