"""A safetensors file's header, checked before any of its tensors is touched.

Format: 8 bytes of header length, that many of JSON, then the data. Nothing that the header claims
is believed until it fits the file's own size, so no claim makes us take memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.core.text import shown

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
MAX_TENSORS = 100_000  # SDXL's largest LoRAs have a tenth of that
MAX_DIMS = 8
MAX_NAME = 500  # characters; the longest of SDXL's has 120

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""Bytes of the types that weights come in."""
INTEGERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of the types that some tools write a scalar in, such as alpha."""


class CheckpointError(ValueError):
    """A LoRA file that can't be used; the message says which and why."""


class _BadHeader(ValueError):
    """A header that can't be right; `read` adds the file's name to the message."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    metadata: dict[str, str]
    shapes: Mapping[str, tuple[int, ...]]


def read(path: Path) -> Header:
    """The header of a safetensors file of weights. Raises CheckpointError for a bad one."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: only .safetensors files are read; convert it first")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path} is a device or a pipe, not a file")  # reading may never end
    try:
        text, data_size = _text(path)
        return _checked(_parsed(text), data_size)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder; name the .safetensors file in it") from None
    except _BadHeader as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None


def _text(path: Path) -> tuple[bytes, int]:
    """The JSON of the header, and how many bytes of data follow."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise _BadHeader(f"it has {size} bytes")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER or length > size - 8:
            raise _BadHeader(f"its header claims {length} bytes, the file has {size}")
        return file.read(length), size - 8 - length


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text.decode(), object_pairs_hook=_unique)
    except _BadHeader:
        raise
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or a number of 5,000 digits
        raise _BadHeader("its header is not JSON") from None
    if not isinstance(parsed, dict):
        raise _BadHeader("its header is not a JSON object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _BadHeader(f"its header names {shown(name)} twice")
        found[name] = value
    return found


def _checked(parsed: dict[str, Any], data_size: int) -> Header:
    metadata = parsed.pop("__metadata__", {})
    is_text = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not is_text:
        raise _BadHeader("its __metadata__ is not of texts")
    if len(parsed) > MAX_TENSORS:
        raise _BadHeader(f"it claims {len(parsed)} tensors; at most {MAX_TENSORS} are read")
    ranges = sorted(_range(name, entry) for name, entry in parsed.items())
    end = 0
    for start, stop, name in ranges:
        if start != end:
            raise _BadHeader(f"the data of {shown(name)} overlaps another's or leaves a gap")
        end = stop
    if end != data_size:
        raise _BadHeader(f"its header claims {end} bytes of data, the file has {data_size}")
    return Header(metadata, {name: tuple(entry["shape"]) for name, entry in parsed.items()})


def _range(name: str, entry: Any) -> tuple[int, int, str]:
    """Where a tensor's data starts and stops."""
    if len(name) > MAX_NAME:
        raise _BadHeader(f"a tensor's name has {len(name)} characters: {shown(name, 40)}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _BadHeader(f"the entry of {shown(name)} has no dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > MAX_DIMS or not _are_sizes(offsets):
        raise _BadHeader(f"shape or offsets of {shown(name)} are not sizes")
    if len(offsets) != 2:
        raise _BadHeader(f"{shown(name)} has {len(offsets)} data_offsets instead of 2")
    count = math.prod(shape)
    if offsets[1] - offsets[0] != count * _bytes(name, entry["dtype"], count):
        raise _BadHeader(
            f"{shown(name)} of shape {shown(str(shape))} doesn't fill its data_offsets"
        )
    return offsets[0], offsets[1], name


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**48 for v in values)


def _bytes(name: str, dtype: Any, count: int) -> int:
    """Bytes of a value. Only scalars may be whole numbers; no weight is empty."""
    if count == 0:
        raise _BadHeader(f"{shown(name)} holds no values")
    known = FLOATS | (INTEGERS if count == 1 else {})
    if not isinstance(dtype, str) or dtype not in known:
        raise _BadHeader(f"{shown(name)} is of type {shown(str(dtype))}, which no weights are")
    return known[dtype]
