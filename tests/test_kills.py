"""Sweeps whose processes are killed at random moments: nothing is lost, nothing is there twice.

LORASWEEP_KILLS says how many kills; the moments follow from a seed.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import psutil
import pytest
from mlflow import MlflowClient

from conftest import SMALL
from lorasweep.study import storage

KILLS = int(os.environ.get("LORASWEEP_KILLS", "10"))
pytestmark = pytest.mark.slow

SWEEP = """\
# @package _global_
defaults:
  - override /hydra/sweeper: optuna
study:
  params:
    adapter.rank: choice(2,4)
    optimizer.unet_lr: tag(log,interval(1e-4,1e-2))
  sampler: random
  pruner: none
  n_trials: 4
  retries: 100
  max_failures: null
launcher:
  max_pack: 2
"""


class Sweep:
    """A small sweep in a folder of its own, with processes of its own."""

    def __init__(self, folder: Path, cache: Path) -> None:
        (folder / "sweeps").mkdir(parents=True)
        (folder / "sweeps" / "mine.yaml").write_text(SWEEP)
        places = [f"output_root={folder}/outputs", f"cache_dir={cache}"]
        command = [sys.executable, "-m", "lorasweep", "sweep", "mine", "--config-dir", str(folder)]
        self.command = [*command, *SMALL, *places, "name=kills"]
        self.folder, self.log = folder, folder / "log.txt"

    def start(self) -> subprocess.Popen:
        with self.log.open("a") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT)

    def finish(self) -> None:
        assert self.start().wait() == 0, self.log.read_text()[-3000:]

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        journal = storage.find_journal(None, self.folder / "outputs")
        opened = storage.open_storage(str(journal), self.folder)
        return optuna.load_study(study_name="kills-mine", storage=opened).get_trials()

    def runs(self) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """Finished runs of MLflow by name: what they logged by metric, in order."""
        client = MlflowClient(f"sqlite:///{self.folder}/outputs/mlflow.db")
        found: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for run in client.search_runs(["0", "1"], "attributes.status = 'FINISHED'"):
            assert run.info.run_name not in found, f"{run.info.run_name} is there twice"
            found[run.info.run_name] = {
                key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
                for key in ("train/loss", "val/loss_rel")
            }
        return found

    def best(self) -> tuple[dict[str, object], float]:
        done = [trial for trial in self.trials if trial.state.name == "COMPLETE"]
        best = min(done, key=lambda trial: trial.value)
        return best.params, best.value


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    sweep = Sweep(folder / "sweep", folder / "cache")
    sweep.finish()
    return sweep


def test_a_driver_killed_at_random_moments_leaves_no_trace_in_the_end(unbroken, tmp_path):
    sweep = Sweep(tmp_path / "sweep", tmp_path / "cache")
    moments = random.Random(0)
    for _ in range(KILLS):
        driver = sweep.start()
        time.sleep(moments.uniform(1, 30))
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    sweep.finish()
    trials, expected = sweep.trials, unbroken.trials
    assert [(t.number, t.state.name) for t in trials] == [(n, "COMPLETE") for n in range(4)]
    assert [t.params for t in trials] == [t.params for t in expected]
    assert sweep.best()[0] == unbroken.best()[0]
    assert sweep.best()[1] == pytest.approx(unbroken.best()[1], rel=1e-3)  # neighbours may differ
    runs, others = sweep.runs(), unbroken.runs()
    assert runs.keys() == others.keys()
    for name, metrics in runs.items():
        for key, values in metrics.items():
            assert [step for step, _ in values] == [step for step, _ in others[name][key]]


def test_workers_killed_at_random_moments_cost_only_their_packs(unbroken, tmp_path):
    sweep = Sweep(tmp_path / "sweep", tmp_path / "cache")
    driver, moments, kills = sweep.start(), random.Random(1), 0
    while kills < KILLS and driver.poll() is None:
        time.sleep(moments.uniform(4, 30))
        workers = [p for p in psutil.Process(driver.pid).children() if is_worker(p)]
        for worker in workers[:1]:
            worker.send_signal(signal.SIGKILL)
            kills += 1
    assert driver.wait() == 0, sweep.log.read_text()[-3000:]
    assert kills > 0
    done = [trial for trial in sweep.trials if trial.state.name == "COMPLETE"]
    failed = [trial for trial in sweep.trials if trial.state.name == "FAIL"]
    assert len(done) + len(failed) == len(sweep.trials)
    key = sorted(str(trial.params) for trial in done)
    assert key == sorted(str(trial.params) for trial in unbroken.trials)
    assert sweep.best()[0] == unbroken.best()[0]
    assert sweep.best()[1] == pytest.approx(unbroken.best()[1], rel=1e-3)
    assert sorted(sweep.runs()) == sorted(f"kills-{trial.number}" for trial in done)
    steps = [step for step, _ in next(iter(unbroken.runs().values()))["train/loss"]]
    for metrics in sweep.runs().values():
        assert [step for step, _ in metrics["train/loss"]] == steps


def is_worker(process: psutil.Process) -> bool:
    """A spawned process that trains, not multiprocessing's resource tracker."""
    return "spawn_main" in " ".join(process.cmdline())
