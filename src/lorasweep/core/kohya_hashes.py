"""kohya sd-scripts' hashes of model files (its train_util.py), each of an open file."""

from __future__ import annotations

import hashlib
import struct
from typing import BinaryIO


def data_hash(file: BinaryIO) -> str:
    """sha256 of the data behind a safetensors header: `sshs_model_hash`."""
    file.seek(0)
    (header_size,) = struct.unpack("<Q", file.read(8))
    file.seek(8 + header_size)
    digest = hashlib.sha256()  # hashlib.file_digest takes all of a BytesIO, wherever it stands
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def legacy_hash(file: BinaryIO) -> str:
    """First 8 digits of the sha256 of 64 KiB from 1 MiB on: `sshs_legacy_hash`."""
    file.seek(0x100000)
    return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
