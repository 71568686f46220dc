"""The files that a store keeps of a run or a checkpoint: listed, read and added to.

Where they lie is said by the store, which others may have written: `file:///home/me/.ssh`, or a
server of theirs. MLflow itself lays them into a folder that is named by a random id,
`…/ID/artifacts`. So only such a folder is touched, and another machine's only through the server
whose address the settings give.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.foreign_files import inside
from lorasweep.core.text import shown
from lorasweep.tracking.store import TrackingError, is_server, public_uri, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

_ID = re.compile(r"(m-)?[0-9a-f]{32}")
_OF_A_SERVER = {"mlflow-artifacts", "http", "https"}
"""Places that only the tracking server may be; MLflow would send another one its password."""
_CLOUD = {"s3", "r2", "gs", "wasbs", "abfss"}
"""Places that a server or a team's database may name, read with this user's own keys."""


@dataclass(frozen=True)
class ArtifactFolder:
    """The files of one run or checkpoint. Raises TrackingError for a place that can't be theirs."""

    uri: str
    """The store's."""
    location: str
    owner: str
    """Id of the run or the checkpoint's model."""

    def __post_init__(self) -> None:
        if reason := self._foreign():
            raise TrackingError(
                f"the tracking store keeps files of {shown(self.owner, 40)} in"
                f" {shown(public_uri(self.location))}, {reason}: they are neither read nor written"
            )

    def names(self, folder: str = "") -> list[str]:
        """The names of the files, or of those in one of its folders."""
        if self._local is not None:
            place = inside(self._local, folder)
            return [path.name for path in place.iterdir()] if place.is_dir() else []
        found = [PurePosixPath(one.path).name for one in self._files.list_artifacts(folder)]
        return [name for name in found if name not in ("", "..")]

    @contextmanager
    def file(self, name: str) -> Iterator[Path | None]:
        """A file to be read, for as long as the block lasts; None if there is none."""
        if self._local is not None:
            path = inside(self._local, name)
            yield path if path.is_file() else None
            return
        folder, _, last = name.rpartition("/")
        if last not in self.names(folder):
            yield None
            return
        with tempfile.TemporaryDirectory() as place:
            path = inside(Path(place), self._files.download_artifacts(name, place))
            yield path if path.is_file() else None

    def add(self, path: Path) -> None:
        """Add a file, or the files that lie in a folder."""
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        if self._local is not None:
            self._local.mkdir(parents=True, exist_ok=True)
        for file in files:
            if self._local is None:
                self._files.log_artifact(str(file))
            else:  # a link that lies there is replaced, not followed
                write_atomically(self._local / file.name, file.read_bytes())

    @cached_property
    def _local(self) -> Path | None:
        """The folder, if it is one of this machine; not made yet if nothing was added."""
        scheme, host, path = urlsplit(self.location)[:3]
        if scheme not in ("", "file") or host:
            return None
        return Path(os.path.realpath(unquote(path) if scheme else self.location))

    @cached_property
    def _files(self) -> Any:
        """MLflow's way to them. Its client would ask the server anew for the place."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(self.location, tracking_uri=self.uri)

    def _foreign(self) -> str | None:
        """Why it can't be the place of these files; None if it can."""
        scheme, host, path = urlsplit(self.location)[:3]
        if self._local is not None:
            path = str(self._local)
        elif scheme in _OF_A_SERVER and is_server(self.uri):
            if _without_user(host) not in ("", _without_user(urlsplit(self.uri).netloc)):
                return "which is not the server of tracking.uri"
        elif scheme not in _CLOUD or sqlite_path(self.uri) is not None:
            return "which is not on this machine"
        own = _ID.fullmatch(self.owner) and path.endswith(f"/{self.owner}/artifacts")
        return None if own else "which is not a folder of their own"


def _without_user(host: str) -> str:
    return host.rpartition("@")[2]


def of_run(client: MlflowClient, run_id: str) -> ArtifactFolder:
    """The files of a run."""
    location = client.get_run(run_id).info.artifact_uri
    return ArtifactFolder(client.tracking_uri, location, run_id)


def of_model(client: MlflowClient, model_id: str) -> ArtifactFolder:
    """The files of a checkpoint's model."""
    location = client.get_logged_model(model_id).artifact_location
    return ArtifactFolder(client.tracking_uri, location, model_id)
