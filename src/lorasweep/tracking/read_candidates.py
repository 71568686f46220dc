"""Reading checkpoints with their scores back from a store: what `pick` and `export` choose from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.core.atomic_write import write_atomically
from lorasweep.tracking.records import hash_of
from lorasweep.tracking.store import (
    CHECKPOINT_TAG,
    EPOCH_TAG,
    HASH_TAG,
    PATH_TAG,
    RUN_TAG,
    SWEEP_TAG,
    TERMS_TAG,
    TrackingError,
    client_of,
    open_experiment,
    quieten_mlflow,
    search_models,
    search_runs,
    tagged,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A checkpoint with its scores: what `pick` chooses among."""

    name: str
    run: str
    sweep: str
    epoch: int
    path: Path
    scores: Mapping[str, float]
    terms: Mapping[str, Sequence[float]]
    """What scores are means of, in the same order for all checkpoints of a sweep."""
    run_id: str
    model_id: str
    experiment_id: str
    created: int
    """Milliseconds since 1970."""
    hash: str | None = None
    """sha256 of its data (kohya's sshs_model_hash), if that was logged."""


def sweeps(uri: str, experiment: str) -> list[str]:
    """Names of the sweeps, newest first. A run outside any sweep is one under its own name."""
    client, experiment_id = open_experiment(uri, experiment)
    runs = search_runs(client, experiment_id)
    tags = (run.data.tags.get(SWEEP_TAG) for run in runs)
    return list(dict.fromkeys(tag for tag in tags if tag))  # each once, in order


def candidates(
    uri: str, experiment: str, sweep: str | None = None, run: str | None = None
) -> list[Candidate]:
    """All scored checkpoints of the experiment, or of one sweep or run, in the order written."""
    client, experiment_id = open_experiment(uri, experiment)
    return search_candidates(client, experiment_id, tagged({SWEEP_TAG: sweep, RUN_TAG: run}))


def search_candidates(client: MlflowClient, experiment_id: str, where: str) -> list[Candidate]:
    """The scored checkpoints that fit MLflow's filter, in the order written."""
    found = [
        _candidate(model)
        for model in search_models(client, experiment_id, where)
        if CHECKPOINT_TAG in model.tags and str(model.status) == "READY"
    ]
    return sorted(found, key=lambda one: one.created)


def config_of(uri: str, candidate: Candidate) -> str:
    """The resolved config, as YAML, of the run that a candidate comes from."""
    with tempfile.TemporaryDirectory() as folder:
        return download(uri, f"runs:/{candidate.run_id}/config.yaml", folder).read_text()


def fetch_file(uri: str, candidate: Candidate, target: Path) -> None:
    """Copy the candidate's file to `target`. Raises TrackingError where it is gone."""
    with checkpoint_file(uri, candidate) as path:
        if path is None:
            raise TrackingError(
                f"{candidate.path} is gone and MLflow has no copy; set tracking.upload=all to keep"
                " them"
            )
        write_atomically(target, path.read_bytes())


@contextmanager
def checkpoint_file(uri: str, candidate: Candidate) -> Iterator[Path | None]:
    """A candidate's file where it was written, else MLflow's copy, else None.

    What lies there now with another hash is another attempt's.
    """
    path = candidate.path
    if path.is_file() and (candidate.hash is None or hash_of(path) == candidate.hash):
        yield path
        return
    client = client_of(uri)
    stored = {file.path for file in client.list_logged_model_artifacts(candidate.model_id)}
    fitting = {path.name, f"{candidate.name}.safetensors"} & stored  # a picked one has this name
    if not fitting:
        yield None
        return
    location = client.get_logged_model(candidate.model_id).artifact_location
    with tempfile.TemporaryDirectory() as folder:
        yield download(uri, f"{location}/{min(fitting)}", folder)


def download(uri: str, artifact_uri: str, folder: str) -> Path:
    """A copy of one of the store's files, in `folder`."""
    quieten_mlflow()
    from mlflow.artifacts import download_artifacts

    return Path(download_artifacts(artifact_uri, dst_path=folder, tracking_uri=uri))


def _candidate(model: LoggedModel) -> Candidate:
    """The checkpoint that a model of MLflow's is."""
    return Candidate(
        name=model.tags[CHECKPOINT_TAG],
        run=model.tags[RUN_TAG],
        sweep=model.tags[SWEEP_TAG],
        epoch=int(model.tags[EPOCH_TAG]),
        path=Path(model.tags[PATH_TAG]),
        scores={metric.key: metric.value for metric in model.metrics or []},
        terms=json.loads(model.tags.get(TERMS_TAG, "{}")),
        run_id=model.source_run_id,
        model_id=model.model_id,
        experiment_id=model.experiment_id,
        created=model.creation_timestamp,
        hash=model.tags.get(HASH_TAG),
    )
