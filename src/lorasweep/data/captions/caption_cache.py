"""The captions that were made before, one file each, found by what they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.foreign_files import ForeignFileError, read_json
from lorasweep.data.dataset import ImageFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionCache:
    """Captions of one captioner identity, keyed by the SHA-256 of the image's bytes.

    Entries are replaced in one step and carry a checksum: a torn or foreign file counts as none.
    """

    root: Path
    identity: str

    @property
    def folder(self) -> Path:
        """Where this identity's entries are."""
        return self.root / hashlib.sha256(self.identity.encode()).hexdigest()

    def find(self, images: Sequence[ImageFile]) -> dict[str, str]:
        """The captions that are there, by image hash."""
        found = {image.sha256: self._get(image.sha256) for image in images}
        return {sha256: text for sha256, text in found.items() if text is not None}

    def put(self, image: ImageFile, caption: str) -> None:
        """Keep a caption. Raises DiskError."""
        entry = {
            "caption": caption,
            "captioner": self.identity,
            "image": image.sha256,
            "check": self._check(image.sha256, caption),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(image.sha256), json.dumps(entry).encode())

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the right to caption with this identity; the system frees it if we are killed."""
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            logger.info("%s: waiting for another process that makes the same captions", key)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _get(self, sha256: str) -> str | None:
        try:
            entry = read_json(self._path(sha256))
        except (FileNotFoundError, ForeignFileError):
            return None
        match entry:
            case {"caption": str(caption), "check": str(check)}:
                return caption if check == self._check(sha256, caption) else None
            case _:
                return None

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.json"

    def _check(self, sha256: str, caption: str) -> str:
        parts = json.dumps([self.identity, sha256, caption])
        return hashlib.sha256(parts.encode()).hexdigest()
