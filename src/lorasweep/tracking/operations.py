"""What is written to MLflow, as plain data: each operation waits in the writer's queue."""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasweep.checkpoint import Checkpoint
from lorasweep.tracking.history import hash_tags
from lorasweep.tracking.source import source_tags
from lorasweep.tracking.store import (
    CHECKPOINT_TAG,
    EPOCH_TAG,
    PATH_TAG,
    REASON_TAG,
    RUN_TAG,
    SWEEP_TAG,
    TERMS_TAG,
    same_run,
)
from lorasweep.tracking.writer import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from PIL import Image

Status = Literal["FINISHED", "FAILED", "KILLED"]


THUMBNAIL = 256  # pixels at most, as MLflow's own
ENLARGED = 128  # pixels at most to which smaller pictures are enlarged
MAX_PARAM = 6000  # characters, MLflow's limits
MAX_TAG = 8000
MAX_KEY = 250
DIGEST = 16  # characters of the data set's digest in MLflow's tables; the profile has it whole
MAX_SAMPLE_KEY = 100  # characters; the key becomes a part of a file's name


@dataclass(frozen=True, kw_only=True)
class NewRun:
    """What is known of a run when it starts."""

    name: str
    sweep: str | None
    """Runs that search together share it; None stands alone under its own name."""
    params: Mapping[str, Any]
    """The resolved config, flat: `{"adapter.rank": 8}`."""
    config_yaml: str
    overrides: Sequence[str]
    manifest: Path | Mapping[str, Any]
    image_dir: Path
    dataset_digest: str
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunRef:
    """A run as operations refer to it: by an id that is known once it is open."""

    name: str
    sweep: str
    id: Future[str] = field(default_factory=Future)


@dataclass(frozen=True)
class Point:
    """One value of a curve."""

    key: str
    value: float
    time: int
    step: int


@dataclass(frozen=True)
class Open:
    """Start a run: its settings, its data set and where it comes from."""

    run: RunRef
    new: NewRun

    def write(self, store: Store) -> None:
        from mlflow.entities import Param

        if self.new.sweep is not None:
            self._forget_earlier(store)
        tags = {**source_tags(), **self.new.tags, **_run_tags(self.run)}
        created = store.client.create_run(
            store.experiment_id,
            run_name=self.run.name,
            tags={_key(key): value[:MAX_TAG] for key, value in tags.items()},
        )
        run_id = created.info.run_id
        params = {_key(key): _cut(str(value)) for key, value in self.new.params.items()}
        store.client.log_batch(run_id, params=[Param(*item) for item in params.items()])
        store.client.log_inputs(run_id, [_dataset(self.new)])
        self._write_files(store.client, run_id)
        self.run.id.set_result(run_id)

    def _forget_earlier(self, store: Store) -> None:
        """Delete an earlier attempt at this run of the sweep, and its checkpoints."""
        where, client = same_run(self.run.sweep, self.run.name), store.client
        for run in client.search_runs([store.experiment_id], where):
            client.delete_run(run.info.run_id)
            for model in client.search_logged_models([store.experiment_id], where):
                client.delete_logged_model(model.model_id)

    def _write_files(self, client: MlflowClient, run_id: str) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "config.yaml").write_text(self.new.config_yaml)
            # JSON is YAML, and spares rules for quoting
            overrides = json.dumps(list(self.new.overrides), ensure_ascii=False, indent=1)
            (folder / "overrides.yaml").write_text(f"{overrides}\n")
            (folder / "manifest.json").write_text(_manifest_text(self.new.manifest))
            client.log_artifacts(run_id, str(folder))


@dataclass(frozen=True)
class Curves:
    """Step metrics alone, between epochs or at the end."""

    run: RunRef
    points: Sequence[Point]

    def write(self, store: Store) -> None:
        store.client.log_batch(self.run.id.result(), metrics=_metrics(self.points))


@dataclass(frozen=True)
class Epoch:
    """One epoch, with the step metrics since the one before: pictures, checkpoint, scores."""

    run: RunRef
    epoch: int
    checkpoint: Checkpoint | None
    points: Sequence[Point]
    scores: Sequence[Point]
    samples: Mapping[str, Image.Image]
    upload: bool
    terms: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def write(self, store: Store) -> None:
        run_id = self.run.id.result()
        self._write_samples(store.client, run_id)
        if self.checkpoint is None:
            store.client.log_batch(run_id, metrics=_metrics([*self.points, *self.scores]))
            return
        model_id = self._create_model(store, self.checkpoint, run_id)
        scores = _metrics(self.scores, model_id)
        store.client.log_batch(run_id, metrics=[*_metrics(self.points), *scores])
        # last, so that a model that is READY always has its file and scores
        store.client.finalize_logged_model(model_id, "READY")

    def _create_model(self, store: Store, checkpoint: Checkpoint, run_id: str) -> str:
        from mlflow.entities import LoggedModelOutput

        tags = {
            **_run_tags(self.run),
            CHECKPOINT_TAG: checkpoint.name,
            EPOCH_TAG: str(checkpoint.epoch),
            PATH_TAG: str(checkpoint.path.resolve()),
            **hash_tags(checkpoint.path),
        }
        terms = json.dumps({name: [round(x, 7) for x in of] for name, of in self.terms.items()})
        if len(terms) <= MAX_TAG:  # without them, pick falls back to the score's own interval
            tags[TERMS_TAG] = terms
        model = store.client.create_logged_model(
            store.experiment_id,
            name=re.sub(r"""[/:.%"']""", "_", checkpoint.name),  # what MLflow refuses in a name
            source_run_id=run_id,
            tags=tags,
            params={"epoch": str(checkpoint.epoch), "step": str(checkpoint.step)},
            model_type="adapter",
        )
        store.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, checkpoint.epoch)])
        if self.upload:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / checkpoint.path.name).symlink_to(checkpoint.path.resolve())
                store.client.log_model_artifacts(model.model_id, folder)
        return str(model.model_id)

    def _write_samples(self, client: MlflowClient, run_id: str) -> None:
        if not self.samples:
            return
        with tempfile.TemporaryDirectory() as folder:
            for key, image in self.samples.items():
                _save_sample(Path(folder), f"samples/{key}", self.epoch, image)
            client.log_artifacts(run_id, folder, "images")


@dataclass(frozen=True)
class File:
    """Add a file to the artifacts."""

    run: RunRef
    path: Path
    artifact_dir: str | None

    def write(self, store: Store) -> None:
        store.client.log_artifact(self.run.id.result(), str(self.path), self.artifact_dir)


@dataclass(frozen=True)
class Picture:
    """Add a picture to the artifacts."""

    run: RunRef
    image: Image.Image
    name: str

    def write(self, store: Store) -> None:
        store.client.log_image(self.run.id.result(), self.image, artifact_file=self.name)


@dataclass(frozen=True)
class Tag:
    """Set a tag."""

    run: RunRef
    key: str
    value: str

    def write(self, store: Store) -> None:
        store.client.set_tag(self.run.id.result(), self.key, self.value)


@dataclass(frozen=True)
class Close:
    """End a run."""

    run: RunRef
    status: Status
    reason: str | None

    def write(self, store: Store) -> None:
        run_id = self.run.id.result()
        if self.reason:
            store.client.set_tag(run_id, REASON_TAG, self.reason[:MAX_TAG])
            store.client.set_tag(run_id, "mlflow.note.content", self.reason[:MAX_TAG])
        store.client.set_terminated(run_id, self.status)


def points(step: int, metrics: Mapping[str, float]) -> list[Point]:
    """The metrics of a step (or epoch), noted now."""
    now = _now()
    return [Point(_key(key), float(value), now, step) for key, value in metrics.items()]


def _save_sample(folder: Path, key: str, step: int, image: Image.Image) -> None:
    """Save under the names that `MlflowClient.log_image(key=, step=)` gives.

    Its own call costs 17 ms a picture of 64x64; this one 1.5 ms.
    """
    safe = re.sub(r"[^a-zA-Z0-9_\-.~ ]", "_", key.replace("/", "~"))[:MAX_SAMPLE_KEY]
    stem = f"{safe}+step+{step}+timestamp+{_now()}+{uuid.uuid4()}"
    image.save(folder / f"{stem}.png", compress_level=1)
    _thumbnail(image).save(folder / f"{stem}+compressed.webp", method=0)


def _thumbnail(image: Image.Image) -> Image.Image:
    """What MLflow's pages show, at its natural size: so small pictures are enlarged."""
    from PIL import Image

    factor = ENLARGED // max(image.size)
    if factor > 1:
        size = (image.width * factor, image.height * factor)
        return image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small


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


def _run_tags(run: RunRef) -> dict[str, str]:
    return {SWEEP_TAG: run.sweep, RUN_TAG: run.name}


def _dataset(new: NewRun) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=new.image_dir.name or "images",
        digest=new.dataset_digest[:DIGEST],
        source_type="local",
        source=json.dumps({"uri": str(new.image_dir.resolve())}),
        profile=json.dumps({"digest": new.dataset_digest}),
    )
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])


def _manifest_text(manifest: Path | Mapping[str, Any]) -> str:
    if isinstance(manifest, Path):
        return manifest.read_text()
    return json.dumps(manifest, indent=1, ensure_ascii=False, default=str)


def _key(key: str) -> str:
    """A name that MLflow takes for a param, metric or tag."""
    return re.sub(r"[^\w\-. /]", "_", key).strip("/")[:MAX_KEY]


def _cut(value: str) -> str:
    return value if len(value) <= MAX_PARAM else f"{value[: MAX_PARAM - 1]}…"


def _now() -> int:
    return time.time_ns() // 1_000_000
