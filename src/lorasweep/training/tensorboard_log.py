"""The scalars of a TensorBoard log that another process is writing, as they come.

A file is a row of records (length as uint64, its checksum, the record, its checksum), each of them
an `Event` of TensorBoard's event.proto: step = 2, summary = 5, in it value = 1 with tag = 1 and
simple_value = 2. A few lines read that; the package tensorboard is too large to want it for them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MAX_RECORD = 1 << 24  # bytes; a scalar's has about 60
_FRAME = 8 + 4 + 4  # length and checksums


class Scalar(NamedTuple):
    """One value of a curve."""

    tag: str
    step: int
    value: float


class TensorBoardLog:
    """All event files below a folder, of which `read` gives what is new."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Path, int] = {}  # bytes, of each file

    def read(self) -> Iterator[Scalar]:
        """The scalars that were written since; a record that isn't whole yet waits."""
        for path in sorted(self.folder.rglob("events.out.tfevents.*")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                content = file.read()
            length = 0
            for record in _records(content):
                length += len(record) + _FRAME
                yield from _scalars(record)
            self._read[path] = self._read.get(path, 0) + length


def _records(content: bytes) -> Iterator[bytes]:
    start = 0
    while start + _FRAME <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        end = start + length + _FRAME
        if length > _MAX_RECORD or end > len(content):
            return
        yield content[start + 12 : end - 4]
        start = end


def _scalars(event: bytes) -> Iterator[Scalar]:
    step = 0
    for field, value in _fields(event):
        if field == 2 and isinstance(value, int):
            step = value
        elif field == 5 and isinstance(value, bytes):
            for number, summary in _fields(value):
                found = dict(_fields(summary)) if number == 1 and isinstance(summary, bytes) else {}
                tag, simple = found.get(1), found.get(2)
                if isinstance(tag, bytes) and isinstance(simple, float):
                    yield Scalar(tag.decode(errors="replace"), step, simple)


def _fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Numbers and values of a protobuf message's fields; doubles and floats as float."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        field, kind = key >> 3, key & 7
        if kind == 0:
            number, at = _varint(message, at)
            yield field, number
        elif kind == 2:
            length, at = _varint(message, at)
            yield field, message[at : at + length]
            at += length
        elif kind in (1, 5):
            size, code = (8, "<d") if kind == 1 else (4, "<f")
            if at + size > len(message):
                return
            yield field, struct.unpack_from(code, message, at)[0]
            at += size
        else:
            return  # no such kind is written


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, least first, and where it ends."""
    number = shift = 0
    while at < len(message):
        byte = message[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            break
    return number, at
