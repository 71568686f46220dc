"""What a run leaves in MLflow, read back through MLflow's own client."""

from __future__ import annotations

import base64
import json
import math
import multiprocessing
import re
import socket
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from logged import SETTINGS as ANY_STORE
from logged import run_id
from lorasweep import tracking
from lorasweep.core.settings import SettingsError
from lorasweep.lora_files import checkpoint as lora_checkpoint
from lorasweep.lora_files.checkpoint import Checkpoint
from lorasweep.tracking import (
    NewRun,
    Tracker,
    TrackingError,
    mlflow_page,
    read_candidates,
    ui_server,
)
from lorasweep.tracking.store import sqlite_path

SETTINGS = replace(ANY_STORE, upload="none")
SCORES = {"val/loss_rel": 0.8, "val/prior_drift": 0.1}


def new_run(root: Path, name: str, sweep: str | None = "grid") -> NewRun:
    return NewRun(
        name=name,
        sweep=sweep,
        output_dir=root / name,
        params={"adapter.rank": 4},
        config_yaml="adapter:\n  rank: 4\n",
        overrides=["adapter.rank=4", "name='a b'"],
        image_dir=root / "icons",
        dataset_digest="ab" * 32,
    )


def checkpoint(root: Path, run: str, epoch: int) -> Checkpoint:
    path = root / run / f"{run}-{epoch:06d}.safetensors"
    lora_checkpoint.write(path, {"lora_unet_x.alpha": torch.ones(())}, {})
    return Checkpoint(path=path, run=run, epoch=epoch, step=epoch * 2)


def saved(images: Sequence[Image.Image], folder: Path) -> list[Path]:
    paths = [folder / f"{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return paths


def log_small_run(tracker: Tracker, root: Path, name: str) -> None:
    """Base and two epochs of two steps each, with two pictures."""
    log = tracker.open_run(new_run(root, name))
    drawn = [Image.new("RGB", (64, 64), "red"), Image.new("L", (8, 8))]
    pictures = dict(zip(("0 a rocket, red", "1 a/b"), saved(drawn, log.output_dir), strict=True))
    log.log_base(SCORES, pictures)
    for epoch in (1, 2):
        for step in (epoch * 2 - 1, epoch * 2):
            log.log_step(step, {"train/loss": 1 / step, "train/lr_unet": 1e-4})
        scores = {**SCORES, "val/loss_rel": 0.8 / epoch}
        log.log_epoch(checkpoint(root, name, epoch), scores, pictures)
    sheet = log.output_dir / "contact_sheet.png"
    Image.new("RGB", (9, 9)).save(sheet)
    log.log_file(sheet)
    log.finish("FINISHED")


@dataclass(frozen=True)
class Store:
    root: Path
    uri: str
    client: MlflowClient
    run_id: str

    @property
    def run(self) -> Run:
        return self.client.get_run(self.run_id)

    def artifacts(self, folder: str | None = None, run_id: str | None = None) -> list[str]:
        found = self.client.list_artifacts(run_id or self.run_id, folder)
        return [file.path for file in found]

    def text(self, name: str) -> str:
        return Path(self.client.download_artifacts(self.run_id, name)).read_text()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("tracking")
    with Tracker(SETTINGS, root) as tracker:
        log_small_run(tracker, root, "small")
    uri = SETTINGS.resolve(root)
    return Store(root, uri, MlflowClient(uri), run_id(root, "small"))


def test_a_run_carries_its_settings_tags_and_data_set(store: Store) -> None:
    run = store.run
    dataset = run.inputs.dataset_inputs[0].dataset
    assert run.info.status == "FINISHED"
    assert run.data.params == {"adapter.rank": "4"}
    assert (run.data.tags["lorasweep.sweep"], run.data.tags["lorasweep.run"]) == ("grid", "small")
    assert (dataset.name, dataset.digest) == ("icons", "ab" * 8)
    assert json.loads(dataset.source) == {"uri": str(store.root / "icons")}
    assert store.text("config.yaml") == "adapter:\n  rank: 4\n"
    assert json.loads(store.text("overrides.yaml")) == ["adapter.rank=4", "name='a b'"]
    assert "contact_sheet.png" in store.artifacts()


def test_a_run_of_a_sweep_is_flat(store: Store) -> None:
    assert "mlflow.parentRunId" not in store.run.data.tags


def test_curves_count_optimizer_steps_and_scores_count_epochs(store: Store) -> None:
    loss = store.client.get_metric_history(store.run_id, "train/loss")
    score = store.client.get_metric_history(store.run_id, "val/loss_rel")
    assert sorted((one.step, one.value) for one in loss) == [
        (step, 1 / step) for step in (1, 2, 3, 4)
    ]
    assert sorted((one.step, one.value) for one in score) == [(0, 0.8), (1, 0.8), (2, 0.4)]


def test_samples_bear_the_names_that_mlflows_own_log_image_gives(store: Store) -> None:
    other = store.client.create_run(store.run.info.experiment_id).info.run_id
    for epoch in (0, 1, 2):
        for key in ("samples/0 a rocket_ red", "samples/1 a/b"):
            store.client.log_image(other, Image.new("RGB", (8, 8)), key=key, step=epoch)

    def anonymous(names: Sequence[str]) -> list[str]:
        unique = r"timestamp\+\d+\+[0-9a-f-]{36}"
        return sorted(re.sub(unique, "timestamp+N+UUID", name) for name in names)

    ours, theirs = store.artifacts("images"), store.artifacts("images", other)
    assert anonymous(ours) == anonymous(theirs)
    assert store.run.data.tags["mlflow.loggedImages"].lower() == "true"
    red = next(name for name in ours if "rocket" in name and name.endswith(".png"))
    with Image.open(store.client.download_artifacts(store.run_id, red)) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_each_checkpoint_is_a_ready_model_with_its_scores_and_path(store: Store) -> None:
    first, second = tracking.candidates(store.uri, "e", sweep="grid")
    model = store.client.get_logged_model(second.model_id)
    assert (first.name, second.name) == ("small-e001", "small-e002")
    assert (second.run, second.epoch, second.sweep) == ("small", 2, "grid")
    assert second.path == store.root / "small" / "small-000002.safetensors"
    assert second.scores == {"val/loss_rel": 0.4, "val/prior_drift": 0.1}
    assert (model.name, str(model.status)) == ("small-e002", "READY")
    assert model.source_run_id == store.run_id
    assert {output.model_id for output in store.run.outputs.model_outputs} == {
        first.model_id,
        second.model_id,
    }
    assert store.client.list_logged_model_artifacts(second.model_id) == []  # upload: none


def test_upload_all_stores_each_file_with_its_model(store: Store) -> None:
    with Tracker(replace(SETTINGS, upload="all"), store.root) as tracker:
        log = tracker.open_run(new_run(store.root, "uploaded", "other"))
        written = checkpoint(store.root, "uploaded", 1)
        log.log_epoch(written, SCORES, {})
        log.finish("FINISHED")
    (found,) = tracking.candidates(store.uri, "e", sweep="other")
    content = written.path.read_bytes()
    written.path.unlink()
    assert tracking.read_checkpoint(store.uri, found, store.root) == content


def test_a_score_that_is_not_finite_is_not_a_candidates_score(store: Store) -> None:
    with Tracker(SETTINGS, store.root) as tracker:
        log = tracker.open_run(new_run(store.root, "diverged", "nan"))
        scores = {"val/loss_rel": math.nan, "val/loss": math.inf, "val/gap": 0.5}
        log.log_epoch(checkpoint(store.root, "diverged", 1), scores, {})
        log.finish("FAILED", "the loss of step 3 is not finite")
    (found,) = tracking.candidates(store.uri, "e", run="diverged")
    run = store.client.get_run(found.run_id)
    assert found.scores == {"val/gap": 0.5}
    assert math.isnan(run.data.metrics["val/loss_rel"])
    assert (run.info.status, run.data.tags["mlflow.note.content"]) == (
        "FAILED",
        "the loss of step 3 is not finite",
    )


def test_settings_that_mlflow_would_refuse_are_made_to_fit(store: Store) -> None:
    params = {"a[0]=b": 1, "long": "x" * 9000, **{f"p{number}": number for number in range(250)}}
    with Tracker(SETTINGS, store.root) as tracker:
        new = replace(new_run(store.root, "odd 'name'", None), params=params)
        log = tracker.open_run(new)
        log.finish("FINISHED")
    logged = store.client.get_run(run_id(store.root, log.output_dir.name)).data.params
    assert logged["a_0__b"] == "1"
    assert len(logged["long"]) == 6000
    assert logged["long"].endswith("…")
    assert len(logged) == 252
    assert tracking.candidates(store.uri, "e", sweep="odd 'name'") == []


def test_sweeps_are_listed_once_newest_first_and_single_runs_by_their_name(store: Store) -> None:
    with Tracker(SETTINGS, store.root) as tracker:
        for name, sweep in (("x1", "x"), ("x2", "x"), ("single", None)):
            tracker.open_run(new_run(store.root, name, sweep)).finish("FINISHED")
    names = read_candidates.sweeps(store.uri, "e")
    assert names[:2] == ["single", "x"]
    assert names[-1] == "grid"
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no memory"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_an_exception_ends_open_runs_with_its_reason_and_keeps_what_was_logged(
    store: Store, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)), Tracker(SETTINGS, store.root) as tracker:
        log = tracker.open_run(new_run(store.root, status))
        log.log_step(1, {"train/loss": 0.25})
        raise error
    (run,) = store.client.search_runs(["1"], f"tags.`lorasweep.run` = '{status}'")
    assert run.info.status == status
    assert run.data.metrics == {"train/loss": 0.25}
    assert str(error) in run.data.tags["lorasweep.reason"]


def test_what_mlflow_refuses_is_said_and_kept_and_the_rest_goes_on(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with Tracker(SETTINGS, store.root) as tracker:
        log = tracker.open_run(new_run(store.root, "unlucky"))
        log.log_file(store.root / "unlucky" / "missing.txt")
        log.tag("after", "it")
        log.finish("FINISHED")
    run = store.client.get_run(run_id(store.root, log.output_dir.name))
    ledger = store.root / "unlucky" / ".tracking" / "published.json"
    (refused,) = json.loads(ledger.read_text())["refused"].values()
    assert (run.info.status, run.data.tags["after"]) == ("FINISHED", "it")
    assert "missing.txt is gone" in refused
    assert refused in caplog.text
    assert str(ledger) in caplog.text


def test_four_processes_may_open_a_fresh_store_at_once(tmp_path: Path) -> None:
    forked = multiprocessing.get_context("fork")  # each has MLflow loaded: they begin as one
    processes = [
        forked.Process(target=_log_one_run, args=(tmp_path, f"run{number}")) for number in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    found = tracking.candidates(SETTINGS.resolve(tmp_path), "e")
    assert sorted(one.name for one in found) == sorted(
        f"run{number}-e{epoch:03d}" for number in range(4) for epoch in (1, 2)
    )


def _log_one_run(root: Path, name: str) -> None:
    with Tracker(SETTINGS, root) as tracker:
        log_small_run(tracker, root, name)


def test_the_store_lies_under_output_root_wherever_the_process_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert SETTINGS.resolve(Path("out")) == f"sqlite:///{tmp_path}/out/mlflow.db"
    assert SETTINGS.artifacts(Path("out")) == tmp_path / "out" / "mlartifacts"
    relative = replace(SETTINGS, uri="sqlite:///a/b.db")
    assert relative.resolve(Path("out")) == f"sqlite:///{tmp_path}/a/b.db"
    server = replace(SETTINGS, uri="http://host:5000")
    assert (server.resolve(Path("out")), server.artifacts(Path("out"))) == (
        "http://host:5000",
        None,
    )


@pytest.mark.parametrize("uri", ["./mlruns", "/data/mlruns", "file:///data/mlruns"])
def test_a_file_store_is_refused_in_one_line_with_the_remedy(uri: str) -> None:
    with pytest.raises(ValueError, match=r"tracking.uri=.*sqlite:///") as error:
        replace(SETTINGS, uri=uri)
    assert "\n" not in str(error.value)


def test_a_server_that_is_down_is_one_line_without_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = replace(SETTINGS, uri="http://me:secret@127.0.0.1:1")
    with pytest.raises(TrackingError, match=r"tracking\.uri=http") as error:
        Tracker(settings, tmp_path).ready(tmp_path / "a", None)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_reading_where_nothing_was_tracked_says_so_and_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="train first"):
        read_candidates.sweeps(SETTINGS.resolve(tmp_path), "e")
    assert list(tmp_path.iterdir()) == []


def test_the_opened_page_shows_scores_first_then_all_prompts_in_one_table(store: Store) -> None:
    address = mlflow_page.experiment_page(store.uri, "e")
    (tag,) = store.client.get_experiment("1").tags.items()
    view = view_of(tag[1])
    charts = view["compareRunCharts"]
    (pictures,) = [chart for chart in charts if chart["type"] == "IMAGE"]
    assert tag[0] == "mlflow.sharedViewState.lorasweep"
    assert address.endswith("viewStateShareKey=lorasweep")
    assert charts[0]["metricKey"] == "val/loss_rel"
    assert {"samples/0 a rocket_ red", "samples/1 a/b"} <= set(pictures["imageKeys"])


def view_of(tag: str) -> dict[str, Any]:
    view = json.loads(zlib.decompress(base64.b64decode(tag.removeprefix("deflate;"))))
    assert isinstance(view, dict)
    return view


def test_a_page_may_show_one_sweep_its_best_runs_first(store: Store) -> None:
    what = mlflow_page.Shown(sweep="grid", by="val/loss_rel")
    address = mlflow_page.experiment_page(store.uri, "e", what=what)
    assert "searchFilter" not in address  # in the address it would hide the saved view
    view = view_of(store.client.get_experiment("1").tags["mlflow.sharedViewState.lorasweep"])
    assert view["orderByAsc"] is True
    order = [f"{view['orderByKey']} ASC"]
    found = store.client.search_runs(["1"], view["searchFilter"], order_by=order)  # as MLflow's
    assert [run.data.tags["lorasweep.sweep"] for run in found] == ["grid"] * len(found)
    assert found
    with pytest.raises(TrackingError, match=r"no sweep gird; there are: .*grid"):
        mlflow_page.experiment_page(store.uri, "e", what=mlflow_page.Shown(sweep="gird"))


def test_a_run_carries_its_best_so_far_so_that_tables_sort_by_it(tmp_path: Path) -> None:
    by = "val/loss_rel"
    with Tracker(SETTINGS, tmp_path) as tracker:
        for name, sign in (("small", 1), ("large", -1)):
            log = tracker.open_run(replace(new_run(tmp_path, name), pick_by=by, pick_sign=sign))
            log.log_base({by: 0.0 if sign == 1 else 9.0}, {})  # no checkpoint: it can't be picked
            for epoch, score in enumerate([math.nan, 0.7, 0.4, 0.5, math.nan], start=1):
                log.log_epoch(checkpoint(tmp_path, name, epoch), {by: score}, {})
                if (name, epoch) == ("small", 3):  # it goes on in another process
                    log.suspend("killed")
                    break
    with Tracker(SETTINGS, tmp_path) as tracker:
        log = tracker.open_run(new_run(tmp_path, "small"), goes_on=True)
        for epoch, score in ((4, 0.5), (5, 0.4)):
            log.log_epoch(checkpoint(tmp_path, "small", epoch), {by: score}, {})
    client = MlflowClient(SETTINGS.resolve(tmp_path))
    found = {run.info.run_name: run for run in client.search_runs(["1"])}
    assert [found["small"].data.metrics[f"best/{key}"] for key in (by, "epoch")] == [0.4, 3]
    assert [found["large"].data.metrics[f"best/{key}"] for key in (by, "epoch")] == [0.7, 2]
    curve = client.get_metric_history(found["small"].info.run_id, f"best/{by}")
    assert [(one.step, one.value) for one in curve] == [(2, 0.7), (3, 0.4), (4, 0.4), (5, 0.4)]
    mlflow_page.experiment_page(SETTINGS.resolve(tmp_path), "e")
    (tag,) = client.get_experiment("1").tags.values()
    columns, charts = (view_of(tag)[key] for key in ("selectedColumns", "compareRunCharts"))
    assert [f"metrics.`best/{by}`", "metrics.`best/epoch`"] == columns[:2]
    assert not [one for one in charts if one.get("metricKey", "").startswith("best/")]
    assert all(
        not key.startswith("best/")
        for one in tracking.candidates(SETTINGS.resolve(tmp_path), "e")
        for key in one.scores
    )


def test_a_port_in_use_is_refused_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SettingsError, match=f"port {port} is in use") as error:
            ui_server.serve(SETTINGS.resolve(tmp_path), "e", tmp_path, port)
    assert "\n" not in str(error.value)


def test_importing_the_module_imports_neither_mlflow_nor_torch() -> None:
    code = "import sys, lorasweep.tracking as t; print({'mlflow', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["a%20b", 'it\'s "a"? 5%#'])
def test_a_folder_may_be_called_as_it_likes(name: str, tmp_path: Path) -> None:
    """SQLAlchemy reads `%20` and `?` in a URI as its own."""
    root = tmp_path / name
    with Tracker(SETTINGS, root) as tracker:
        tracker.open_run(new_run(root, "small", "grid")).finish("FINISHED")
    uri = SETTINGS.resolve(root)
    assert read_candidates.sweeps(uri, "e") == ["grid"]
    assert sqlite_path(uri) == root / "mlflow.db"
    assert (root / "mlflow.db").is_file()
    assert len(list((root / "mlartifacts").rglob("config.yaml"))) == 1


def test_the_options_of_a_sqlite_address_stay(tmp_path: Path) -> None:
    given = replace(SETTINGS, uri=f"sqlite:///{tmp_path}/a%20b.db?timeout=5")
    assert given.resolve(tmp_path) == f"sqlite:///{tmp_path}/a b.db?timeout=5"
