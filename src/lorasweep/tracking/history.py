"""A logged run, read back in full: what `lorasweep reproduce` needs of MLflow."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from lorasweep.tracking.read_candidates import Candidate, candidate_of, download, search_models
from lorasweep.tracking.records import hash_of
from lorasweep.tracking.store import (
    CHECKPOINT_TAG,
    HASH_TAG,
    RUN_TAG,
    SWEEP_TAG,
    open_experiment,
    pages,
    quoted,
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


@dataclass(frozen=True, kw_only=True)
class LoggedCheckpoint:
    """A checkpoint of a run, with the hash of its data if that was logged."""

    candidate: Candidate
    hash: str | None

    @property
    def epoch(self) -> int:
        """After how many epochs it was written."""
        return self.candidate.epoch


class Log:
    """The runs of one experiment of a store."""

    def __init__(self, uri: str, experiment: str) -> None:
        """Raises TrackingError where nothing was ever logged."""
        self.uri = uri
        self._client, self._experiment_id = open_experiment(uri, experiment)

    def named(self, name: str, sweep: str | None = None) -> list[LoggedRun]:
        """The runs of that name, newest first; of one sweep if that is given."""
        where = f"tags.`{RUN_TAG}` = {quoted(name)}"
        if sweep is not None:
            where += f" AND tags.`{SWEEP_TAG}` = {quoted(sweep)}"
        return self._search(where)

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

    def by_hash(self, digest: str) -> tuple[LoggedRun, LoggedCheckpoint] | None:
        """The run and the checkpoint whose data has this hash, the first if several have."""
        query = f"tags.`{HASH_TAG}` = {quoted(digest)}"
        found = sorted(self._checkpoints(query), key=lambda one: one.candidate.created)
        for one in found:
            run = self.by_id(one.candidate.run_id)
            if run is not None:
                return run, one
        return None

    def checkpoints(self, run: LoggedRun) -> dict[int, LoggedCheckpoint]:
        """The run's checkpoints by epoch."""
        query = (
            f"tags.`{SWEEP_TAG}` = {quoted(run.sweep)} AND tags.`{RUN_TAG}` = {quoted(run.name)}"
        )
        found = self._checkpoints(query)
        return {one.epoch: one for one in found if one.candidate.run_id == run.run_id}

    def text(self, run: LoggedRun, name: str) -> str | None:
        """A text among the run's artifacts, None if there is none."""
        with self.file(run, name) as path:
            return None if path is None else path.read_text(encoding="utf-8")

    @contextmanager
    def file(self, run: LoggedRun, name: str) -> Iterator[Path | None]:
        """A copy of one of the run's artifacts, for as long as the block lasts."""
        there = {file.path for file in self._client.list_artifacts(run.run_id)}
        with tempfile.TemporaryDirectory() as folder:
            yield (
                download(self.uri, f"runs:/{run.run_id}/{name}", folder) if name in there else None
            )

    def curve(self, run: LoggedRun, key: str) -> dict[int, float]:
        """A metric's values by step; of a step that was logged twice, the later one."""
        history = self._client.get_metric_history(run.run_id, key)
        return {point.step: point.value for point in sorted(history, key=lambda p: p.timestamp)}

    def metrics(self, run: LoggedRun) -> list[str]:
        """The names of the run's curves."""
        return sorted(self._client.get_run(run.run_id).data.metrics)

    def samples(self, run: LoggedRun) -> dict[tuple[str, int], str]:
        """The run's pictures, by the prompt's key and epoch: names for `picture`."""
        found = {}
        for file in self._client.list_artifacts(run.run_id, "images"):
            match = _SAMPLE.fullmatch(unquote(file.path).removeprefix("images/"))
            if match is not None:
                found[match["key"], int(match["step"])] = str(file.path)
        return found

    def picture(self, run: LoggedRun, name: str) -> Image.Image:
        """One of the pictures that `samples` names."""
        from PIL import Image

        where = f"runs:/{run.run_id}/{name}"
        with (
            tempfile.TemporaryDirectory() as folder,
            Image.open(download(self.uri, where, folder)) as image,
        ):
            return image.convert("RGB")

    @contextmanager
    def weights(self, one: LoggedCheckpoint) -> Iterator[Path | None]:
        """A checkpoint's file where it was written, else MLflow's copy, else None."""
        path = one.candidate.path
        if path.is_file() and (one.hash is None or hash_of(path) == one.hash):
            yield path
            return
        model_id = one.candidate.model_id
        stored = {file.path for file in self._client.list_logged_model_artifacts(model_id)}
        fitting = next(
            (name for name in (path.name, f"{one.candidate.name}.safetensors") if name in stored),
            None,
        )
        with tempfile.TemporaryDirectory() as folder:
            if fitting is None:
                yield None
                return
            location = self._client.get_logged_model(model_id).artifact_location
            yield download(self.uri, f"{location}/{fitting}", folder)

    def tag(self, run: LoggedRun, tags: Mapping[str, str]) -> None:
        """Set tags of a run that may have ended."""
        for key, value in tags.items():
            self._client.set_tag(run.run_id, key, value)

    def add_text(self, run: LoggedRun, name: str, text: str) -> None:
        """Add a text to the artifacts of a run that may have ended."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_text(text, encoding="utf-8")
            self._client.log_artifact(run.run_id, str(path))

    def _search(self, where: str) -> list[LoggedRun]:
        found = pages(
            lambda token: self._client.search_runs(
                [self._experiment_id],
                where,
                order_by=["attributes.start_time DESC"],
                page_token=token,
            )
        )
        return [_logged(run) for run in found if RUN_TAG in run.data.tags]

    def _checkpoints(self, query: str) -> Sequence[LoggedCheckpoint]:
        return [
            LoggedCheckpoint(candidate=candidate_of(model), hash=model.tags.get(HASH_TAG))
            for model in search_models(self._client, self._experiment_id, query)
            if CHECKPOINT_TAG in model.tags and str(model.status) == "READY"
        ]


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
