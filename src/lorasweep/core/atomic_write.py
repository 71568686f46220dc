"""Files and folders that appear complete under their name, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorasweep.core.text import size_of

TEMPORARY = ".tmp"  # ends the hidden names of files that are being written


class DiskError(RuntimeError):
    """A file can't be written for reasons of the disk; what was written before is complete."""


class DiskFullError(DiskError):
    """There is no room for a file."""


class FolderGoneError(DiskError):
    """The folder of what is being made was moved away or deleted meanwhile."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"{folder} is gone: was it moved or deleted? Put it back, and the same command goes on"
        )


class TargetError(ValueError):
    """Something is at the path to write to; the message says how to go on."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to the disk, then rename: no reader ever sees a partial file.

    Its folder is made if need be, but not the one around it: who moves that away gets no second
    one. Who may read the file is up to the umask. Raises DiskError.
    """
    with room_for(f"{path.name} ({size_of(len(content))})", path.parent):
        _make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
        # by open, for the system applies the umask to nothing else
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def room_for(what: str, folder: Path) -> Iterator[None]:
    """Within, `what` is written into `folder`: a full disk is a DiskFullError that names both."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"{folder}: no room for {what}: {error.strerror}; make room, and the same command"
            " goes on"
        ) from None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except FileNotFoundError:
        raise FolderGoneError(folder.parent) from None


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
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    with room_for(target.name, target.parent):
        folder.mkdir()
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
    """Give its files the mode that the umask gives, and flush them, before it is renamed."""
    mode = _mode_of_files(new.parent)
    for path in new.rglob("*") if new.is_dir() else [new]:
        if path.is_file():
            path.chmod(mode)  # safetensors writes for its owner alone
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _mode_of_files(folder: Path) -> int:
    """What the umask leaves of 0666; to ask for the umask is to change it, for all threads."""
    probe = folder / f".mode{TEMPORARY}"
    handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink()
