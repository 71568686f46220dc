"""The picked checkpoint in MLflow: its tags, and a registered model with the alias `best`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorasweep.tracking import artifact_folder
from lorasweep.tracking.read_candidates import Candidate
from lorasweep.tracking.store import (
    CHECKPOINT_TAG,
    CHOSEN_BY_TAG,
    PATH_TAG,
    PICKED_TAG,
    SWEEP_TAG,
    Tracking,
    client_of,
    quoted,
    search_models,
    search_runs,
    tagged,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient


def check_place(uri: str, candidate: Candidate) -> None:
    """Raise TrackingError if the store would have the candidate's files put where none may go."""
    artifact_folder.of_model(client_of(uri), candidate.model_id)


def own_choice(uri: str, registered_model: str) -> tuple[str, str] | None:
    """Model id and checkpoint's name of what is registered as `best`, if a person chose it."""
    from mlflow.exceptions import MlflowException

    try:
        version = client_of(uri).get_model_version_by_alias(registered_model, "best")
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None  # no such model, or alias
        raise
    if version.tags.get(CHOSEN_BY_TAG) != "person":
        return None
    return str(version.model_id), version.tags.get(CHECKPOINT_TAG, "a checkpoint")


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
        artifact_folder.of_model(client, candidate.model_id).add(upload)
    version = _register(client, settings.registered_model, candidate, tags)
    client.set_registered_model_alias(settings.registered_model, "best", version)
    return version


def _forget_choice(client: MlflowClient, candidate: Candidate) -> None:
    where = f"{tagged({SWEEP_TAG: candidate.sweep})} AND tags.`{PICKED_TAG}` != ''"
    for run in search_runs(client, candidate.experiment_id, where):
        for tag in (PICKED_TAG, CHOSEN_BY_TAG):
            client.delete_tag(run.info.run_id, tag)
    for model in search_models(client, candidate.experiment_id, where):
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
