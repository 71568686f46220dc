"""kohya sd-scripts' hashes of model files (its train_util.py), each of an open file, by pieces."""

from __future__ import annotations

import hashlib
import struct
from typing import BinaryIO


def whole_hash(file: BinaryIO) -> str:
    """sha256 of all of it: `ss_new_sd_model_hash`."""
    return _rest_hash(file, 0)


def data_hash(file: BinaryIO) -> str:
    """sha256 of the data behind a safetensors header: `sshs_model_hash`."""
    file.seek(0)
    (header_size,) = struct.unpack("<Q", file.read(8))
    return _rest_hash(file, 8 + header_size)


def legacy_hash(file: BinaryIO) -> str:
    """First 8 digits of the sha256 of 64 KiB from 1 MiB on (`sshs_legacy_hash`)."""
    file.seek(0x100000)
    return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def _rest_hash(file: BinaryIO, start: int) -> str:
    file.seek(start)
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()
