"""What every export gives: the file or folder that was written, or an ExportError."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class ExportError(ValueError):
    """What was to be exported can't be, or came out wrong; the message says why and what to do."""


@dataclass(frozen=True)
class Exported:
    """What was written, and what a person is told of it."""

    path: Path
    lines: tuple[str, ...]


def is_file(target: Path) -> bool:
    """Is a single file to be written there, not a folder?"""
    return target.suffix == ".safetensors"
