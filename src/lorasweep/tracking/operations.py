"""What is written to MLflow, as plain data: each operation waits in a spool on the disk.

Sending one again, wholly or in part, changes nothing: times, names and the run's `uid` are chosen
when it is made, and what may exist already is looked for where `Delivery.again` says so.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, PlainSerializer

from lorasweep.lora_files.checkpoint import Checkpoint
from lorasweep.tracking import pictures
from lorasweep.tracking.history import hash_tags
from lorasweep.tracking.store import (
    CHECKPOINT_TAG,
    EPOCH_TAG,
    PATH_TAG,
    REASON_TAG,
    RUN_TAG,
    SUSPENDED_TAG,
    SWEEP_TAG,
    TERMS_TAG,
    UID_TAG,
    quoted,
    same_run,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric
    from mlflow.entities import Run as MlflowRun

Status = Literal["FINISHED", "FAILED", "KILLED"]

log = logging.getLogger(__name__)

MAX_PARAM = 6000  # characters, MLflow's limits
MAX_TAG = 8000
MAX_KEY = 250
NOTE_TAG = "mlflow.note.content"  # MLflow shows it above a run


Number = Annotated[
    float,
    PlainSerializer(lambda x: x if math.isfinite(x) else str(x), when_used="json"),
]
"""Also inf and nan, for which JSON has no numbers: they become words."""


class Plain:
    """Base of what goes to the disk as JSON."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        ser_json_bytes="base64", val_json_bytes="base64"
    )


class RunGone(ValueError):
    """MLflow has no such run (any more)."""


@dataclass(frozen=True, kw_only=True)
class RunState(Plain):
    """A run, and what was logged of it up to an operation."""

    uid: str
    name: str
    sweep: str
    uri: str | None
    """Of the store, without secrets; None is the file under output_root."""
    experiment: str
    epochs: tuple[int, ...] = ()
    """0 is the bare base model."""
    steps: Mapping[str, int] = field(default_factory=dict)
    """The last step of each curve."""
    is_open: bool = True


@dataclass
class Store:
    """An open store; lives on the writing thread."""

    client: MlflowClient
    experiment_id: str
    run_ids: dict[str, str] = field(default_factory=dict)
    """MLflow's ids by ours."""


@dataclass(frozen=True)
class Delivery:
    """Where an operation goes."""

    store: Store
    run: RunState
    output_dir: Path
    again: bool
    """A part of it may have arrived before."""

    @property
    def client(self) -> MlflowClient:
        return self.store.client

    @property
    def run_id(self) -> str:
        """MLflow's id of the run. Raises RunGone."""
        known = self.store.run_ids.get(self.run.uid)
        found = known or self.find_run()
        if found is None:
            raise RunGone(
                f"MLflow has no run {self.run.name} of this output folder; was it deleted?"
            )
        self.store.run_ids[self.run.uid] = found
        return found

    def find_run(self) -> str | None:
        """MLflow's id of the run, where there is one; a second one, made by a late request, goes.

        A server that hung answers late to what was given up meanwhile, and so may make it twice.
        """
        runs = self.search(f"tags.`{UID_TAG}` = {quoted(self.run.uid)}")
        runs.sort(key=lambda run: len(run.data.metrics) + len(run.data.params), reverse=True)
        for late in runs[1:]:
            self.client.delete_run(late.info.run_id)
        return str(runs[0].info.run_id) if runs else None

    def search(self, where: str) -> list[MlflowRun]:
        """The runs that MLflow has."""
        return list(self.client.search_runs([self.store.experiment_id], where))


@dataclass(frozen=True)
class Point(Plain):
    """One value of a curve."""

    key: str
    value: Number
    time: int
    step: int


@dataclass(frozen=True)
class Sample(Plain):
    """A picture of an epoch: the name of its file without suffix, and a PNG."""

    stem: str
    png: bytes


@dataclass(frozen=True, kw_only=True)
class DatasetInfo(Plain):
    """The images of a run, as MLflow shows them."""

    name: str
    digest: str
    source: str
    profile: str


@dataclass(frozen=True, kw_only=True)
class Open(Plain):
    """Begin a run: its settings, its data set and where it comes from; or go on with it."""

    kind: Literal["open"] = "open"
    time: int
    tags: Mapping[str, str]
    params: Mapping[str, str]
    files: Mapping[str, str]
    dataset: DatasetInfo
    replaces: bool
    """Delete an earlier attempt at this run of the sweep, and its checkpoints."""
    goes_on: bool

    def write(self, to: Delivery) -> None:
        if self.replaces:
            self._forget_earlier(to)
        found = to.find_run() if self.goes_on or to.again else None
        if found is None:
            if to.run.epochs:
                log.warning(
                    "%s: MLflow has lost what was logged before; was it deleted?", to.run.name
                )
            found = self._create(to)
        elif self.goes_on:
            _reopen(to.client, found)
        to.store.run_ids[to.run.uid] = found
        if not self.goes_on or to.again or not _has_files(to.client, found):
            self._complete(to, found)

    def _create(self, to: Delivery) -> str:
        tags = {**self.tags, **_run_tags(to.run), UID_TAG: to.run.uid}
        created = to.client.create_run(
            to.store.experiment_id, start_time=self.time, run_name=to.run.name, tags=tags
        )
        return str(created.info.run_id)

    def _complete(self, to: Delivery, run_id: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        client = to.client
        logged = client.get_run(run_id).data.params if self.goes_on or to.again else {}
        params = [Param(*item) for item in self.params.items() if item[0] not in logged]
        client.log_batch(run_id, params=params)
        dataset = Dataset(
            name=self.dataset.name,
            digest=self.dataset.digest,
            source_type="local",
            source=self.dataset.source,
            profile=self.dataset.profile,
        )
        use = InputTag("mlflow.data.context", "training")
        client.log_inputs(run_id, [DatasetInput(dataset, tags=[use])])
        with tempfile.TemporaryDirectory() as name:
            for file, text in self.files.items():
                (Path(name) / file).write_text(text, encoding="utf-8")
            client.log_artifacts(run_id, name)

    def _forget_earlier(self, to: Delivery) -> None:
        where = same_run(to.run.sweep, to.run.name)
        earlier = {run.info.run_id for run in to.search(where) if not _is_own(run, to.run)}
        if not earlier:
            return
        for model in to.client.search_logged_models([to.store.experiment_id], where):
            if model.source_run_id in earlier:
                to.client.delete_logged_model(model.model_id)
        for run_id in earlier:  # last, for by them the models are found
            to.client.delete_run(run_id)


@dataclass(frozen=True, kw_only=True)
class Curves(Plain):
    """Step metrics alone, between epochs or at the end."""

    kind: Literal["curves"] = "curves"
    points: Sequence[Point]

    def write(self, to: Delivery) -> None:
        to.client.log_batch(to.run_id, metrics=_metrics(self.points))


@dataclass(frozen=True, kw_only=True)
class Model(Plain):
    """A checkpoint, as MLflow's LoggedModel."""

    checkpoint: Checkpoint
    terms: Mapping[str, Sequence[Number]]
    upload: bool


@dataclass(frozen=True, kw_only=True)
class Epoch(Plain):
    """One epoch, with the step metrics since the one before: pictures, checkpoint, scores."""

    kind: Literal["epoch"] = "epoch"
    epoch: int
    points: Sequence[Point]
    scores: Sequence[Point]
    samples: Sequence[Sample]
    model: Model | None

    def write(self, to: Delivery) -> None:
        run_id = to.run_id
        self._write_samples(to.client, run_id)
        if self.model is None:
            to.client.log_batch(run_id, metrics=_metrics([*self.points, *self.scores]))
            return
        found = _models(to, self.model.checkpoint) if to.again else []
        model_id = found[0].model_id if found else _create_model(to, self.model)
        self._complete(to, self.model, model_id)
        for other in found[1:]:  # made by a request that was given up, and arrived late
            to.client.delete_logged_model(other.model_id)

    def _complete(self, to: Delivery, model: Model, model_id: str) -> None:
        from mlflow.entities import LoggedModelOutput

        if not (to.again and model_id in _outputs(to)):
            output = LoggedModelOutput(model_id, model.checkpoint.epoch)
            to.client.log_outputs(to.run_id, [output])
        if model.upload:
            _upload(to, model.checkpoint, model_id)
        scores = _metrics(self.scores, model_id)
        to.client.log_batch(to.run_id, metrics=[*_metrics(self.points), *scores])
        # last, so that a model that is READY always has its file and scores
        to.client.finalize_logged_model(model_id, "READY")

    def _write_samples(self, client: MlflowClient, run_id: str) -> None:
        if not self.samples:
            return
        with tempfile.TemporaryDirectory() as folder:
            for sample in self.samples:
                pictures.save_sample(Path(folder), sample.stem, sample.png)
            client.log_artifacts(run_id, folder, "images")


@dataclass(frozen=True, kw_only=True)
class File(Plain):
    """Add a file to the artifacts."""

    kind: Literal["file"] = "file"
    path: Path
    """Below the run's output folder if it is relative."""
    artifact_dir: str | None

    def write(self, to: Delivery) -> None:
        path = to.output_dir / self.path
        if not path.is_file():
            raise ValueError(f"{path} is gone, so it can't be logged")
        to.client.log_artifact(to.run_id, str(path), self.artifact_dir)


@dataclass(frozen=True, kw_only=True)
class Picture(Plain):
    """Add a picture to the artifacts."""

    kind: Literal["picture"] = "picture"
    png: bytes
    name: str

    def write(self, to: Delivery) -> None:
        target = Path(self.name)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / target.name
            file.write_bytes(self.png)
            inside = None if target.parent == Path() else target.parent.as_posix()
            to.client.log_artifact(to.run_id, str(file), inside)


@dataclass(frozen=True, kw_only=True)
class Tag(Plain):
    """Set a tag."""

    kind: Literal["tag"] = "tag"
    key: str
    value: str

    def write(self, to: Delivery) -> None:
        to.client.set_tag(to.run_id, self.key, self.value)


@dataclass(frozen=True, kw_only=True)
class Close(Plain):
    """End a run, or leave it to go on later."""

    kind: Literal["close"] = "close"
    time: int
    status: Status
    reason: str | None = None
    suspended: str | None = None
    """Why it stopped, if it is to go on."""

    def write(self, to: Delivery) -> None:
        run_id = to.run_id
        if to.again:
            _remove_late_ones(to)
        if self.reason:
            to.client.set_tag(run_id, REASON_TAG, self.reason[:MAX_TAG])
            to.client.set_tag(run_id, NOTE_TAG, _note(self.reason)[:MAX_TAG])
        if self.suspended:
            to.client.set_tag(run_id, SUSPENDED_TAG, self.suspended[:MAX_TAG])
        to.client.set_terminated(run_id, self.status, end_time=self.time)


Operation = Annotated[
    Open | Curves | Epoch | File | Picture | Tag | Close, Field(discriminator="kind")
]


def _note(text: str) -> str:
    """A note is Markdown, where the names of a person's files may be HTML or links."""
    return re.sub(r"[\\`*_\[\]<>#|!&]", lambda found: f"\\{found[0]}", text)


def points(step: int, metrics: Mapping[str, float]) -> list[Point]:
    """The metrics of a step (or epoch), noted now."""
    time = now()
    return [Point(safe_key(key), float(value), time, step) for key, value in metrics.items()]


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def safe_key(key: str) -> str:
    """A name that MLflow takes for a param, metric or tag."""
    return re.sub(r"[^\w\-. /]", "_", key).strip("/")[:MAX_KEY]


def _reopen(client: MlflowClient, run_id: str) -> None:
    """Turn back what `Close` did."""
    tags = client.get_run(run_id).data.tags
    for tag in (SUSPENDED_TAG, REASON_TAG, NOTE_TAG):
        if tag in tags:
            client.delete_tag(run_id, tag)
    client.update_run(run_id, status="RUNNING")


def _has_files(client: MlflowClient, run_id: str) -> bool:
    """Was the run begun to the end?"""
    return bool(client.list_artifacts(run_id))


def _is_own(run: MlflowRun, state: RunState) -> bool:
    return bool(run.data.tags.get(UID_TAG) == state.uid)


def _create_model(to: Delivery, model: Model) -> str:
    checkpoint = model.checkpoint
    tags = {
        **_run_tags(to.run),
        CHECKPOINT_TAG: checkpoint.name,
        EPOCH_TAG: str(checkpoint.epoch),
        PATH_TAG: str((to.output_dir / checkpoint.path).resolve()),
        **hash_tags(to.output_dir / checkpoint.path),
    }
    terms = json.dumps({name: [round(x, 7) for x in of] for name, of in model.terms.items()})
    if len(terms) <= MAX_TAG:  # without them, pick falls back to the score's own interval
        tags[TERMS_TAG] = terms
    created = to.client.create_logged_model(
        to.store.experiment_id,
        name=re.sub(r"""[/:.%"']""", "_", checkpoint.name),  # what MLflow refuses in a name
        source_run_id=to.run_id,
        tags=tags,
        params={"epoch": str(checkpoint.epoch), "step": str(checkpoint.step)},
        model_type="adapter",
    )
    return str(created.model_id)


def _models(to: Delivery, checkpoint: Checkpoint | None = None) -> list[LoggedModel]:
    """The run's models, or those of a checkpoint; the one that was linked first comes first."""
    where = f"source_run_id = {quoted(to.run_id)}"
    if checkpoint is not None:
        where += f" AND tags.`{CHECKPOINT_TAG}` = {quoted(checkpoint.name)}"
    found: list[LoggedModel] = []
    token = None
    while True:
        page = to.client.search_logged_models(
            [to.store.experiment_id], filter_string=where, page_token=token
        )
        found += page
        token = page.token
        if not token:
            break
    linked = _outputs(to)
    return sorted(found, key=lambda one: (one.model_id not in linked, one.creation_timestamp))


def _outputs(to: Delivery) -> set[str]:
    outputs = to.client.get_run(to.run_id).outputs
    return {one.model_id for one in outputs.model_outputs} if outputs else set()


def _remove_late_ones(to: Delivery) -> None:
    """Delete runs and models that exist twice, see `Delivery.find_run`."""
    to.find_run()
    seen: set[str] = set()
    for model in _models(to):
        name = model.tags.get(CHECKPOINT_TAG, model.model_id)
        if name in seen:
            to.client.delete_logged_model(model.model_id)
        seen.add(name)


def _upload(to: Delivery, checkpoint: Checkpoint, model_id: str) -> None:
    path = (to.output_dir / checkpoint.path).resolve()
    if not path.is_file():
        log.warning("%s is gone, so MLflow gets no copy of it", path)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.name).symlink_to(path)
        to.client.log_model_artifacts(model_id, folder)


def _metrics(points: Sequence[Point], model_id: str | None = None) -> list[Metric]:
    """MLflow's metrics, linked to a model if one is given and the value is finite."""
    from mlflow.entities import Metric

    return [
        # MLflow makes inf 1.8e308, which ruins a chart, and a model's NaN 0, which would win
        Metric(point.key, point.value, point.time, point.step, model_id=model_id)
        if math.isfinite(point.value)
        else Metric(point.key, math.nan, point.time, point.step)
        for point in points
    ]


def _run_tags(run: RunState) -> dict[str, str]:
    return {SWEEP_TAG: run.sweep, RUN_TAG: run.name}
