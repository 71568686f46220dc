"""One adapter file of one run at one epoch, and how it is written and read.

File format and metadata: kohya sd-scripts' (`ss_*`, `sshs_*` keys); hashes are computed as it does.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep import header
from lorasweep.header import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["CheckpointError"]  # raised here, and caught by this name

TEMPORARY = ".tmp"  # ends the hidden names of files that are being written

LEGACY_HASH_OFFSET = 0x100000
LEGACY_HASH_SIZE = 0x10000


class DiskFullError(RuntimeError):
    """There is no room for a file; what was written before it is whole."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One `.safetensors` file of `run`, written after `epoch` epochs and `step` optimizer steps."""

    path: Path
    run: str
    epoch: int
    step: int

    @property
    def name(self) -> str:
        """Name under which MLflow and `pick` show it: RUN-e012."""
        return f"{self.run}-e{self.epoch:03d}"


def checkpoint_path(output_dir: Path, run: str, epoch: int) -> Path:
    """Where the file of an epoch goes; the name is kohya's (NAME-000001.safetensors)."""
    return output_dir / f"{run}-{epoch:06d}.safetensors"


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file whole or not at all, with kohya's two hashes added to `metadata`."""
    from safetensors.torch import save

    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    hashed = save(contiguous, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    hashes = {"sshs_model_hash": model_hash(hashed), "sshs_legacy_hash": legacy_hash(hashed)}
    write_atomically(path, save(contiguous, {**metadata, **hashes}))


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


def model_hash(content: bytes) -> str:
    """sha256 of the data behind the header: kohya's `sshs_model_hash`."""
    (header_size,) = struct.unpack("<Q", content[:8])
    return hashlib.sha256(content[8 + header_size :]).hexdigest()


def legacy_hash(content: bytes) -> str:
    """First 8 digits of the sha256 of 64 KiB from 1 MiB on: kohya's `sshs_legacy_hash`."""
    part = content[LEGACY_HASH_OFFSET : LEGACY_HASH_OFFSET + LEGACY_HASH_SIZE]
    return hashlib.sha256(part).hexdigest()[:8]


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file. Raises CheckpointError on a missing, cut or NaN file."""
    from safetensors import SafetensorError, safe_open

    metadata = header.read(path).metadata
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None
    bad = [key for key, value in tensors.items() if not bool(value.float().isfinite().all())]
    if bad:
        raise CheckpointError(
            f"{path} holds values that are not finite, first in {header.shown(bad[0])}"
        )
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone, without the tensors and without torch. Raises CheckpointError."""
    return header.read(path).metadata


def data_hash(path: Path) -> str:
    """`model_hash` of a file on disk, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + header_size)
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
