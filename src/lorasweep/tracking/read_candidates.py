"""Reading checkpoints with their scores back from a store: what `pick` and `export` choose from."""

from __future__ import annotations

import logging
import math
import re
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.core.foreign_files import ForeignFileError, inside, parse_json, read_text
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.text import listed, shown
from lorasweep.lora_files import checkpoint
from lorasweep.tracking import artifact_folder
from lorasweep.tracking.store import (
    CHECKPOINT_TAG,
    CHOSEN_BY_TAG,
    EPOCH_TAG,
    HASH_TAG,
    MAX_TAG,
    PATH_TAG,
    RUN_TAG,
    SEED_TAG,
    SETTING_TAG,
    SWEEP_TAG,
    TERMS_TAG,
    TRIAL_TAG,
    Tracking,
    TrackingError,
    client_of,
    differing,
    each_model,
    each_run,
    newest_run,
    open_experiment,
    tagged,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A checkpoint with its scores: what `pick` chooses among."""

    name: str
    run: str
    sweep: str
    epoch: int
    path: Path
    """Where it was written; what lies there is to be had from `checkpoint_file` alone."""
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
    chosen_by: str | None = None
    """By whom it is the sweep's choice, `rule` or `person`; None for the others."""
    setting: str | None = None
    """Equal for runs that differ in their seed alone; None if an older version logged it."""
    seed: str | None = None


class _BrokenEntryError(ValueError):
    """What the store says of a checkpoint is not what lorasweep writes."""


def sweeps(uri: str, experiment: str) -> list[str]:
    """Names of the sweeps, newest first. A run outside any sweep is one under its own name."""
    client, experiment_id = open_experiment(uri, experiment)
    tags = (run.data.tags.get(SWEEP_TAG) for run in each_run(client, experiment_id))
    return list(dict.fromkeys(tag for tag in tags if tag))  # each once, in order


def newest_sweep(uri: str, experiment: str) -> str | None:
    """The first of `sweeps`, for which the others need not be read."""
    run = newest_run(*open_experiment(uri, experiment), f"tags.`{SWEEP_TAG}` != ''")
    return None if run is None else run.data.tags[SWEEP_TAG]


def candidates(
    uri: str, experiment: str, sweep: str | None = None, run: str | None = None
) -> list[Candidate]:
    """All scored checkpoints of the experiment, or of one sweep or run, in the order written.

    Those of runs that somebody has deleted in MLflow, which keeps the checkpoints, are left out.
    """
    client, experiment_id = open_experiment(uri, experiment)
    where = tagged({SWEEP_TAG: sweep, RUN_TAG: run})
    deleted = {one.info.run_id for one in each_run(client, experiment_id, where, deleted=True)}
    found = search_candidates(client, experiment_id, where)
    return [one for one in found if one.run_id not in deleted]


def deleted_trials(settings: Tracking, output_root: Path, sweep: str) -> set[int]:
    """Numbers of the trials of a sweep whose runs somebody has deleted in MLflow.

    None are known where the store can't be asked now.
    """
    if settings.offline:
        return set()
    from mlflow.exceptions import MlflowException

    where = f"{tagged({SWEEP_TAG: sweep})} AND tags.`{TRIAL_TAG}` != ''"
    try:
        client, experiment_id = open_experiment(settings.resolve(output_root), settings.experiment)
        gone = set(_trials(each_run(client, experiment_id, where, deleted=True)))
        # an earlier attempt is deleted where one of the same number is there
        return gone - set(_trials(each_run(client, experiment_id, where))) if gone else gone
    except (TrackingError, MlflowException):
        return set()


def _trials(runs: Iterator[Run]) -> Iterator[int]:
    numbers = (run.data.tags[TRIAL_TAG] for run in runs)
    return (int(number) for number in numbers if number.isdecimal())


def search_candidates(client: MlflowClient, experiment_id: str, where: str) -> list[Candidate]:
    """The scored checkpoints that fit MLflow's filter, in the order written.

    What others have written of a checkpoint may be anything: then it is left out, with a warning.
    """
    found, broken = [], []
    for model in each_model(client, experiment_id, where):
        if CHECKPOINT_TAG in model.tags and str(model.status) == "READY":
            try:
                found.append(_candidate(model))
            except (ValueError, TypeError) as error:  # also numbers where MLflow has texts
                broken.append(f"{shown(str(model.tags[CHECKPOINT_TAG]), 40)} ({error})")
    if broken:
        log.warning("left out, for their entries in the tracking store: %s", listed(broken))
    return sorted(found, key=lambda one: one.created)


def base_score(uri: str, candidate: Candidate, name: str) -> float | None:
    """A score of the bare base that a candidate's run began from; None where none was logged."""
    history = client_of(uri).get_metric_history(candidate.run_id, name)
    found = [point.value for point in history if point.step == 0]
    return found[-1] if found and math.isfinite(found[-1]) else None


def differing_settings(uri: str, candidates: Sequence[Candidate]) -> dict[str, dict[str, str]]:
    """The settings in which the runs of candidates differ, by the runs' ids.

    The seed is none, and of those that go together, such as rank and alpha, only the last is one.
    """
    wanted = {one.run_id for one in candidates}
    sweeps = {(one.experiment_id, one.sweep) for one in candidates}
    runs = [
        run
        for experiment, sweep in sweeps
        for run in each_run(client_of(uri), experiment, tagged({SWEEP_TAG: sweep}))
        if run.info.run_id in wanted
    ]
    params = {run.info.run_id: run.data.params for run in runs}
    keys: dict[tuple[int, ...], str] = {}
    for key in differing(list(params.values())):
        values = [one.get(key, "") for one in params.values()]
        if key != "seed":
            keys[tuple(map(values.index, values))] = key
    return {of: {key: one.get(key, "") for key in keys.values()} for of, one in params.items()}


def config_of(uri: str, candidate: Candidate) -> str:
    """The resolved config, as YAML, of the run that a candidate comes from.

    Raises TrackingError where there is none, ForeignFileError where it is no text.
    """
    with artifact_folder.of_run(client_of(uri), candidate.run_id).file("config.yaml") as path:
        if path is None:
            raise TrackingError(f"{candidate.run}: its config.yaml is not in the tracking store")
        return read_text(path)


def read_checkpoint(uri: str, candidate: Candidate, output_root: Path) -> bytes:
    """The candidate's file. Raises TrackingError where it is gone."""
    with checkpoint_file(uri, candidate, output_root) as path:
        if path is None:
            raise TrackingError(_gone(candidate, output_root))
        return path.read_bytes()


def _gone(candidate: Candidate, output_root: Path) -> str:
    path = shown(str(candidate.path), 300)
    if candidate.hash is None:
        return f"{path}: no hash of it was logged, so what lies there can't be known to be it"
    if not _is_inside(output_root, candidate.path):
        return (
            f"{path} lies outside {output_root}, so it is not read, and MLflow has no copy; give"
            " output_root=FOLDER that it was trained in"
        )
    what = "is another file by now" if candidate.path.is_file() else "is gone"
    return f"{path} {what} and MLflow has no copy; set tracking.upload=all to keep them"


def local_file(candidate: Candidate, output_root: Path) -> Path | None:
    """A candidate's file where it was written, or at the same place of an output_root that moved.

    It lies below `output_root` once links are followed, is a safetensors file, and its data have
    the hash that was logged.
    """
    parts = candidate.path.parts
    moved = (output_root.joinpath(*parts[start:]) for start in range(1, len(parts)))
    for path in (candidate.path, *moved):
        if _is_inside(output_root, path) and path.is_file():
            found = inside(output_root, path)
            if _is_it(candidate, found):
                return found
    return None


@contextmanager
def checkpoint_file(uri: str, candidate: Candidate, output_root: Path) -> Iterator[Path | None]:
    """A candidate's file where it was written, else MLflow's copy, else None.

    A store's word is not taken for either: see `local_file`.
    """
    path = local_file(candidate, output_root)
    if path is not None:
        yield path
        return
    files = artifact_folder.of_model(client_of(uri), candidate.model_id)
    for name in (candidate.path.name, f"{candidate.name}.safetensors"):  # as a picked one is called
        with files.file(name) as path:
            if path is not None and _is_it(candidate, path):
                yield path
                return
    yield None


def _is_inside(output_root: Path, path: Path) -> bool:
    try:
        inside(output_root, path)
    except ForeignFileError:
        return False
    return True


def _is_it(candidate: Candidate, path: Path) -> bool:
    """Is it the file that was logged? What lies there by now may be another attempt's."""
    try:
        checkpoint.read_metadata(path)
        return candidate.hash is not None and checkpoint.data_hash(path) == candidate.hash
    except (CheckpointError, OSError):
        return False


def _candidate(model: LoggedModel) -> Candidate:
    """The checkpoint that a model of MLflow's is. Raises _BrokenEntryError.

    What many candidates have in common is kept once: there may be ten thousands of them.
    """
    tags: dict[str, str] = model.tags
    missing = [tag for tag in (RUN_TAG, SWEEP_TAG, EPOCH_TAG, PATH_TAG) if not tags.get(tag)]
    if missing:
        raise _BrokenEntryError(f"no {', '.join(missing)}")
    if not model.source_run_id:
        raise _BrokenEntryError("of no run")
    name, path, epoch = tags[CHECKPOINT_TAG], tags[PATH_TAG], tags[EPOCH_TAG]
    if not re.fullmatch(r"[\w-]{1,250}", name):
        raise _BrokenEntryError("its name is not made of letters, digits, - and _")
    if not re.fullmatch(r"[0-9]{1,9}", epoch):
        raise _BrokenEntryError(f"its epoch is {shown(epoch, 20)}")
    if "\0" in path or not Path(path).is_absolute() or not path.endswith(".safetensors"):
        raise _BrokenEntryError(f"its path is {shown(path, 60)}")
    setting, seed = tags.get(SETTING_TAG), tags.get(SEED_TAG)
    if seed is not None and not re.fullmatch(r"-?[0-9]{1,20}", seed):
        raise _BrokenEntryError(f"its seed is {shown(seed, 20)}")
    return Candidate(
        name=name,
        run=sys.intern(tags[RUN_TAG]),
        sweep=sys.intern(tags[SWEEP_TAG]),
        epoch=int(epoch),
        path=Path(path),
        scores={sys.intern(m.key): m.value for m in model.metrics or [] if math.isfinite(m.value)},
        terms=_terms(tags.get(TERMS_TAG, "{}")),
        run_id=sys.intern(model.source_run_id),
        model_id=model.model_id,
        experiment_id=sys.intern(model.experiment_id),
        created=model.creation_timestamp,
        hash=tags.get(HASH_TAG),
        chosen_by=tags.get(CHOSEN_BY_TAG),
        setting=sys.intern(setting) if setting and seed else None,
        seed=sys.intern(seed) if seed else None,
    )


def _terms(text: str) -> dict[str, Sequence[float]]:
    """Raises _BrokenEntryError."""
    try:
        if len(text) > MAX_TAG:
            raise ValueError("more than is ever logged")
        terms = parse_json(text, "text")
        found: dict[str, Sequence[float]] = {
            sys.intern(key): array("d", values) for key, values in terms.items()
        }
    except (ValueError, TypeError, OverflowError):
        raise _BrokenEntryError(f"its terms are {shown(text, 20)}") from None
    if not all(math.isfinite(one) for values in found.values() for one in values):
        raise _BrokenEntryError("its terms are not finite")
    return found
