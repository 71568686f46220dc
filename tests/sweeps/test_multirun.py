"""The launcher: its settings, its retries, and packs as jobs of other engines."""

import copy
import os
import pickle
import signal
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from lorasweep.cli.choose_folder import ContinueBrokenOff
from lorasweep.config.compose import compose
from lorasweep.config.conf_folder import conf_dir
from lorasweep.config.error_messages import one_line
from lorasweep.config.resolvers import register_resolvers
from lorasweep.core.atomic_write import DiskFullError
from lorasweep.core.failures import FailureKind, RunError
from lorasweep.core.settings import SettingsError, build_class
from lorasweep.runs.session import Failure, Finished, failure_kind
from lorasweep.sweeps import multirun, slurm_ray_joblib
from lorasweep.sweeps.compose_jobs import compose_job
from lorasweep.sweeps.multirun import LauncherSettings, _train, _with_retries, group
from lorasweep.sweeps.read_yaml_once import read_yaml_once

DEFAULTS = {"devices": "auto", "max_pack": 8, "retries": 1, "pack_via": None, "engine": None}


def settings(**changes):
    return build_class(LauncherSettings, {**DEFAULTS, **changes}, "launcher")


class FakePool:
    """Each run ends as the test says, in turn."""

    def __init__(self, ends):
        self.ends, self.submitted, self.waiting = ends, [], []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, run):
        self.submitted.append(run.name)
        self.waiting.append(run.name)
        return True

    def events(self):
        names, self.waiting = self.waiting, []
        return [self.ends[name].pop(0) for name in names]


def test_settings_are_those_of_config_yaml():
    cfg = compose(["experiment=demo"])
    assert dict(cfg.launcher) == DEFAULTS
    cfg = compose(["experiment=demo", "launcher.engine={n_jobs: 2}"])
    assert cfg.launcher.engine.n_jobs == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"n_jobs": 2}}, r"launcher\.engine\.n_jobs has no effect without"),
        ({"pack_via": "slurm"}, r"launcher\.pack_via=slurm"),
        ({"pack_via": "ray", "devices": "cpu"}, r"launcher\.devices has no effect with"),
        ({"max_pack": 0}, r"launcher\.max_pack=0"),
    ],
)
def test_mistakes_name_the_key(changes, message):
    with pytest.raises(SettingsError, match=message):
        settings(**changes)


def test_this_version_of_hydra_lets_its_files_be_read_once():
    """By what its loader doesn't document, which another version may not have."""
    assert hydra.__version__ == "1.3.8", "see read_yaml_once.py"
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().hydra.config_loader
        read_yaml_once(loader)
        first, again = (loader.repository.load_config("config") for _ in range(2))
    assert first.config == again.config
    assert first is not again


def test_jobs_share_nothing_that_was_composed(tmp_path):
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        app = GlobalHydra.instance().hydra
        given = ["experiment=demo", f"output_root={tmp_path}", "hydra.job.name=x"]
        sweep = app.compose_config("config", given, RunMode.MULTIRUN)
        read_yaml_once(app.config_loader)
        loader = pickle.loads(pickle.dumps(app.config_loader))  # as Hydra's own launchers do
        overrides = [[*given[:2], f"adapter.rank={2 + n}"] for n in range(2)]
        jobs = [compose_job(sweep, loader, overrides[n], n) for n in range(2)]
    assert [job.config.adapter.rank for job in jobs] == [2, 3]
    assert [job.config.hydra.job.num for job in jobs] == [0, 1]


@pytest.fixture
def by_rank(tmp_path):
    """A multirun's config, whose name is made of a value that it varies, and what loads its jobs"""
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        app = GlobalHydra.instance().hydra
        name = "name=i_${adapter.rank}"
        given = ["experiment=demo", f"output_root={tmp_path}", "hydra.job.name=x", name]
        given.append("hydra.mode=MULTIRUN")
        yield app.compose_config("config", given, RunMode.MULTIRUN), app.config_loader, given


def test_a_name_made_of_a_swept_value_makes_one_sweep_and_one_pack(by_rank):
    sweep, loader, given = by_rank
    jobs = [compose_job(sweep, loader, [*given, f"adapter.rank={n}"], n) for n in (2, 3)]
    assert [job.run.name for job in jobs] == ["i_2-2", "i_3-3"]
    assert len({job.run.sweep for job in jobs}) == 1
    assert [job.run.output_dir.parent for job in jobs] == [Path(sweep.hydra.sweep.dir)] * 2
    assert len(group([job.run for job in jobs], max_pack=8)) == 1


def test_commands_begun_in_the_same_second_have_a_folder_each(by_rank):
    first, second = by_rank[0], copy.deepcopy(by_rank[0])
    for config in (first, second):
        ContinueBrokenOff().on_multirun_start(config)
    assert second.hydra.sweep.dir == f"{first.hydra.sweep.dir}-2"
    assert Path(second.hydra.sweep.dir).is_dir()


def test_failures_worth_a_retry_are_tried_again_and_others_not(make_run):
    runs = [make_run(number=n) for n in range(3)]
    lost = [Failure(run=f"demo-{n}", reason="killed", kind=FailureKind.RETRY) for n in range(3)]
    workers = FakePool(
        {
            "demo-0": [lost[0], Finished(run="demo-0", dropped=False)],
            "demo-1": [lost[1], lost[1]],
            "demo-2": [Failure(run="demo-2", reason="NaN")],
        }
    )
    failed = _with_retries(partial(_train, workers), runs, retries=1)
    assert sorted((one.run, one.reason) for one in failed) == [
        ("demo-1", "killed"),
        ("demo-2", "NaN"),
    ]
    assert workers.submitted == ["demo-0", "demo-1", "demo-2", "demo-0", "demo-1"]


def test_runs_that_can_share_a_base_are_grouped_in_order(make_run):
    runs = [make_run(f"dataset.seed={n % 2}", number=n) for n in range(5)]
    names = [[run.name for run in pack] for pack in group(runs, 2)]
    assert names == [["demo-0", "demo-2"], ["demo-1", "demo-3"], ["demo-4"]]


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_packs_are_jobs_of_joblib_and_a_lost_one_fails_its_own_runs(
    n_jobs, make_run, tmp_path, monkeypatch
):
    def train_pack(pack, study):
        if pack[0].name == "demo-1" and n_jobs == 1:
            raise OSError("node down (made by the test)")
        if pack[0].name == "demo-1":
            os.kill(os.getpid(), signal.SIGKILL)
        return [Failure(run=run.name, reason="NaN") for run in pack if run.name == "demo-2"]

    monkeypatch.setattr(slurm_ray_joblib, "train_pack", train_pack)
    packs = [[make_run(number=n)] for n in range(4)]
    lost, failed = slurm_ray_joblib.train_by_jobs(packs, "joblib", {"n_jobs": n_jobs}, tmp_path)
    assert failed == Failure(run="demo-2", reason="NaN")
    assert (lost.run, lost.kind) == ("demo-1", FailureKind.RETRY)
    assert "its joblib job failed: " in lost.reason
    assert ("node down" if n_jobs == 1 else "SIGKILL") in lost.reason


def test_runs_whose_job_was_lost_are_tried_again_and_those_that_failed_are_not(
    make_run, monkeypatch
):
    launched = []

    def train_by_jobs(packs, engine, options, folder, study):
        launched.append([[run.name for run in pack] for pack in packs])
        lost = [
            Failure(run=run.name, reason="node down", kind=FailureKind.RETRY) for run in packs[-1]
        ]
        return [Failure(run="demo-0", reason="NaN"), *lost] if len(launched) == 1 else lost[:1]

    monkeypatch.setattr(multirun, "train_by_jobs", train_by_jobs)
    runs = [make_run(number=n) for n in range(4)]
    packs = settings(pack_via="ray", max_pack=2)
    failed = multirun._train_by_jobs(runs, packs, None)
    assert launched == [[["demo-0", "demo-1"], ["demo-2", "demo-3"]], [["demo-2", "demo-3"]]]
    assert [(one.run, one.reason) for one in failed] == [("demo-0", "NaN"), ("demo-2", "node down")]


def test_what_hydra_refuses_of_a_job_is_a_setting_that_is_wrong():
    """So a sweep's trial fails of it, and not the sweep."""

    def refuse(config, overrides):
        raise HydraException("Key 'factor' is not in struct")

    with pytest.raises(SettingsError, match="factor"):
        compose_job(OmegaConf.create(), SimpleNamespace(load_sweep_config=refuse), [], 0)


def test_ctrl_c_while_a_job_is_composed_is_no_fault_of_the_job():
    def interrupted(config, overrides):
        try:
            raise KeyboardInterrupt
        finally:  # as OmegaConf's cleaning up
            raise ConfigKeyError("'NoneType' object has no attribute '_invalidate_flags_cache'")

    with pytest.raises(KeyboardInterrupt):
        compose_job(OmegaConf.create(), SimpleNamespace(load_sweep_config=interrupted), [], 0)


def test_jobs_may_have_another_device_than_the_sweep_but_all_the_same(make_run, monkeypatch):
    """As by `hydra.sweeper.params`."""
    opened = []

    def open_pool(devices, max_pack):
        opened.append(devices)
        return FakePool({f"demo-{n}": [Finished(run=f"demo-{n}", dropped=False)] for n in range(2)})

    monkeypatch.setattr(multirun, "WorkerPool", open_pool)
    monkeypatch.setattr(multirun, "choose_devices", lambda devices, device: [device])
    runs = [make_run("trainer.device=cpu", number=n) for n in range(2)]
    multirun._train_here(SimpleNamespace(devices=("cuda:0",)), runs, settings())
    assert opened == [("cpu",)]
    runs.append(make_run("trainer.device=auto", number=2))
    with pytest.raises(SettingsError, match=r"trainer\.device=auto: a sweep's runs share"):
        multirun._train_here(SimpleNamespace(devices=("cuda:0",)), runs, settings())


def test_a_job_whose_disk_is_full_pauses_its_runs(make_run, monkeypatch):
    def run_pack(runs):
        raise DiskFullError("the disk is full")

    monkeypatch.setattr(slurm_ray_joblib, "run_pack", run_pack)
    (failure,) = slurm_ray_joblib.train_pack([make_run()])
    assert failure.kind == FailureKind.ENVIRONMENT


def test_the_kind_of_a_jobs_failure_survives_the_way_from_another_process():
    error = pickle.loads(pickle.dumps(RunError("no weights found", FailureKind.SETUP)))
    assert (str(error), failure_kind(error)) == ("no weights found", FailureKind.SETUP)


@pytest.mark.parametrize("engine", ["submitit_local", "ray"])
def test_an_engines_option_that_it_does_not_know_is_one_line(engine, make_run, tmp_path):
    pytest.importorskip(engine.partition("_")[0])
    with pytest.raises(SettingsError, match=f"launcher.pack_via={engine}: .*colour"):
        slurm_ray_joblib.train_by_jobs([[make_run()]], engine, {"colour": "red"}, tmp_path)


def test_a_job_trains_its_pack_and_tells_what_failed(make_run):
    runs = [
        make_run("trainer.max_train_epochs=1", f"optimizer.unet_lr={rate}", number=n)
        for n, rate in enumerate(("1e-3", "1e39"))
    ]
    assert [failure.run for failure in slurm_ray_joblib.train_pack(runs)] == ["demo-1"]
    (failure,) = slurm_ray_joblib.train_pack([make_run("model.path=nowhere", number=3)])
    assert "model.path=nowhere" in failure.reason
    assert failure.kind == FailureKind.SETUP


@pytest.mark.parametrize(
    ("name", "package", "remedy"),
    [
        ("ray", "ray", "pip install 'lorasweep[ray]', or take launcher.pack_via=ray"),
        ("submitit_slurm", "submitit", "pip install 'lorasweep[cluster]'"),
    ],
)
def test_a_launcher_of_hydras_that_is_missing_says_how_it_comes(name, package, remedy):
    if find_spec(f"hydra_plugins.hydra_{package}_launcher"):
        pytest.skip("it is installed")
    with pytest.raises(HydraException) as refused:
        compose(["experiment=demo", f"hydra/launcher={name}"])
    said = one_line(refused.value)  # what the command line ends with
    assert said.startswith(f"hydra/launcher={name} is not installed: {remedy}")
    assert "\n" not in said
