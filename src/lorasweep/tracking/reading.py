"""Reading a store back, and recording a choice in it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasweep.core.atomic_write import write_atomically
from lorasweep.tracking.store import (
    CHECKPOINT_TAG,
    CHOSEN_BY_TAG,
    EPOCH_TAG,
    PATH_TAG,
    PICKED_TAG,
    RUN_TAG,
    SWEEP_TAG,
    TERMS_TAG,
    Tracking,
    TrackingError,
    client_of,
    open_experiment,
    quieten_mlflow,
    quoted,
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


def sweeps(uri: str, experiment: str) -> list[str]:
    """Names of the sweeps, newest first. A run outside any sweep is one under its own name."""
    client, experiment_id = open_experiment(uri, experiment)
    runs = _pages(
        lambda token: client.search_runs(
            [experiment_id], order_by=["attributes.start_time DESC"], page_token=token
        )
    )
    tags = (run.data.tags.get(SWEEP_TAG) for run in runs)
    return list(dict.fromkeys(tag for tag in tags if tag))  # each once, in order


def candidates(
    uri: str, experiment: str, sweep: str | None = None, run: str | None = None
) -> list[Candidate]:
    """All scored checkpoints of the experiment, or of one sweep or run, in the order written."""
    client, experiment_id = open_experiment(uri, experiment)
    wanted = [(SWEEP_TAG, sweep), (RUN_TAG, run)]
    query = " AND ".join(f"tags.`{tag}` = {quoted(name)}" for tag, name in wanted if name)
    found = [
        _candidate(model)
        for model in _models(client, experiment_id, query)
        if CHECKPOINT_TAG in model.tags and str(model.status) == "READY"
    ]
    return sorted(found, key=lambda one: one.created)


def config_of(uri: str, candidate: Candidate) -> str:
    """The resolved config, as YAML, of the run that a candidate comes from."""
    with tempfile.TemporaryDirectory() as folder:
        return _download(uri, f"runs:/{candidate.run_id}/config.yaml", folder).read_text()


def fetch_file(uri: str, candidate: Candidate, target: Path) -> None:
    """Copy the candidate's file to `target`: from where it was written, else from MLflow."""
    if candidate.path.is_file():
        write_atomically(target, candidate.path.read_bytes())
        return
    client, name = client_of(uri), candidate.path.name
    stored = [file.path for file in client.list_logged_model_artifacts(candidate.model_id)]
    if name not in stored:
        raise TrackingError(
            f"{candidate.path} is gone and MLflow has no copy; set tracking.upload=all to keep them"
        )
    with tempfile.TemporaryDirectory() as folder:
        location = client.get_logged_model(candidate.model_id).artifact_location
        found = _download(uri, f"{location}/{name}", folder)
        write_atomically(target, found.read_bytes())


def record_choice(
    uri: str,
    settings: Tracking,
    candidate: Candidate,
    *,
    chosen_by: Literal["rule", "person"],
    upload: Path | None,
) -> str:
    """Record the picked checkpoint: tags, a registered version with the alias `best`.

    `upload` is a folder to store with it. An earlier choice in the same sweep loses its tags.
    Returns the version's number.
    """
    client = client_of(uri)
    _forget_choice(client, candidate)
    tags = {PICKED_TAG: candidate.name, CHOSEN_BY_TAG: chosen_by}
    for key, value in tags.items():
        client.set_tag(candidate.run_id, key, value)
    client.set_logged_model_tags(candidate.model_id, tags)
    if upload is not None:
        client.log_model_artifacts(candidate.model_id, str(upload))
    version = _register(client, settings.registered_model, candidate, tags)
    client.set_registered_model_alias(settings.registered_model, "best", version)
    return version


def _models(client: MlflowClient, experiment_id: str, query: str) -> Iterator[LoggedModel]:
    return _pages(
        lambda token: client.search_logged_models(
            [experiment_id], filter_string=query or None, page_token=token
        )
    )


def _pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    page = search(None)
    yield from page
    while page.token:
        page = search(page.token)
        yield from page


def _download(uri: str, artifact_uri: str, folder: str) -> Path:
    quieten_mlflow()
    from mlflow.artifacts import download_artifacts

    return Path(download_artifacts(artifact_uri, dst_path=folder, tracking_uri=uri))


def _candidate(model: LoggedModel) -> Candidate:
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
    )


def _forget_choice(client: MlflowClient, candidate: Candidate) -> None:
    query = f"tags.`{SWEEP_TAG}` = {quoted(candidate.sweep)} AND tags.`{PICKED_TAG}` != ''"
    for run in client.search_runs([candidate.experiment_id], query):
        for tag in (PICKED_TAG, CHOSEN_BY_TAG):
            client.delete_tag(run.info.run_id, tag)
    for model in _models(client, candidate.experiment_id, query):
        for tag in (PICKED_TAG, CHOSEN_BY_TAG):
            client.delete_logged_model_tag(model.model_id, tag)


def _register(
    client: MlflowClient, name: str, candidate: Candidate, tags: Mapping[str, str]
) -> str:
    """The number of the registered version of a candidate, made if there is none."""
    import mlflow

    _ensure_registered_model(client, name)
    query = f"name = {quoted(name)} AND run_id = {quoted(candidate.run_id)}"
    for version in client.search_model_versions(query):
        if version.tags.get(CHECKPOINT_TAG) == candidate.name:
            for key, value in tags.items():
                client.set_model_version_tag(name, version.version, key, value)
            return str(version.version)
    # MLflow looks for models:/ID in the default store; other sources don't link to the model
    mlflow.set_tracking_uri(client.tracking_uri)
    version = client.create_model_version(
        name,
        source=f"models:/{candidate.model_id}",
        run_id=candidate.run_id,
        tags={CHECKPOINT_TAG: candidate.name, PATH_TAG: str(candidate.path), **tags},
        description=f"{candidate.name}, from sweep {candidate.sweep}",
        model_id=candidate.model_id,
    )
    return str(version.version)


def _ensure_registered_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
