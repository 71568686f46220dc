"""The main job, as a person runs it: a sweep from the command line, MLflow's content, the pick."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from omegaconf import OmegaConf

from command_line import done_here, exit_code, lorasweep
from conftest import FEW, SMALL
from lorasweep import tracking
from lorasweep.lora_files import checkpoint
from small_training import relative_difference

RANKS = (2, 4)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, cache_dir, forked_workers):
    """A sweep over two ranks, and a third job whose learning rate breaks it."""
    folder = tmp_path_factory.mktemp("sweep")
    result = done_here(
        "train",
        "-m",
        *SMALL,
        FEW,
        f"cache_dir={cache_dir}",
        f"adapter.rank={','.join(map(str, RANKS))}",
        "optimizer.unet_lr=1e-3,1e30",
        cwd=folder,
    )
    return folder, result


@pytest.fixture(scope="module")
def client(sweep):
    return MlflowClient(f"sqlite:///{sweep[0] / 'outputs' / 'mlflow.db'}")


@pytest.fixture(scope="module")
def runs(client):
    (experiment,) = [e for e in client.search_experiments() if e.name == "lorasweep"]
    found = client.search_runs([experiment.experiment_id])
    return {run.info.run_name: run for run in found}


def test_failed_jobs_are_reported_with_their_error_and_the_others_stand(sweep, runs):
    _, result = sweep
    assert result.returncode == 2
    assert "demo-1 failed: demo-1: loss" in result.stderr + result.stdout
    statuses = {name: run.info.status for name, run in runs.items()}
    assert statuses == {
        "demo-0": "FINISHED",
        "demo-1": "FAILED",
        "demo-2": "FINISHED",
        "demo-3": "FAILED",
    }


def test_every_job_has_hydras_folder_and_its_own_files(sweep):
    (root,) = (sweep[0] / "outputs" / "demo").iterdir()
    assert (root / "multirun.yaml").exists()
    for number, rank in ((0, 2), (2, 4)):
        folder = root / str(number)
        overrides = OmegaConf.load(folder / ".hydra" / "overrides.yaml")
        assert f"adapter.rank={rank}" in overrides
        assert OmegaConf.load(folder / ".hydra" / "config.yaml").adapter.rank == rank
        assert (folder / ".hydra" / "hydra.yaml").exists()
        for epoch in (1, 2):
            weights, _ = checkpoint.read(folder / f"demo-{number}-{epoch:06d}.safetensors")
            down = weights["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"]
            assert down.shape[0] == rank
        names = {path.name for path in (folder / "samples").iterdir()}
        assert names == {f"demo-{number}_e{epoch:06d}_00.png" for epoch in (0, 1, 2)}
        assert (folder / "contact_sheet.png").exists()


def test_mlflow_holds_settings_curves_and_scores(client, runs):
    run = runs["demo-0"]
    assert run.data.params["adapter.rank"] == "2"
    assert run.data.params["dataset.num_images"] == "4"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in losses] == list(range(1, 9))  # 4 steps x 2 epochs
    for name in ("train/lr_unet", "train/lr_text_encoder", "train/grad_norm", "train/it_per_s"):
        assert len(client.get_metric_history(run.info.run_id, name)) == 8
    for name in ("val/loss", "val/loss_rel", "val/loss_rel_lo", "val/gap", "val/prior_drift"):
        history = client.get_metric_history(run.info.run_id, name)
        assert [metric.step for metric in history] == [0, 1, 2], name
    assert client.get_metric_history(run.info.run_id, "val/loss_rel")[0].value == 1


def test_mlflow_holds_data_set_files_and_pictures(client, runs, sweep):
    run = runs["demo-2"]
    (dataset,) = [one.dataset for one in run.inputs.dataset_inputs]
    assert dataset.digest
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "overrides.yaml", "manifest.json", "contact_sheet.png"} <= names
    manifest = json.loads(
        Path(client.download_artifacts(run.info.run_id, "manifest.json", sweep[0])).read_text()
    )
    assert "rocket" not in json.dumps(manifest)
    assert "high contrast" in json.dumps(manifest)
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert len([path for path in images if path.endswith(".png")]) == 3  # base and 2 epochs


def test_runs_of_the_sweep_share_a_tag_and_stay_flat(runs):
    assert len({run.data.tags["lorasweep.sweep"] for run in runs.values()}) == 1
    assert not any("mlflow.parentRunId" in run.data.tags for run in runs.values())


def test_every_checkpoint_is_a_logged_model_with_its_scores(sweep, client, runs):
    found = tracking.candidates(f"sqlite:///{sweep[0] / 'outputs' / 'mlflow.db'}", "lorasweep")
    names = {one.name for one in found}
    assert {"demo-0-e001", "demo-0-e002", "demo-2-e001", "demo-2-e002"} <= names
    for one in found:
        assert one.path.exists()
        if one.run in ("demo-0", "demo-2"):
            history = client.get_metric_history(runs[one.run].info.run_id, "val/loss_rel")
            value = {metric.step: metric.value for metric in history}[one.epoch]
            assert one.scores["val/loss_rel"] == pytest.approx(value)


def test_pick_ranks_records_and_copies(sweep, client, monkeypatch, capsys):
    folder, _ = sweep
    monkeypatch.chdir(folder)
    assert exit_code("pick") == 0
    said = capsys.readouterr().out
    assert "demo-0" in said and "demo-2" in said
    version = client.get_model_version_by_alias("demo", "best")
    picked = folder / "outputs" / "picked"
    (copy,) = picked.rglob("*.safetensors")
    assert copy.stem in said
    assert version.tags["lorasweep.picked"] == copy.stem
    assert (copy.parent / "config.yaml").exists()
    assert (copy.parent / "contact_sheet.png").exists()
    text = (copy.parent / "README.md").read_text()
    assert all(word in text for word in ("diffusers", "kohya", "AUTOMATIC1111", "ComfyUI"))
    assert "lorasweep ui" in said

    assert exit_code("pick", "--run", "demo-2", "--epoch", "1") == 0
    assert "your own choice" in capsys.readouterr().out
    version = client.get_model_version_by_alias("demo", "best")
    assert version.tags["lorasweep.chosen_by"] == "person"
    assert list(picked.glob("*/demo-2-e001/demo-2-e001.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_hydras_own_launchers_give_the_same_results(launcher, sweep, tmp_path, cache_dir):
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    extra = ["hydra.launcher.n_jobs=1"] if launcher == "joblib" else []
    lorasweep(
        "train",
        "-m",
        *SMALL,
        FEW,
        f"cache_dir={cache_dir}",
        f"hydra/launcher={launcher}",
        *extra,
        "adapter.rank=2",
        "optimizer.unet_lr=1e-3",
        cwd=tmp_path,
    )
    (ours,) = (sweep[0] / "outputs" / "demo").glob("*/0/demo-0-000002.safetensors")
    (theirs,) = (tmp_path / "outputs" / "demo").glob("*/0/demo-0-000002.safetensors")
    packed, alone = checkpoint.read(ours)[0], checkpoint.read(theirs)[0]
    assert packed.keys() == alone.keys()
    assert relative_difference(packed, alone) < 1e-5


@pytest.mark.slow
def test_a_sweep_trains_its_batch_side_by_side_in_processes_of_joblib(tmp_path, cache_dir):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    small = [one for one in SMALL if not one.startswith("sampling.")]
    asked = [
        "study.n_trials=2",
        "study.batch_size=2",
        "adapter.rank=2",
        "sampling.every_n_epochs=0",
    ]
    side_by_side = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    places = [f"cache_dir={cache_dir}", "trainer.max_train_epochs=1"]
    command = ["sweep", "rank_lr", *small, FEW, *places, *asked, *side_by_side]
    assert "Trained 2 epochs of 2 planned" in lorasweep(*command, cwd=tmp_path).stdout
    store = f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}"
    known = [(one.run, one.epoch) for one in tracking.candidates(store, "lorasweep")]
    assert sorted(known) == [("demo-0", 1), ("demo-1", 1)]


def test_a_single_run_trains_and_is_picked(tmp_path, cache_dir, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code("train", *SMALL, FEW, f"cache_dir={cache_dir}", "adapter.rank=2") == 0
    assert exit_code("pick") == 0
    assert "demo-e00" in capsys.readouterr().out


def test_caption_writes_kohyas_folders_and_trains_nothing(tmp_path, cache_dir, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = Path(tracking.__file__).parents[1] / "embedded" / "demo_images"
    assert exit_code("caption", str(images), "experiment=demo", f"cache_dir={cache_dir}") == 0
    (folder,) = (tmp_path / "outputs" / "datasets").glob("demo_images-*")
    assert str(folder) in capsys.readouterr().out
    assert {path.name for path in (folder / "train").iterdir()} == {"1_empty", "1_wd", "1_kosmos"}
    assert not (tmp_path / "outputs" / "demo").exists()


def test_pick_without_anything_trained_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code("pick") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
