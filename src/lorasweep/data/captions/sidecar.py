"""Captions that exist already: text files beside the images, or one JSONL."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from lorasweep.core.foreign_files import MAX_BYTES, ForeignFileError, parse_json
from lorasweep.core.settings import Settings
from lorasweep.core.text import listed, shown
from lorasweep.data.captions.caption_images import CaptionerError, Repeats
from lorasweep.data.dataset import ImageFile, logger
from lorasweep.data.subset_captions import MAX_CAPTION


@dataclass(frozen=True, kw_only=True)
class Sidecar(Settings):
    """Reads captions from `suffix` files beside the images or from the `text_key` of a JSONL.

    Of a file with several lines the first is the caption, as kohya reads it.
    """

    cached: ClassVar[bool] = False

    repeats: Repeats
    suffix: str | None
    """Put in place of the image's extension: `.txt`, or `_wd.txt` for fox_wd.txt beside fox.png."""
    jsonl: Path | None
    """One JSON object a line; `file` is the image's path relative to dataset.image_dir."""
    text_key: str | None
    tags: bool = True
    """May the parts between commas be shuffled and dropped?"""

    def __post_init__(self) -> None:
        if (self.suffix is None) == (self.jsonl is None):
            raise ValueError(
                "captions.sidecar: give either suffix or jsonl, and set the other to null"
            )
        if (self.jsonl is None) != (self.text_key is None):
            raise ValueError(
                "captions.sidecar.text_key: it goes with jsonl, naming the captions' key there"
            )
        if self.suffix is not None and (not self.suffix or set(self.suffix) & set("/\\\0")):
            raise ValueError(
                f"captions.sidecar.suffix={self.suffix}: must be the end of a file name, as .txt"
            )

    def identity(self) -> str:
        """The rule by which captions are found; for a JSONL its hash as well."""
        if self.jsonl is None:
            return f"sidecar suffix={self.suffix}"
        digest = hashlib.sha256(_read(self.jsonl, "jsonl").encode()).hexdigest()
        return f"sidecar jsonl=sha256:{digest} text_key={self.text_key}"

    def caption(self, images: Sequence[ImageFile]) -> Iterator[list[str]]:
        """The captions in one batch; CaptionerError lists the images that have none."""
        captions = self._beside(images) if self.jsonl is None else self._from_jsonl(self.jsonl)
        if missing := [image.name for image in images if _key(image.name) not in captions]:
            raise self._missing(missing)
        yield [captions[_key(image.name)] for image in images]

    def _beside(self, images: Sequence[ImageFile]) -> dict[str, str]:
        files = {
            _key(image.name): image.path.with_name(f"{image.path.stem}{self.suffix}")
            for image in images
        }
        for image, path in zip(images, files.values(), strict=True):
            _refuse_link_out(path, image)
        texts = {
            key: _read(path, "suffix").partition("\n")
            for key, path in files.items()
            if path.is_file()
        }
        if longer := {files[key].name for key, (_, _, rest) in texts.items() if rest.strip()}:
            logger.warning(
                "captions.sidecar: only the first line is read of %d files (%s); put all of a"
                " caption into one line",
                len(longer),
                listed(sorted(longer)),
            )
        return {key: first for key, (first, _, _) in texts.items()}

    def _from_jsonl(self, jsonl: Path) -> dict[str, str]:
        captions: dict[str, str] = {}
        for number, line in enumerate(_read(jsonl, "jsonl").split("\n"), start=1):
            if not line.strip():
                continue
            file, text = self._parse(line, f"jsonl={jsonl}: line {number}")
            if captions.setdefault(file, text) != text:
                raise CaptionerError(
                    f"jsonl={jsonl}: line {number} gives {file} a second caption; keep one"
                )
        return captions

    def _parse(self, line: str, where: str) -> tuple[str, str]:
        try:
            entry = parse_json(line, where, object)
        except ForeignFileError as error:
            raise CaptionerError(f"{error}; mend it") from None
        match entry:
            case {"file": str(file), self.text_key: str(text)}:
                return _key(file), text
            case _:
                keys = ", ".join(map(str, entry)) if isinstance(entry, dict) else "no keys"
                raise CaptionerError(
                    f"{where} must have texts for the keys file and {self.text_key}, and it has "
                    f"{keys}; mend it or set text_key to another key"
                )

    def _missing(self, names: list[str]) -> CaptionerError:
        if self.jsonl is None:
            return CaptionerError(
                f"suffix={self.suffix}: no caption for {listed(names)}; put NAME{self.suffix} "
                "beside each, or set suffix to the end that your files' names have"
            )
        if self.jsonl.parent.name == "demo_images":
            return CaptionerError(
                f"jsonl={self.jsonl}: the demo's captions are of the demo's images; for yours take"
                " experiment=quick, or captions=[empty,sidecar] with .txt files beside the images"
            )
        return CaptionerError(
            f"jsonl={self.jsonl}: no line for {listed(names)}; add one for each, with file = "
            "its path relative to dataset.image_dir, or use captions=[empty,sidecar] for .txt "
            "files beside the images"
        )


def _key(name: str) -> str:
    """One spelling for a relative path: Windows' slashes, `./` and decomposed accents are equal."""
    return unicodedata.normalize("NFC", PurePosixPath(name.replace("\\", "/")).as_posix())


def _refuse_link_out(path: Path, image: ImageFile) -> None:
    """A folder from a stranger could make any file of this machine a caption, and log it."""
    root = image.path.parents[image.name.count("/")]
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
        raise CaptionerError(
            f"suffix: {shown(str(path), 300)} is a link that leads out of the image folder; put a"
            " copy of what it points to in its place"
        )


def _read(path: Path, field: str) -> str:
    name, path = shown(str(path), 300), path.expanduser()
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CaptionerError(f"{field}: {name} is a device or a pipe; give a file")
        what, limit = ("a caption", MAX_CAPTION) if field == "suffix" else ("a JSONL", MAX_BYTES)
        if path.stat().st_size > limit:
            raise CaptionerError(
                f"{field}: {name} has {path.stat().st_size} bytes, and {what} at most {limit};"
                " shorten it"
            )
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptionerError(f"{field}: {name} is not UTF-8 ({error.reason}); save it so") from None
    except OSError as error:
        raise CaptionerError(
            f"{field}: cannot read {name}: {error.strerror}; give a file that can be read"
        ) from None
