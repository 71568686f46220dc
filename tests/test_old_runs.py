"""Runs that an earlier lorasweep was killed in go on, and its finished ones are made again.

All by the command line, as a user would: where the code lies meanwhile doesn't matter.
"""

import json
import os
import runpy
import sys

import pytest
import torch

import old_runs
from make_old_runs import TRAIN
from old_runs import AWAY, BROKEN, FINISHED, GRID, OPTIONS, SEARCH, SWEEP

EXPECTED = json.loads(old_runs.EXPECTED.read_text())
CLOSE = 1e-3  # on another machine, which rounds otherwise


pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """As the old runs had, here and in worker processes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder that the old commands were given in, as they left it."""
    old_runs.unpack(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def lorasweep(home, monkeypatch, capsys):
    """`python -m lorasweep`, in this process, which has its libraries loaded; what it says."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lorasweep", *words])
        try:
            runpy.run_module("lorasweep", run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, capsys.readouterr()
        finally:
            os.chdir(home)
        return capsys.readouterr().out

    return run


def same_machine():
    return old_runs.machine() == EXPECTED["machine"]


def checkpoints(home):
    """Those that there are; one that is written once more is another file."""
    return {path: path.stat().st_ino for path in (home / "outputs").rglob("*.safetensors")}


def assert_went_on(home, before, *names):
    """Nothing was trained anew, and the end is the one that the old lorasweep came to."""
    after = checkpoints(home)
    assert {path: after.get(path) for path in before} == before
    assert len(after) > len(before)
    found = old_runs.outcome(home)
    for name in names:
        assert_same(found["runs"][name], EXPECTED["runs"][name])
    return found


def assert_same(ours, theirs):
    if same_machine():
        assert ours == theirs
        return
    numbers = ("train/loss", "val/loss_rel", "norms")
    assert {key: ours[key] for key in numbers} == {
        key: pytest.approx(theirs[key], rel=CLOSE) for key in numbers
    }
    assert [ours["uid"], ours["status"]] == [theirs["uid"], theirs["status"]]
    assert list(ours["checkpoints"]) == list(theirs["checkpoints"])


@pytest.mark.parametrize("words", [["resume", BROKEN], TRAIN[BROKEN]], ids=["resume", "again"])
def test_a_run_goes_on_by_its_name_and_by_the_same_command(words, home, lorasweep):
    before = checkpoints(home)
    assert f"{BROKEN} goes on after epoch 1" in lorasweep(*words)
    assert_went_on(home, before, BROKEN)


@pytest.mark.parametrize("by", ["again", pytest.param("resume", marks=pytest.mark.slow)])
def test_a_multirun_goes_on_and_what_had_ended_in_it_stays(by, home, lorasweep):
    before = checkpoints(home)
    words = ["resume", str(old_runs.folder_of(home, GRID))] if by == "resume" else TRAIN[GRID]
    said = lorasweep(*words)
    assert f"{GRID}-0 have ended before" in said
    assert f"{GRID}-1 goes on after epoch 2" in said
    assert_went_on(home, before, f"{GRID}-0", f"{GRID}-1")


@pytest.mark.parametrize("by", ["resume", pytest.param("again", marks=pytest.mark.slow)])
def test_a_sweep_goes_on_with_its_study(by, home, lorasweep):
    before = checkpoints(home)
    said = lorasweep(*(["resume", f"{SEARCH}-{SWEEP}"] if by == "resume" else TRAIN[SEARCH]))
    assert f"{SEARCH}-2 goes on after epoch 1" in said
    found = assert_went_on(home, before, *(f"{SEARCH}-{number}" for number in range(4)))
    assert len(found["trials"]) == len(EXPECTED["trials"])
    for ours, theirs in zip(found["trials"], EXPECTED["trials"], strict=True):
        assert (ours["state"], ours["params"]) == (theirs["state"], theirs["params"])
        assert ours["values"] == pytest.approx(theirs["values"], rel=0 if same_machine() else CLOSE)


def test_what_waits_on_the_disk_is_sent(home, lorasweep):
    lorasweep("sync", AWAY)
    assert_same(old_runs.outcome(home)["runs"][AWAY], EXPECTED["runs"][AWAY])


def test_a_finished_run_is_made_again_from_its_log(home, lorasweep):
    said = lorasweep("reproduce", FINISHED)
    verdicts = ["bit-equal"] if same_machine() else ["bit-equal", "within rounding"]
    assert any(f"{FINISHED}, made again: {verdict}" in said for verdict in verdicts)


def test_options_that_were_written_of_a_run_train_the_same(home, lorasweep):
    chosen = f"experiment={FINISHED}-reproduced"
    lorasweep("train", "--config-dir", OPTIONS, chosen, "trainer.max_train_epochs=1")
    (ours,) = old_runs.folder_of(home, f"{FINISHED}-reproduced").glob("*.safetensors")
    (theirs,) = old_runs.folder_of(home, FINISHED).glob("*-000001.safetensors")
    assert old_runs.data_hash(ours) == old_runs.data_hash(theirs) or not same_machine()


def test_pick_chooses_in_an_old_store(home, lorasweep):
    assert f"{EXPECTED['picked']}, picked by" in lorasweep("pick", f"{SEARCH}-{SWEEP}")
    picked = home / "outputs" / "picked" / f"{SEARCH}-{SWEEP}" / EXPECTED["picked"]
    assert (picked / f"{EXPECTED['picked']}.safetensors").is_file()
    assert (picked / "config.yaml").is_file()
