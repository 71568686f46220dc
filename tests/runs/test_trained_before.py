"""A run of a sweep that an earlier command has trained isn't trained again."""

import json
import shutil
from types import SimpleNamespace

import pytest

from conftest import SMALL
from lorasweep.config.build_run import build_run
from lorasweep.config.compose import compose
from lorasweep.lora_files import checkpoint
from lorasweep.runs import provenance, run_folder
from lorasweep.runs.session import EpochReport, Finished, run_pack
from lorasweep.runs.trained_before import take_trained
from lorasweep.tracking import candidates
from lorasweep.tracking.records import RunRecords
from lorasweep.tracking.sync import unsent
from lorasweep.training.native_trainer import NativeTraining

pytestmark = pytest.mark.usefixtures("shared_base")

TINY = [
    *SMALL,
    "dataset.num_images=2",
    "dataset.num_holdout=1",
    "adapter.targets=[unet.*.attn2.*]",
    "optimizer.text_encoder_lr=0",
    "sampling.num_inference_steps=1",
    "metrics.validation.max_tuples=2",
    "metrics.validation.num_probe_images=1",
    "trainer.max_train_epochs=1",
]


@pytest.fixture(scope="module")
def make_job(cache_dir):
    """A job of a sweep below a folder, as Hydra places it."""

    def make(root, sweep, number, *overrides):
        cfg = compose([*TINY, f"output_root={root}", f"cache_dir={cache_dir}", *overrides])
        output_dir = root / "demo" / sweep / str(number)
        return build_run(cfg, output_dir=output_dir, sweep=f"demo-{sweep}", number=number)

    return make


@pytest.fixture(scope="module")
def trained(make_job, tmp_path_factory):
    """A folder in which a sweep of one run has ended; to copy."""
    root = tmp_path_factory.mktemp("trained")
    assert isinstance(list(run_pack([make_job(root, "old", 0)]))[-1], Finished)
    return root


@pytest.fixture
def root(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def steps(monkeypatch):
    """The steps that are trained from here on, by the runs that make them."""
    made, step = [], NativeTraining.step

    def noted(training, group):
        made.append([state.run.name for state in training.pack.states])
        return step(training, group)

    monkeypatch.setattr(NativeTraining, "step", noted)
    return made


def test_a_widened_grid_trains_only_its_new_points(root, make_job, steps, caplog):
    caplog.set_level("INFO")
    runs = [make_job(root, "new", 0, "adapter.rank=2"), make_job(root, "new", 1)]
    reports = list(run_pack(runs))
    assert "1 of 2 runs are trained already: demo-1 as demo-0 of demo-old" in caplog.messages
    assert {name for names in steps for name in names} == {"demo-0"}
    assert [one.run for one in reports if isinstance(one, Finished)] == ["demo-1", "demo-0"]
    (epoch,) = [r for r in reports if isinstance(r, EpochReport) and r.run == "demo-1"]
    old = root / "demo" / "old" / "0" / "demo-0-000001.safetensors"
    assert epoch.checkpoint.path == runs[1].output_dir / "demo-1-000001.safetensors"
    assert checkpoint.data_hash(epoch.checkpoint.path) == checkpoint.data_hash(old)
    assert unsent(root) == []
    known = {
        (one.sweep, one.run, one.epoch)
        for one in candidates(f"sqlite:///{root}/mlflow.db", "lorasweep")
    }
    assert known == {
        ("demo-old", "demo-0", 1),
        ("demo-new", "demo-0", 1),
        ("demo-new", "demo-1", 1),
    }
    assert sorted(one.name for one in runs[1].output_dir.glob("samples/*")) == [
        "demo-1_e000000_00.png",
        "demo-1_e000001_00.png",
    ]
    assert RunRecords(runs[1].output_dir).run().tags["lorasweep.trained_as"] == "demo-0 of demo-old"


def test_a_sweep_of_more_epochs_goes_on_where_the_shorter_one_has_ended(
    root, make_job, steps, tmp_path
):
    """To the bit: what it comes to is what a longer run alone comes to from the start."""
    old = root / "demo" / "old" / "0"
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    longer = "trainer.max_train_epochs=2"
    run, once = make_job(root, "new", 3, longer), make_job(tmp_path / "once", "new", 3, longer)
    reports = list(run_pack([run]))
    per_epoch = len(steps)
    assert [one.checkpoint.epoch for one in reports if isinstance(one, EpochReport)] == [1, 2]
    list(run_pack([once]))
    assert len(steps) == 3 * per_epoch
    for epoch in (1, 2):
        ours, theirs = (
            checkpoint.checkpoint_path(one.output_dir, run.name, epoch) for one in (run, once)
        )
        assert checkpoint.data_hash(ours) == checkpoint.data_hash(theirs)
        ours, theirs = (RunRecords(one.output_dir).epoch(epoch) for one in (run, once))
        assert ours.scores == theirs.scores
        assert [one.step for one in ours.steps] == [one.step for one in theirs.steps]
    assert run_folder.status_of(run) == "finished"
    assert unsent(root) == []
    assert {path: path.read_bytes() for path in before} == before  # its files are linked


@pytest.mark.parametrize(
    "change", ["seed", "images", "versions", "checkpoint", "schedule", "state", "torn", "by itself"]
)
def test_what_is_not_the_same_is_trained(change, root, make_job, monkeypatch):
    old = root / "demo" / "old" / "0"
    new = SimpleNamespace(dataset_digest=run_folder.read_record(old).data)
    words = {
        "seed": ["seed=1"],
        "schedule": ["trainer.max_train_epochs=2", "lr_scheduler=cosine"],
        "state": ["trainer.max_train_epochs=2"],
        "torn": ["trainer.max_train_epochs=2"],
    }
    if change == "images":
        record = json.loads((old / "run.json").read_text())
        (old / "run.json").write_text(json.dumps({**record, "data": "other"}))
    elif change == "versions":
        monkeypatch.setattr(provenance, "versions", lambda: {"lorasweep": "0"})
    elif change == "checkpoint":
        (old / "demo-0-000001.safetensors").unlink()
    elif change == "state":
        shutil.rmtree(old / "states")
    elif change == "torn":
        (state,) = (old / "states").iterdir()
        state.write_bytes(state.read_bytes()[:-1])
    run = make_job(root, "new", None if change == "by itself" else 0, *words.get(change, []))
    assert not take_trained(run, new, tracker=None)


def test_a_run_is_taken_if_nothing_differs(root, make_job, steps):
    (*_, last) = run_pack([make_job(root, "new", 0)])
    assert last == Finished(run="demo-0", dropped=False)
    assert steps == []
