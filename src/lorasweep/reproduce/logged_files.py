"""The shapes of a run's logged JSON files; what has another, or leads out, is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt

from lorasweep.core.foreign_files import ForeignFileError, parse_shaped
from lorasweep.data.subsets import MAX_REPEATS

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _stays_below(name: str) -> str:
    path = PurePosixPath(name)
    if not path.parts or ".." in path.parts or path.is_absolute() or "\0" in name:
        raise ValueError("leads out of the images' folder")
    return name


@dataclass(frozen=True)
class _Image:
    file: Annotated[str, AfterValidator(_stays_below)]
    copy: Annotated[str, Field(pattern=r"^images/[\w-][\w.-]*$")]
    sha256: _Sha256
    width: PositiveInt
    height: PositiveInt
    split: Literal["train", "holdout", "reg"]
    captions: dict[str, str]


@dataclass(frozen=True)
class _Arm:
    repeats: Annotated[int, Field(ge=1, le=MAX_REPEATS)]


@dataclass(frozen=True)
class _Manifest:
    arms: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], _Arm]
    images: list[_Image]


@dataclass(frozen=True)
class _Model:
    path: str
    sha256: str | None
    files: dict[str, str]


@dataclass(frozen=True)
class _Checkout:
    what: str
    commit: str
    dirty: bool
    diff_sha256: str | None


@dataclass(frozen=True)
class _Device:
    threads: PositiveInt | None = None


@dataclass(frozen=True)
class _Origin:
    model: _Model | None = None
    versions: dict[str, str] | None = None
    code: list[_Checkout] | None = None
    device: _Device | None = None


def read_manifest(text: str, where: str) -> dict[str, Any]:
    """manifest.json: images, arms and captions as they were drawn. Raises ForeignFileError."""
    manifest: dict[str, Any] = parse_shaped(text, where, _Manifest)
    files = [image["file"] for image in manifest["images"]]
    if not files or len(set(files)) < len(files):
        raise ForeignFileError(f"{where} names no image, or one twice")
    if any(image["captions"].keys() != manifest["arms"].keys() for image in manifest["images"]):
        raise ForeignFileError(f"{where} has an image without a caption of each arm")
    return manifest


def read_captions(text: str, where: str) -> Mapping[str, Mapping[str, Mapping[str, str]]]:
    """captions.json: split -> folder -> file -> caption. Raises ForeignFileError."""
    found: dict[str, Any] = parse_shaped(text, where, dict[str, dict[str, dict[str, str]]])
    return found


def read_origin(text: str, where: str) -> Mapping[str, Any] | None:
    """origin.json: base model, versions, code and device. Raises ForeignFileError."""
    found: dict[str, Any] | None = parse_shaped(text, where, _Origin | None)
    return found


def read_overrides(text: str, where: str) -> list[str]:
    """overrides.yaml, which is JSON. Raises ForeignFileError."""
    found: list[str] = parse_shaped(text, where, list[str])
    return found
