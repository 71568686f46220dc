"""Sweeps whose processes are killed at random moments: nothing is lost, nothing is there twice.

LORASWEEP_KILLS says how many kills of a kind the slow tests make; the moments follow from a seed.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import optuna
import psutil
import pytest
from mlflow import MlflowClient

from conftest import SMALL
from lorasweep.cli import main
from lorasweep.runs.session import EpochReport
from lorasweep.sweeps import worker_pool
from lorasweep.sweeps.study import study_storage

KILLS = int(os.environ.get("LORASWEEP_KILLS", "10"))
TRIALS, EPOCHS = 3, 2

SWEEP = f"""\
# @package _global_
defaults:
  - override /hydra/sweeper: optuna
study:
  params:
    adapter.rank: choice(2,4)
    optimizer.unet_lr: tag(log,interval(1e-4,1e-2))
  sampler: random
  pruner: none
  n_trials: {TRIALS}
  retries: 100
  max_failures: null
launcher:
  max_pack: 2
sampling:
  every_n_epochs: 0
"""


PRUNED = (
    SWEEP.replace("pruner: none", "pruner: asha\n  pruner_options: {reduction_factor: 2}")
    .replace(f"n_trials: {TRIALS}", "min_epochs: 1\n  n_trials: 6")
    .replace("max_pack: 2", "max_pack: 2\n  devices: [cpu, cpu]")
)


class Sweep:
    """A small sweep in a folder of its own, with processes of its own."""

    def __init__(self, folder: Path, text: str = SWEEP) -> None:
        (folder / "sweeps").mkdir(parents=True)
        (folder / "sweeps" / "mine.yaml").write_text(text)
        places = [f"output_root={folder}/outputs", f"cache_dir={folder}/cache"]
        settings = [one for one in SMALL if not one.startswith("sampling.")]
        self.arguments = ["sweep", "mine", "--config-dir", str(folder), *settings, *places]
        self.arguments.append("name=kills")
        self.command = [sys.executable, "-m", "lorasweep", *self.arguments]
        self.folder, self.log = folder, folder / "log.txt"

    def start(self) -> subprocess.Popen:
        with self.log.open("a") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT)

    def finish(self) -> float:
        """Run it to its end; the seconds that took."""
        began = time.monotonic()
        assert self.start().wait() == 0, self.log.read_text()[-3000:]
        return time.monotonic() - began

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        journal = study_storage.find_journal(None, self.folder / "outputs")
        opened = study_storage.open_storage(str(journal), self.folder)
        return optuna.load_study(study_name="kills-mine", storage=opened).get_trials()

    def runs(self) -> list[tuple[str, str, dict[str, list[int]]]]:
        """MLflow's runs: name, status and the steps at which each metric was logged."""
        client = MlflowClient(f"sqlite:///{self.folder}/outputs/mlflow.db")
        experiments = [one.experiment_id for one in client.search_experiments()]
        runs = client.search_runs(experiments)
        return sorted((run.info.run_name, run.info.status, steps(client, run)) for run in runs)

    def best(self) -> optuna.trial.FrozenTrial:
        return min(self.trials, key=lambda trial: trial.value)


def steps(client: MlflowClient, run) -> dict[str, list[int]]:
    found = {}
    for key in run.data.metrics:
        if not key.startswith("system/"):
            found[key] = [m.step for m in client.get_metric_history(run.info.run_id, key)]
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A sweep that nobody kills, and the seconds that it took."""
    sweep = Sweep(tmp_path_factory.mktemp("unbroken") / "sweep")
    return sweep, sweep.finish()


def assert_everything_is_there_once(sweep: Sweep) -> None:
    expected = [(number, "COMPLETE") for number in range(TRIALS)]
    assert [(trial.number, trial.state.name) for trial in sweep.trials] == expected
    names = [f"kills-{number}" for number in range(TRIALS)]
    assert [(name, status) for name, status, _ in sweep.runs()] == [(n, "FINISHED") for n in names]
    epochs = list(range(EPOCHS + 1))  # the bare model is epoch 0
    assert all(logged["val/loss_rel"] == epochs for _, _, logged in sweep.runs())
    known = {one.user_attrs["best"]["path"] for one in sweep.trials}
    assert all(Path(path).is_file() for path in known)


def assert_came_to_the_same(sweep: Sweep, unbroken: Sweep) -> None:
    assert_everything_is_there_once(sweep)
    assert [trial.params for trial in sweep.trials] == [trial.params for trial in unbroken.trials]
    assert sweep.runs() == unbroken.runs()
    ours, theirs = sweep.best(), unbroken.best()
    assert ours.number == theirs.number
    assert ours.user_attrs["best"]["epoch"] == theirs.user_attrs["best"]["epoch"]
    # a pack rounds by its members
    assert ours.value == pytest.approx(theirs.value, rel=1e-3)


def test_a_sweep_whose_driver_and_then_a_worker_are_killed_has_everything_once(
    tmp_path, monkeypatch, forked_workers
):
    sweep = Sweep(tmp_path / "sweep")
    with subprocess.Popen(
        sweep.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        assert any("epoch 1, val/score" in line for line in driver.stdout)
        driver.kill()
    killed = []

    def events(pool, real=worker_pool.WorkerPool.events):
        found = real(pool)
        if not killed and any(isinstance(event, EpochReport) for event in found):
            killed.append(pool.workers[0].process)
            killed[0].kill()
        return found

    monkeypatch.setattr(worker_pool.WorkerPool, "events", events)
    main.main(sweep.arguments)  # the same command, in this process
    assert killed
    assert_everything_is_there_once(sweep)
    reasons = [trial.user_attrs.get("reason") for trial in sweep.trials]
    assert any("killed by SIGKILL" in reason for reason in reasons if reason)


@pytest.mark.slow
def test_a_driver_killed_at_random_moments_leaves_no_trace_in_the_end(unbroken, tmp_path):
    reference, seconds = unbroken
    sweeps, moments, kills = sweeps_in(tmp_path), random.Random(0), 0
    sweep, is_whole = next(sweeps), True
    while kills < KILLS:
        driver = sweep.start()
        moment = moments.uniform(0.2, 1.0) * seconds
        time.sleep(moment)
        if driver.poll() is None:
            driver.kill()
            kills += 1
        if driver.wait() < 0:
            is_whole = False
            continue
        assert_came_to_the_same(sweep, reference)  # it came to its end before
        if is_whole:  # the machine is faster than it was
            seconds = moment
        sweep, is_whole = next(sweeps), True
    sweep.finish()
    assert_came_to_the_same(sweep, reference)


@pytest.mark.slow
def test_workers_killed_at_random_moments_cost_only_their_packs(unbroken, tmp_path):
    reference, seconds = unbroken
    sweeps, moments, kills = sweeps_in(tmp_path), random.Random(1), 0
    while kills < KILLS:
        sweep = next(sweeps)
        driver = sweep.start()
        while kills < KILLS and driver.poll() is None:
            time.sleep(moments.uniform(0.1, 0.7) * seconds)
            kills += kill_a_worker(driver.pid)
        assert driver.wait() == 0, sweep.log.read_text()[-3000:]
        assert_came_to_the_same(sweep, reference)


@pytest.mark.slow
def test_a_sweep_that_prunes_on_two_devices_has_everything_once_after_kills_of_both_kinds(tmp_path):
    moments, kills = random.Random(2), 0
    seconds = Sweep(tmp_path / "unbroken", PRUNED).finish()
    sweeps = sweeps_in(tmp_path, PRUNED)
    while kills < KILLS:
        sweep, is_whole = next(sweeps), True
        while kills < KILLS:
            driver = sweep.start()
            moment = moments.uniform(0.2, 0.8) * seconds
            time.sleep(moment)
            if driver.poll() is not None and is_whole:  # the machine is faster than it was
                seconds = moment
            kills += kill_a_worker(driver.pid)
            time.sleep(moments.uniform(0.0, 0.3) * seconds)
            if driver.poll() is None:
                driver.kill()
                kills += 1
            if driver.wait() >= 0:
                break
            is_whole = False
        sweep.finish()
        assert_each_trial_is_there_once_with_all_its_epochs(sweep)


def assert_each_trial_is_there_once_with_all_its_epochs(sweep: Sweep) -> None:
    trials = sweep.trials
    assert [trial.number for trial in trials] == list(range(6))
    statuses = {"COMPLETE": "FINISHED", "PRUNED": "KILLED"}
    expected = [(f"kills-{one.number}", statuses[one.state.name]) for one in trials]
    assert [(name, status) for name, status, _ in sweep.runs()] == expected
    for trial, (_, _, logged) in zip(trials, sweep.runs(), strict=True):
        assert logged["val/loss_rel"] == list(range(trial.user_attrs["epochs"] + 1))
        assert Path(trial.user_attrs["best"]["path"]).is_file()
    assert {trial.user_attrs["epochs"] for trial in trials if trial.state.name == "COMPLETE"} == {2}


def sweeps_in(folder: Path, text: str = SWEEP) -> Iterator[Sweep]:
    """A sweep, and others for when it has ended before all kills were made."""
    return (Sweep(folder / f"sweep{number}", text) for number in count())


def kill_a_worker(driver: int) -> bool:
    """Kill one if there is one."""
    try:
        for process in psutil.Process(driver).children():
            if "spawn_main" in " ".join(process.cmdline()):  # not the resource tracker
                process.kill()
                return True
    except psutil.NoSuchProcess:
        pass
    return False
