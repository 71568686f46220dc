"""One adapter file of one run at one epoch, and how it is written and read.

File format and metadata: kohya sd-scripts' (`ss_*`, `sshs_*` keys); hashes are computed as it does.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.core import kohya_hashes, safetensors_header
from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.text import shown

if TYPE_CHECKING:
    import torch


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
    file = io.BytesIO(hashed)
    hashes = {
        "sshs_model_hash": kohya_hashes.data_hash(file),
        "sshs_legacy_hash": kohya_hashes.legacy_hash(file),
    }
    write_atomically(path, save(contiguous, {**metadata, **hashes}))


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file. Raises CheckpointError on a missing, cut or NaN file."""
    from safetensors import SafetensorError, safe_open

    metadata = safetensors_header.read(path).metadata
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None
    bad = [key for key, value in tensors.items() if not bool(value.float().isfinite().all())]
    if bad:
        raise CheckpointError(f"{path} holds values that are not finite, first in {shown(bad[0])}")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone, without the tensors and without torch. Raises CheckpointError."""
    return safetensors_header.read(path).metadata


def data_hash(path: Path) -> str:
    """The `sshs_model_hash` that a file ought to have."""
    with path.open("rb") as file:
        return kohya_hashes.data_hash(file)
