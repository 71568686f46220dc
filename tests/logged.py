"""A small run as a trainer logs it, and all that MLflow then has, as plain values to compare."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from PIL import Image

from lorasweep.lora_files.checkpoint import Checkpoint
from lorasweep.tracking import NewRun, Tracking
from lorasweep.tracking.store import quoted
from lorasweep.tracking.tracker import RunLog

SETTINGS = Tracking(
    uri=None,
    experiment="e",
    registered_model="m",
    upload="all",
    offline=False,
    max_wait_seconds=20,
)
EPOCHS, STEPS = 3, 2
OURS = ("lorasweep.sweep", "lorasweep.run", "lorasweep.reason", "lorasweep.suspended", "kept")


def new_run(output_root: Path, name: str = "a", sweep: str | None = "grid") -> NewRun:
    return NewRun(
        name=name,
        sweep=sweep,
        output_dir=output_root / name,
        params={"adapter.rank": 4, "seed": 1},
        config_yaml="adapter:\n  rank: 4\n",
        overrides=["adapter.rank=4"],
        image_dir=output_root / "icons",
        dataset_digest="ab" * 32,
        pick_by="val/loss_rel",
    )


def log_epochs(log: RunLog, folder: Path, first: int = 0, last: int = EPOCHS) -> None:
    """The bare base (0) and epochs, each with its steps, scores, a picture and a file."""
    for epoch in range(first, last + 1):
        scores = {"val/loss_rel": 1 / (epoch + 1), "val/odd": float("nan")}
        pictures = {"0 a rocket": picture(folder / "samples" / f"{epoch}.png", (epoch, 0, 0))}
        if epoch == 0:
            log.log_base(scores, pictures)
            continue
        for step in range((epoch - 1) * STEPS + 1, epoch * STEPS + 1):
            log.log_step(step, {"train/loss": 1 / step, "train/lr": 1e-4})
        path = folder / f"a-{epoch:06d}.safetensors"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"weights %d" % epoch)
        checkpoint = Checkpoint(path=path, run="a", epoch=epoch, step=epoch * STEPS)
        log.log_epoch(checkpoint, scores, pictures, {"val/loss_rel": [0.5, 0.25 * epoch]})


def picture(path: Path, color: tuple[int, int, int]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (8, 8), color).save(path)
    return path


def run_id(output_root: Path, name: str = "a", uri: str | None = None) -> str:
    """MLflow's id of a run, once it is begun there."""
    client = MlflowClient(uri or SETTINGS.resolve(output_root))
    until = time.monotonic() + 60
    while time.monotonic() < until:
        experiment = client.get_experiment_by_name("e")
        where = f"tags.`lorasweep.run` = {quoted(name)}"
        found = client.search_runs([experiment.experiment_id], where) if experiment else []
        if found and client.list_artifacts(found[0].info.run_id):
            return str(found[0].info.run_id)
        time.sleep(0.05)
    raise AssertionError(f"MLflow never had {name}")


def finish(log: RunLog) -> None:
    log.log_file(picture(log.output_dir / "contact_sheet.png", (0, 0, 0)), "sheets")
    log.tag("kept", "yes")
    log.finish("FINISHED")


def snapshot(uri: str, experiment: str = "e") -> list[dict[str, Any]]:
    """Every run, each value in the order of its steps; what differs from run to run is left out."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id])
    return sorted((_run(client, run) for run in runs), key=lambda one: one["name"])


def _run(client: MlflowClient, run: Any) -> dict[str, Any]:
    run_id = run.info.run_id
    models = client.search_logged_models([run.info.experiment_id])
    mine = [model for model in models if model.source_run_id == run_id]
    outputs = run.outputs.model_outputs if run.outputs else []
    assert sorted(one.model_id for one in outputs) == sorted(one.model_id for one in mine)
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "params": run.data.params,
        "tags": {key: value for key, value in run.data.tags.items() if key in OURS},
        "inputs": [one.dataset.digest for one in run.inputs.dataset_inputs],
        "curves": {
            key: sorted((m.step, repr(m.value)) for m in client.get_metric_history(run_id, key))
            for key in run.data.metrics
        },
        "artifacts": sorted(_anonymous(path) for path in _files(client, run_id, None)),
        "models": sorted((_model(client, model) for model in mine), key=str),
    }


def _model(client: MlflowClient, model: Any) -> dict[str, Any]:
    return {
        "name": model.name,
        "status": str(model.status),
        "params": model.params,
        "tags": {k: v for k, v in model.tags.items() if k not in ("lorasweep.path",)},
        "scores": sorted((m.key, m.step, m.value) for m in model.metrics or []),
        "files": [file.path for file in client.list_logged_model_artifacts(model.model_id)],
    }


def _files(client: MlflowClient, run_id: str, folder: str | None) -> list[str]:
    found = client.list_artifacts(run_id, folder)
    return [
        path
        for one in found
        for path in (_files(client, run_id, one.path) if one.is_dir else [one.path])
    ]


def _anonymous(path: str) -> str:
    return re.sub(r"timestamp(\+|%2B)\d+(\+|%2B)[0-9a-f-]{36}", "timestamp+N+UUID", path)
