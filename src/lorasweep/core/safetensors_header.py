"""A safetensors file's header, checked before any of its tensors is touched.

Format: 8 bytes of header length, that many of JSON, then the data. Nothing that the header claims
is believed until it fits the file's own size, so no claim makes us take memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from lorasweep.core.foreign_files import ForeignFileError, check_no_pipe
from lorasweep.core.text import shown

MAX_HEADER = 16_000_000  # bytes; a whole SDXL has 0.4 MB, tags of a large data set some more
MAX_TENSORS = 20_000  # SDXL's largest LoRAs, and models with their EMA copies, have half of that
MAX_DIMS = 8
MAX_NAME = 500  # characters; the longest of SDXL's has 120

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""Bytes of the types that weights come in."""
INTEGERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
"""Bytes of the types that tools write an alpha or a counter in."""


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
    with _explained(path):
        check_no_pipe(path)
        state = path.stat()
        return _read(path, state.st_ino, state.st_size, state.st_mtime_ns)


def check_length(path: Path) -> None:
    """Raise CheckpointError for a header that is longer than any model's; it is not parsed."""
    with _explained(path):
        check_no_pipe(path)
        with path.open("rb") as file:
            _length(file)


@lru_cache(maxsize=1)  # one command asks for a file's metadata, then for its tensors
def _read(path: Path, *_state: int) -> Header:
    text, data_size = _text(path)
    return _checked(_parsed(text), data_size)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder; name the .safetensors file in it") from None
    except ForeignFileError as error:
        raise CheckpointError(str(error)) from None
    except _BadHeader as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None


def _text(path: Path) -> tuple[bytes, int]:
    """The JSON of the header, and how many bytes of data follow."""
    with path.open("rb") as file:
        length, size = _length(file)
        return file.read(length), size - 8 - length


def _length(file: BinaryIO) -> tuple[int, int]:
    """Bytes of the header, and of the file."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise _BadHeader(f"it has {size} bytes")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > size - 8:
        raise _BadHeader(f"its header claims {length} bytes, the file has {size}")
    if length > MAX_HEADER:
        raise _BadHeader(f"its header of {length / 1e6:.0f} MB is longer than any model's")
    return length, size


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
    if offsets[1] - offsets[0] != count * _bytes(name, entry["dtype"]):
        raise _BadHeader(
            f"{shown(name)} of shape {shown(str(shape))} doesn't fill its data_offsets"
        )
    return offsets[0], offsets[1], name


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**48 for v in values)


def _bytes(name: str, dtype: Any) -> int:
    """Bytes of a value."""
    known = FLOATS | INTEGERS
    if not isinstance(dtype, str) or dtype not in known:
        raise _BadHeader(f"{shown(name)} is of type {shown(str(dtype))}, which no weights are")
    return known[dtype]
