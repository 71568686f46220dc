"""A logged run, read back in full: what `lorasweep reproduce` needs of MLflow."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from lorasweep.core.foreign_files import ForeignFileError, read_text
from lorasweep.core.text import shown
from lorasweep.tracking import artifact_folder
from lorasweep.tracking.read_candidates import Candidate, search_candidates
from lorasweep.tracking.store import (
    BEST,
    HASH_TAG,
    RUN_TAG,
    SWEEP_TAG,
    open_experiment,
    search_runs,
    tagged,
)

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from PIL import Image

_SAMPLE = re.compile(r"(?P<key>.+)\+step\+(?P<step>\d+)\+timestamp\+\d+\+[\w-]+\.png")


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """A run as MLflow has it."""

    run_id: str
    name: str
    sweep: str
    status: str
    tags: Mapping[str, str]
    started: int
    """Milliseconds since 1970."""


class Log:
    """The runs of one experiment of a store."""

    def __init__(self, uri: str, experiment: str) -> None:
        """Raises TrackingError where nothing was ever logged."""
        self.uri = uri
        self._client, self._experiment_id = open_experiment(uri, experiment)

    def named(self, name: str, sweep: str | None = None) -> list[LoggedRun]:
        """The runs of that name, newest first; of one sweep if that is given."""
        return self._search(tagged({RUN_TAG: name, SWEEP_TAG: sweep}))

    def names(self) -> list[str]:
        """The names of all runs, newest first."""
        return list(dict.fromkeys(run.name for run in self._search("")))

    def by_id(self, run_id: str) -> LoggedRun | None:
        """The run of that id in MLflow."""
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_run(run_id)
        except MlflowException:
            return None
        ours = found.info.experiment_id == self._experiment_id and RUN_TAG in found.data.tags
        return _logged(found) if ours and found.info.lifecycle_stage == "active" else None

    def by_hash(self, digest: str) -> tuple[LoggedRun, Candidate] | None:
        """The run and the checkpoint whose data has this hash, the first if several have."""
        where = tagged({HASH_TAG: digest})
        for one in search_candidates(self._client, self._experiment_id, where):
            run = self.by_id(one.run_id)
            if run is not None:
                return run, one
        return None

    def checkpoints(self, run: LoggedRun) -> dict[int, Candidate]:
        """The run's checkpoints by epoch."""
        where = tagged({SWEEP_TAG: run.sweep, RUN_TAG: run.name})
        found = search_candidates(self._client, self._experiment_id, where)
        return {one.epoch: one for one in found if one.run_id == run.run_id}

    def text(self, run: LoggedRun, name: str) -> str | None:
        """A text among the run's artifacts, None if there is none.

        Raises ForeignFileError for what is no text.
        """
        with self.file(run, name) as path:
            return None if path is None else read_text(path)

    def file(self, run: LoggedRun, name: str) -> AbstractContextManager[Path | None]:
        """One of the run's artifacts, to be read for as long as the block lasts."""
        return artifact_folder.of_run(self._client, run.run_id).file(name)

    def curve(self, run: LoggedRun, key: str) -> dict[int, float]:
        """A metric's values by step; of a step that was logged twice, the later one."""
        history = self._client.get_metric_history(run.run_id, key)
        return {point.step: point.value for point in sorted(history, key=lambda p: p.timestamp)}

    def metrics(self, run: LoggedRun) -> list[str]:
        """The names of the run's curves, without what follows from others."""
        found = self._client.get_run(run.run_id).data.metrics
        return sorted(key for key in found if not key.startswith(BEST))

    def samples(self, run: LoggedRun) -> dict[tuple[str, int], str]:
        """The run's pictures, by the prompt's key and epoch: names for `picture`."""
        found = {}
        for file in artifact_folder.of_run(self._client, run.run_id).names("images"):
            match = _SAMPLE.fullmatch(unquote(file))
            if match is not None:
                found[match["key"], int(match["step"])] = f"images/{file}"
        return found

    def picture(self, run: LoggedRun, name: str) -> Image.Image:
        """One of the pictures that `samples` names. Raises ForeignFileError if it is none."""
        from PIL import Image

        with self.file(run, name) as path:
            if path is None:
                raise ForeignFileError(f"{shown(name)} of {run.name} is gone from MLflow")
            try:
                with Image.open(path, formats=["PNG"]) as image:
                    return image.convert("RGB")
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                raise ForeignFileError(f"{shown(name)} of {run.name} is no PNG picture") from None

    def tag(self, run: LoggedRun, tags: Mapping[str, str]) -> None:
        """Set tags of a run that may have ended."""
        for key, value in tags.items():
            self._client.set_tag(run.run_id, key, value)

    def add_text(self, run: LoggedRun, name: str, text: str) -> None:
        """Add a text to the artifacts of a run that may have ended."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_text(text, encoding="utf-8")
            artifact_folder.of_run(self._client, run.run_id).add(path)

    def _search(self, where: str) -> list[LoggedRun]:
        found = search_runs(self._client, self._experiment_id, where)
        return [_logged(run) for run in found if RUN_TAG in run.data.tags]


def _logged(run: MlflowRun) -> LoggedRun:
    tags: dict[str, str] = dict(run.data.tags)
    return LoggedRun(
        run_id=run.info.run_id,
        name=tags[RUN_TAG],
        sweep=tags.get(SWEEP_TAG, tags[RUN_TAG]),
        status=run.info.status,
        tags=tags,
        started=run.info.start_time,
    )
