"""The main job of one pack: its reports, its folders, and what it does when something breaks."""

import json
import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from mlflow import MlflowClient

from conftest import FEW
from lorasweep import tracking
from lorasweep.core.settings import SettingsError
from lorasweep.judging.pick_rule import rank
from lorasweep.runs import session as run_module
from lorasweep.runs.prepare import encoded_images, new_run, write_folders
from lorasweep.runs.run_folder import delete_if_nothing_began
from lorasweep.runs.session import EpochReport, Failure, Finished, Session, run_pack
from lorasweep.training.native_trainer import NativeTraining
from small_training import reports

pytestmark = pytest.mark.usefixtures("shared_base")


@pytest.fixture
def make_run(make_run):
    return partial(make_run, FEW, "dataset.num_images=2")


def test_every_checkpoint_is_reported_once_with_scores(make_run):
    runs = [make_run("adapter.rank=2", f"seed={n}", number=n) for n in range(2)]
    found = reports(*runs)
    assert [(r.run, r.checkpoint.epoch) for r in found] == [
        ("demo-0", 1),
        ("demo-1", 1),
        ("demo-0", 2),
        ("demo-1", 2),
    ]
    assert all(r.checkpoint.path.exists() for r in found)
    assert found[0].scores["val/loss_rel"] != found[1].scores["val/loss_rel"]
    seconds = json.loads((runs[0].output_dir / "seconds.json").read_text())
    assert set(seconds) == {"prepare", "train", "score", "sample"}
    assert all(spent > 0 for spent in seconds.values())
    (ranked,) = by_epoch(runs[0], 2)
    assert sorted(one.seed for one in ranked.checkpoints) == ["0", "1"]
    first = ranked.file
    client = MlflowClient(runs[0].tracking.resolve(runs[0].output_root))
    metrics = client.get_run(first.run_id).data.metrics
    of_run = [one for one in found if one.run == first.run]
    best = min(of_run, key=lambda one: one.scores["val/score"])
    assert metrics["best/val/score"] == best.scores["val/score"]
    assert metrics["best/epoch"] == best.checkpoint.epoch


def by_epoch(run, epoch):
    """What `pick` would rank of an epoch."""
    store = run.tracking.resolve(run.output_root), run.tracking.experiment
    found = [one for one in tracking.candidates(*store) if one.epoch == epoch]
    return rank(found, "val/loss_rel")


def test_runs_are_of_one_setting_if_they_differ_in_nothing_but_seed_and_name(make_run):
    run = make_run()
    folder = write_folders(run)

    def setting(*overrides):
        return new_run(make_run(*overrides), folder, "{}").setting

    same = setting("seed=1", "name=other", "tracking.offline=true")
    assert setting() == same
    others = [setting(key) for key in ("adapter.rank=3", "dataset.seed=7")]
    edited = new_run(run, folder, '{"train": {}}').setting  # other captions
    assert len({same, edited, *others}) == 4


def test_a_run_whose_steps_end_within_an_epoch_is_finished_then(make_run, caplog):
    run = replace(make_run("trainer.max_train_steps=1", "sampling.every_n_epochs=0"), metrics={})
    with caplog.at_level(logging.INFO):
        _, report, end = run_pack([run])
    assert "in batches of" in caplog.text and "in all 1 steps, epochs: 1" in caplog.text
    assert any(one.startswith("captions, such as of") and "wd '" in one for one in caplog.messages)
    assert (report.checkpoint.epoch, report.checkpoint.step) == (1, 1)
    assert end == Finished(run=run.name, dropped=False)


@pytest.mark.parametrize("num_holdout", [0, 2])
def test_epochs_without_held_out_scores_are_named_without_nan(num_holdout, make_run, caplog):
    run = make_run(f"dataset.num_holdout={num_holdout}", "trainer.max_train_epochs=1")
    if num_holdout:
        run = replace(run, metrics={})
    with caplog.at_level(logging.INFO):
        (report,) = reports(run)
    assert "val/loss_rel" not in report.scores
    assert "epoch 1: demo" in caplog.messages
    assert "nan" not in caplog.text


def test_scoring_out_of_memory_goes_on_with_fewer_at_once(make_run, monkeypatch, caplog):
    from diffusers import UNet2DConditionModel

    runs = [make_run("trainer.max_train_epochs=1", f"seed={n}", number=n) for n in range(2)]
    expected = {(r.run, r.checkpoint.epoch): r.scores["val/loss_rel"] for r in reports(*runs)}
    forward = UNet2DConditionModel.forward

    def limited(self, sample, *args, **kwargs):
        if not torch.is_grad_enabled() and sample.shape[0] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory (made by the test)")
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", limited)
    # not where a sweep's jobs lie, which would be taken as they were trained
    runs = [replace(run, output_dir=run.output_dir / "limited" / "0") for run in runs]
    with caplog.at_level(logging.WARNING):
        found = {(r.run, r.checkpoint.epoch): r.scores["val/loss_rel"] for r in reports(*runs)}
    assert "fewer are scored at once" in caplog.text
    assert found == pytest.approx(expected, rel=1e-5)


def test_an_edited_caption_is_trained_on_and_logged(make_run):
    run = make_run("trainer.max_train_epochs=1")
    folder = write_folders(run) / "train" / "1_wd"
    (file, *_) = sorted(folder.glob("*.txt"))
    file.write_text("a caption of my own\n")
    (report,) = reports(run)
    used = json.loads((run.output_dir / "captions.json").read_text())
    assert "a caption of my own" in used["train"]["1_wd"].values()
    from lorasweep.lora_files.checkpoint import read_metadata

    assert "a caption of my own" in read_metadata(report.checkpoint.path)["ss_tag_frequency"]


def test_the_users_folder_is_left_as_it_was(make_run, tmp_path):
    from PIL import Image

    mine = tmp_path / "mine"
    mine.mkdir()
    for number in range(6):
        Image.new("RGB", (80, 64), (40 * number, 100, 90)).save(mine / f"{number}.png")
        (mine / f"{number}.txt").write_text(f"colour {number}")
    before = {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_nlink) for p in mine.iterdir()
    }
    output_root = tmp_path / "elsewhere"
    run = make_run(
        f"dataset.image_dir={mine}",
        f"output_root={output_root}",
        "captions=[empty,sidecar]",
        "captions.empty.repeats=1",
        "captions.sidecar.repeats=2",
        "trainer.max_train_epochs=1",
    )
    assert len(reports(run)) == 1
    after = {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_nlink) for p in mine.iterdir()
    }
    assert after == before
    (data,) = [p for p in (output_root / "datasets").iterdir() if p.is_dir()]
    assert {p.name for p in (data / "train").iterdir()} == {"1_empty", "2_sidecar"}


def test_an_arm_says_whether_its_captions_are_tags(make_run, base):
    run = make_run("dataset.num_images=2", "dataset.num_holdout=1", "dataset.shuffle_caption=true")
    images = encoded_images(base, run, write_folders(run))
    both = *images.train, *images.holdout
    found = {item.arm: item.settings.shuffle_caption for item in both}
    assert found == {"empty": False, "wd": True, "kosmos": False}


def mlflow_runs(run, query=""):
    from mlflow import MlflowClient

    client = MlflowClient(run.tracking.resolve(run.output_root))
    found = client.search_runs(["1"], query)
    return {one.info.run_name: one for one in found}, found, client


def test_one_leaves_a_pack_and_another_takes_its_place(make_run):
    runs = [make_run("adapter.rank=2", f"seed={n}", number=n) for n in range(3)]
    seen = []
    with Session(runs[0], max_pack=2) as session:
        for found in session.train(runs[:2]):
            seen.append([(type(one).__name__, one.run) for one in found])
            if seen[-1][0] == ("EpochReport", "demo-0") and len(seen) == 2:
                session.join(runs[2])
                assert session.drop("demo-1") == Finished(run="demo-1", dropped=True)
    assert seen == [
        [("Started", "demo-0"), ("Started", "demo-1")],
        [("EpochReport", "demo-0"), ("EpochReport", "demo-1")],
        [("Started", "demo-2")],
        [("EpochReport", "demo-0"), ("EpochReport", "demo-2"), ("Finished", "demo-0")],
        [("EpochReport", "demo-2"), ("Finished", "demo-2")],
    ]
    logged, every, client = mlflow_runs(runs[0])
    assert len(every) == 3
    statuses = {
        name: (one.info.status, one.data.tags.get("lorasweep.pruned"))
        for name, one in logged.items()
    }
    assert statuses == {
        "demo-0": ("FINISHED", None),
        "demo-1": ("KILLED", "true"),
        "demo-2": ("FINISHED", None),
    }
    history = client.get_metric_history(logged["demo-2"].info.run_id, "val/loss_rel")
    assert [metric.step for metric in history] == [0, 1, 2]
    assert (runs[2].output_dir / "samples" / "demo-2_e000000_00.png").exists()
    found = tracking.candidates(runs[0].tracking.resolve(runs[0].output_root), "lorasweep")
    assert sorted((one.run, one.epoch) for one in found) == [
        ("demo-0", 1),
        ("demo-0", 2),
        ("demo-1", 1),
        ("demo-2", 1),
        ("demo-2", 2),
    ]


def test_another_attempt_at_a_run_takes_the_place_of_the_broken_one(make_run):
    run = make_run("adapter.rank=2", number=0)
    with pytest.raises(RuntimeError, match="power"), Session(run) as session:
        for found in session.train([run]):
            if isinstance(found[0], EpochReport):
                raise RuntimeError("power cut (made by the test)")
    assert mlflow_runs(run)[0]["demo-0"].info.status == "FAILED"
    assert len(reports(run)) == 2
    logged, every, _ = mlflow_runs(run)
    assert [one.info.status for one in every] == ["FINISHED"]
    found = tracking.candidates(run.tracking.resolve(run.output_root), "lorasweep")
    assert [one.epoch for one in found] == [1, 2]
    assert {one.run_id for one in found} == {logged["demo-0"].info.run_id}


def test_a_dead_server_is_said_before_captions_are_made(make_run, monkeypatch):
    run = make_run("tracking.uri=http://127.0.0.1:9", "tracking.max_wait_seconds=1")
    monkeypatch.setattr(run_module, "write_folders", lambda _: pytest.fail("work was begun"))
    with pytest.raises(tracking.TrackingError, match="connection refused"):
        Session(run)
    assert not list(run.output_root.glob("datasets"))


def test_a_captioner_without_its_model_is_said_before_another_captions(make_run, monkeypatch):
    run = make_run("captions=[sidecar,wd14]", "captions.wd.model=nowhere")
    caption = "lorasweep.data.captions.caption_images.caption_images"
    monkeypatch.setattr(caption, lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(SettingsError, match=r"captions\.wd\.model=nowhere: no weights found"):
        write_folders(run)


def test_a_folder_in_which_nothing_began_is_deleted_and_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "elsewhere" / "out"
    hydras, ours = root / "x" / "1", root / "x" / "2"
    for folder in (hydras, ours):
        (folder / ".hydra").mkdir(parents=True)
        (folder / "lorasweep.log").touch()
    (ours / "picture.png").touch()
    for folder in (hydras, ours, root / "x" / "3"):
        delete_if_nothing_began(folder, root)
    assert not hydras.exists() and (ours / ".hydra").exists()
    (ours / "picture.png").unlink()
    delete_if_nothing_began(ours, root)
    assert not (tmp_path / "elsewhere").exists() and tmp_path.exists()


def test_a_run_that_cannot_start_fails_alone(make_run, monkeypatch):
    runs = [make_run("trainer.max_train_epochs=1", f"seed={n}", number=n) for n in range(2)]
    join = NativeTraining.join

    def refuse(self, run, state=None):
        if run.name == "demo-0":
            raise ValueError("demo-0 is not to be (made by the test)")
        join(self, run, state)

    monkeypatch.setattr(NativeTraining, "join", refuse)
    # on a CUDA device a step is measured first
    monkeypatch.setattr(run_module, "memory_for", lambda device, step: step())
    found = list(run_pack(runs))
    assert Failure(run="demo-0", reason="demo-0 is not to be (made by the test)") in found
    assert [type(one).__name__ for one in found if one.run == "demo-1"] == [
        "Started",
        "EpochReport",
        "Finished",
    ]
