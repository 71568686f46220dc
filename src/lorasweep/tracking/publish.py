"""Bring MLflow up to date from a run's folder: `publish` sends what MLflow lacks.

It may be broken off anywhere and done again. What has no name of ours in MLflow (a run, a model) is
looked for before it is made: a run by its uid, a checkpoint's model by the checkpoint's name.
Points of curves, pictures and files that are sent twice replace themselves.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.core.foreign_files import ForeignFileError, inside
from lorasweep.core.text import markdown
from lorasweep.tracking.ledger import RUN, SETTINGS, STEPS, Ledger, missing, read_ledger
from lorasweep.tracking.outage import is_refused
from lorasweep.tracking.records import (
    LEDGER,
    CheckpointRecord,
    DamagedRecordError,
    EpochRecord,
    RunEnd,
    RunRecord,
    RunRecords,
    StepMetrics,
)
from lorasweep.tracking.store import (
    CHECKPOINT_TAG,
    EPOCH_TAG,
    FOLDER_TAG,
    HASH_TAG,
    MAX_PARAM,
    MAX_TAG,
    NOTE_TAG,
    PATH_TAG,
    REASON_TAG,
    RUN_TAG,
    SEED_TAG,
    SETTING_TAG,
    SUSPENDED_TAG,
    SWEEP_TAG,
    TERMS_TAG,
    UID_TAG,
    MlflowStore,
    quoted,
    safe_key,
    search_models,
    search_runs,
    short_reason,
    tagged,
)

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Metric
    from mlflow.entities import Run as MlflowRun

log = logging.getLogger(__name__)

SOURCE_TAGS = {
    "mlflow.source.name": "lorasweep",
    "mlflow.source.type": "LOCAL",
    "mlflow.loggedImages": "true",  # what makes MLflow look for sample cards
}
DIGEST = 16  # characters of the data set's digest in MLflow's tables; the profile has it whole
PREVIEW = 256  # pixels at most, as MLflow's own
ENLARGED = 128  # pixels at most to which smaller pictures are enlarged
MAX_PICTURE_KEY = 100  # characters; the key becomes a part of a file's name


class RunDeletedError(ValueError):
    """Someone has deleted a run in MLflow of which more is to be sent."""


def publish(records: RunRecords, store: MlflowStore) -> Iterator[Ledger]:
    """Send what the store lacks of a run, item by item; yields each new ledger, to be written.

    What the store refuses is noted in the ledger, with a warning, and doesn't hold up the rest; of
    a run that it refuses to begin nothing is sent. Raises OutageError when the store is away.
    """
    run = records.run()
    if run is None:
        return
    ledger = read_ledger(records.output_dir, run).of_store(store.uri, store.experiment)
    sending = _Sending(records, run, store)
    while RUN not in ledger.refused:
        left = missing(records, run, ledger)
        item = next((item for item in left if item not in ledger.refused), None)
        if item is None:
            return
        ledger = _sent_or_refused(sending, item, left[item], ledger)
        yield ledger


def _sent_or_refused(sending: _Sending, item: str, state: str, ledger: Ledger) -> Ledger:
    """The ledger after an item was sent, or refused for good. Raises OutageError."""
    while True:
        try:
            if item == RUN:
                ledger = sending.begin(ledger)
            else:
                sending.send(item)
            return replace(ledger, sent={**ledger.sent, item: state})
        except Exception as error:  # MLflow raises what its plug-ins and drivers raise
            if is_refused(error, sending.store, f"{sending.run.uid} {item}"):
                reason = short_reason(error)
                log.warning(
                    "%s: MLflow refused what was to be logged, %s (%s); that is kept in %s, and"
                    " `lorasweep sync` tries it again",
                    sending.run.new.name,
                    item,
                    reason,
                    sending.records.folder / LEDGER,
                )
                refused = RUN if isinstance(error, RunDeletedError) else item
                return replace(ledger, refused={**ledger.refused, refused: reason})


@dataclass(frozen=True)
class _Sending:
    """A run on its way to a store."""

    records: RunRecords
    run: RunRecord
    store: MlflowStore

    def begin(self, ledger: Ledger) -> Ledger:
        """Find or make the run in MLflow, and let it run again if it goes on."""
        found = self._find_run()
        if found is None and ledger.sent:
            log.warning(
                "%s: MLflow has lost what was logged before; was it deleted? All is sent anew",
                self.run.new.name,
            )
            ledger = replace(ledger, sent={})
        if not ledger.sent and self.run.new.sweep is not None:
            self._delete_earlier_attempt()
        run_id = self._create_run() if found is None else str(found.info.run_id)
        if not ledger.sent:
            self._send_settings(run_id)
        if found is not None and self.run.end is None and found.info.status != "RUNNING":
            self._set_end_tags(found, None)
            self.store.client.update_run(run_id, status="RUNNING")
        self.store.run_ids[self.run.uid] = run_id
        return ledger

    def send(self, item: str) -> None:
        """Send an item of `missing` other than the run itself."""
        kind, _, name = item.partition(" ")
        if kind == "epoch":
            self._send_epoch(int(name))
        elif kind == "file":
            self._send_file(name)
        elif kind == "tag":
            key, value = safe_key(name), self.run.tags[name][:MAX_TAG]
            self.store.client.set_tag(self._run_id, key, value)
        elif kind == STEPS:
            self._log_metrics(_step_metrics(self.records.unfinished(self.run.uid)))
        elif kind == SETTINGS:
            self._send_texts(self._run_id)
        else:
            self._send_end()

    @property
    def _run_id(self) -> str:
        """MLflow's id of the run. Raises RunDeletedError."""
        if self.run.uid not in self.store.run_ids:
            found = self._find_run()
            if found is None:
                raise RunDeletedError("MLflow has no such run any more; was it deleted?")
            self.store.run_ids[self.run.uid] = str(found.info.run_id)
        return self.store.run_ids[self.run.uid]

    def _find_run(self) -> MlflowRun | None:
        """The run in MLflow, if there; a second one, made by a late request, is deleted.

        A server that hung answers late to what was given up meanwhile, and so may make it twice.
        """
        runs = self._search_runs({UID_TAG: self.run.uid})
        runs.sort(key=lambda run: len(run.data.metrics) + len(run.data.params), reverse=True)
        for late in runs[1:]:
            self.store.client.delete_run(late.info.run_id)
        return runs[0] if runs else None

    def _search_runs(self, tags: Mapping[str, str]) -> list[MlflowRun]:
        return search_runs(self.store.client, self.store.experiment_id, tagged(tags))

    def _create_run(self) -> str:
        new = self.run.new
        tags = {safe_key(key): value[:MAX_TAG] for key, value in new.tags.items()}
        created = self.store.client.create_run(
            self.store.experiment_id,
            start_time=self.run.begun,
            run_name=new.name,
            tags={**SOURCE_TAGS, **tags, **self._run_tags, **self._own_tags},
        )
        return str(created.info.run_id)

    @property
    def _run_tags(self) -> dict[str, str]:
        return {SWEEP_TAG: self.run.new.sweep_or_name, RUN_TAG: self.run.new.name}

    @property
    def _own_tags(self) -> dict[str, str]:
        return {UID_TAG: self.run.uid, FOLDER_TAG: str(self.records.output_dir.absolute())}

    def _send_settings(self, run_id: str) -> None:
        """Params, data set and texts."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        new, client = self.run.new, self.store.client
        params = [Param(safe_key(key), _cut(str(value))) for key, value in new.params.items()]
        client.log_batch(run_id, params=params)
        dataset = Dataset(
            name=new.image_dir.name or "images",
            digest=new.dataset_digest[:DIGEST],
            source_type="local",
            source=json.dumps({"uri": str(new.image_dir)}),
            profile=json.dumps({"digest": new.dataset_digest}),
        )
        use = InputTag("mlflow.data.context", "training")
        client.log_inputs(run_id, [DatasetInput(dataset, tags=[use])])
        self._send_texts(run_id)

    def _send_texts(self, run_id: str) -> None:
        """The config and its overrides; others take their place. MLflow lets no param change."""
        new = self.run.new
        overrides = json.dumps(list(new.overrides), ensure_ascii=False, indent=1)
        texts = {
            "config.yaml": new.config_yaml,
            "overrides.yaml": f"{overrides}\n",  # JSON is YAML, and spares rules for quoting
        }
        with tempfile.TemporaryDirectory() as name:
            for file, text in texts.items():
                (Path(name) / file).write_text(text, encoding="utf-8")
            self.store.client.log_artifacts(run_id, name)

    def _delete_earlier_attempt(self) -> None:
        """Delete what was begun before in this folder; another's run may have the same names."""
        earlier = {
            found.info.run_id
            for found in self._search_runs(self._run_tags)
            if found.data.tags.get(FOLDER_TAG) == self._own_tags[FOLDER_TAG]
            and found.data.tags.get(UID_TAG) != self.run.uid
        }
        if not earlier:
            return
        client, experiment_id = self.store.client, self.store.experiment_id
        for model in search_models(client, experiment_id, tagged(self._run_tags)):
            if model.source_run_id in earlier:
                client.delete_logged_model(model.model_id)
        for run_id in earlier:  # last, for by them the models are found
            client.delete_run(run_id)

    def _send_epoch(self, number: int) -> None:
        record = self.records.epoch(number)
        if record.uid != self.run.uid:
            raise DamagedRecordError(f"the record of epoch {number} is another run's")
        self._send_pictures(record)
        steps = _step_metrics(record.steps)
        if record.checkpoint is None:
            self._log_metrics([*steps, *_metrics(number, record.time, record.scores)])
        else:
            self._send_checkpoint(record, record.checkpoint, steps)

    def _send_checkpoint(
        self, record: EpochRecord, checkpoint: CheckpointRecord, steps: Sequence[Metric]
    ) -> None:
        """Make the checkpoint's model, with its file and scores, unless that was done before."""
        from mlflow.entities import LoggedModelOutput

        client = self.store.client
        found = self._models(checkpoint.name)
        model_id = found[0].model_id if found else self._create_model(record.epoch, checkpoint)
        if not found or model_id not in _outputs(client.get_run(self._run_id)):
            client.log_outputs(self._run_id, [LoggedModelOutput(model_id, record.epoch)])
        if self.run.upload:
            self._upload(checkpoint, model_id)
        scores = _metrics(record.epoch, record.time, record.scores, model_id)
        self._log_metrics([*steps, *scores, *_metrics(record.epoch, record.time, record.best)])
        # last, so that a model that is READY always has its file and scores
        client.finalize_logged_model(model_id, "READY")
        for late in found[1:]:
            client.delete_logged_model(late.model_id)

    def _create_model(self, epoch: int, checkpoint: CheckpointRecord) -> str:
        new = self.run.new
        tags = {
            **self._run_tags,
            CHECKPOINT_TAG: checkpoint.name,
            EPOCH_TAG: str(epoch),
            PATH_TAG: str(self._own(checkpoint.file)),
            **({SETTING_TAG: new.setting, SEED_TAG: str(new.seed)} if new.setting else {}),
            **({HASH_TAG: checkpoint.hash} if checkpoint.hash else {}),
        }
        terms = {name: [round(x, 7) for x in of] for name, of in checkpoint.terms.items()}
        text = json.dumps(terms)
        if len(text) <= MAX_TAG:  # without them, pick falls back to the score's own interval
            tags[TERMS_TAG] = text
        created = self.store.client.create_logged_model(
            self.store.experiment_id,
            name=re.sub(r"""[/:.%"']""", "_", checkpoint.name),  # what MLflow refuses in a name
            source_run_id=self._run_id,
            tags=tags,
            params={"epoch": str(epoch), "step": str(checkpoint.step)},
            model_type="adapter",
        )
        return str(created.model_id)

    def _models(self, checkpoint: str | None = None) -> list[LoggedModel]:
        """The run's models, or those of one checkpoint; a model that is linked comes first."""
        where = f"source_run_id = {quoted(self._run_id)}"
        if checkpoint is not None:
            where += f" AND {tagged({CHECKPOINT_TAG: checkpoint})}"
        found = search_models(self.store.client, self.store.experiment_id, where)
        if len(found) < 2:
            return found
        linked = _outputs(self.store.client.get_run(self._run_id))
        return sorted(found, key=lambda one: (one.model_id not in linked, one.creation_timestamp))

    def _upload(self, checkpoint: CheckpointRecord, model_id: str) -> None:
        path = self._own(checkpoint.file)
        if not path.is_file():
            log.warning("%s is gone, so MLflow gets no copy of it", path)
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / path.name).symlink_to(path)
            self.store.client.log_model_artifacts(model_id, folder)

    def _send_pictures(self, record: EpochRecord) -> None:
        if not record.pictures:
            return
        with tempfile.TemporaryDirectory() as folder:
            for key, file in record.pictures.items():
                path, name = self._existing(file), _picture_name(record, key)
                (Path(folder) / f"{name}.png").symlink_to(path)
                _write_preview(path, Path(folder) / f"{name}+compressed.webp")
            self.store.client.log_artifacts(self._run_id, folder, "images")

    def _send_file(self, name: str) -> None:
        path = self._existing(Path(name))
        self.store.client.log_artifact(self._run_id, str(path), self.run.files[name])

    def _existing(self, file: Path) -> Path:
        path = self._own(file)
        if not path.is_file():
            raise ValueError(f"{path} is gone, so it can't be logged")
        return path

    def _own(self, file: Path) -> Path:
        """A file that a record names, with all links followed. Raises ForeignFileError.

        The record may be a stranger's, so that it names files of this machine: what lies neither
        in the run's folder nor with the data sets is not read.
        """
        folder = self.records.output_dir
        with suppress(ForeignFileError):
            return inside(self.store.datasets, folder / file)
        return inside(folder, file)

    def _send_end(self) -> None:
        assert self.run.end is not None
        self._find_run()
        self._delete_late_models()
        self._set_end_tags(self.store.client.get_run(self._run_id), self.run.end)
        self.store.client.set_terminated(
            self._run_id, self.run.end.status, end_time=self.run.end.time
        )

    def _delete_late_models(self) -> None:
        """Delete models that exist twice, see `_find_run`."""
        seen: set[str] = set()
        for model in self._models():
            name = model.tags.get(CHECKPOINT_TAG, model.model_id)
            if name in seen:
                self.store.client.delete_logged_model(model.model_id)
            seen.add(name)

    def _set_end_tags(self, found: MlflowRun, end: RunEnd | None) -> None:
        """Say why the run ended; what was said of an earlier end goes."""
        reason, suspended = (end.reason, end.suspended) if end else (None, None)
        note = markdown(reason) if reason else None  # MLflow shows a note as Markdown
        for tag, value in ((REASON_TAG, reason), (NOTE_TAG, note), (SUSPENDED_TAG, suspended)):
            if value:
                self.store.client.set_tag(found.info.run_id, tag, value[:MAX_TAG])
            elif tag in found.data.tags:
                self.store.client.delete_tag(found.info.run_id, tag)

    def _log_metrics(self, metrics: Sequence[Metric]) -> None:
        self.store.client.log_batch(self._run_id, metrics=metrics)


def _cut(value: str) -> str:
    return value if len(value) <= MAX_PARAM else f"{value[: MAX_PARAM - 1]}…"


def _outputs(run: MlflowRun) -> set[str]:
    return {one.model_id for one in run.outputs.model_outputs} if run.outputs else set()


def _step_metrics(steps: Sequence[StepMetrics]) -> list[Metric]:
    return [metric for one in steps for metric in _metrics(one.step, one.time, one.metrics)]


def _metrics(
    step: int, time: int, values: Mapping[str, float], model_id: str | None = None
) -> list[Metric]:
    """MLflow's metrics, linked to a model if one is given and the value is finite."""
    from mlflow.entities import Metric

    return [
        # MLflow makes inf 1.8e308, which ruins a chart, and a model's NaN 0, which would win
        Metric(safe_key(key), value, time, step, model_id=model_id)
        if math.isfinite(value)
        else Metric(safe_key(key), math.nan, time, step)
        for key, value in values.items()
    ]


def _picture_name(record: EpochRecord, key: str) -> str:
    """The name that `MlflowClient.log_image(key=, step=)` gives, the same at each call."""
    safe = re.sub(r"[^a-zA-Z0-9_\-.~ ]", "_", f"samples~{key}".replace("/", "~"))
    name = f"{safe[:MAX_PICTURE_KEY]}+step+{record.epoch}"
    unique = uuid.uuid5(uuid.UUID(record.uid), name)
    return f"{name}+timestamp+{record.time}+{unique}"


def _write_preview(picture: Path, target: Path) -> None:
    """What MLflow's pages show, at its natural size: so small pictures are enlarged."""
    from PIL import Image

    with Image.open(picture) as image:
        factor = ENLARGED // max(image.size)
        if factor > 1:
            size = (image.width * factor, image.height * factor)
            preview = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
        else:
            preview = image.copy()
            preview.thumbnail((PREVIEW, PREVIEW))
    preview.save(target, method=0)
