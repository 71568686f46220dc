"""Packs as jobs of real engines, and a real PostgreSQL, all on this machine (tools/cluster)."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from command_line import lorasweep
from conftest import SMALL
from lorasweep import tracking

pytestmark = pytest.mark.slow
TOOLS = Path(__file__).parents[2] / "tools" / "cluster"
SHORT = [*SMALL, "trainer.max_train_epochs=1", "adapter.rank=2"]


def needs(*programs):
    missing = [program for program in programs if shutil.which(program, path=PLACES) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (docs/cluster.md)")
    if os.geteuid() != 0:
        pytest.skip("the daemons are started as root")


PLACES = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def script(name, what, folder):
    done = subprocess.run(
        [TOOLS / name, what, folder],
        text=True,
        capture_output=True,
        env={**os.environ, "PATH": PLACES},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    """A one-node SLURM."""
    needs("slurmctld", "slurmd", "munged")
    folder = tmp_path_factory.mktemp("slurm")
    monkeypatch.setenv("SLURM_CONF", script("slurm.sh", "up", folder).partition("=")[2])
    yield
    script("slurm.sh", "down", folder)


@pytest.fixture(scope="module")
def postgres():
    """A database's URI."""
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("postgresql not installed (docs/cluster.md)")
    needs("setpriv")
    pytest.importorskip("psycopg")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # the server's own user must come through
        yield script("postgres.sh", "up", f"{folder}/server")
        script("postgres.sh", "down", f"{folder}/server")


def train(folder, cache_dir, *overrides):
    lorasweep("train", "-m", *SHORT, f"cache_dir={cache_dir}", "seed=0,1,2", *overrides, cwd=folder)


def candidates(uri):
    return sorted((one.run, one.epoch) for one in tracking.candidates(uri, "lorasweep"))


ALL = [("demo-0", 1), ("demo-1", 1), ("demo-2", 1)]


ENGINES = [
    ("submitit_local", "{timeout_min: 20}"),
    ("joblib", "{n_jobs: 2}"),
    ("ray", "{num_cpus: 1}"),
    ("submitit_slurm", "{timeout_min: 20, slurm_partition: test}"),
]


@pytest.mark.parametrize(("engine", "options"), ENGINES)
def test_whole_packs_are_jobs_of_an_engine(engine, options, tmp_path, cache_dir, request):
    pytest.importorskip(engine.partition("_")[0])
    if engine == "submitit_slurm":
        request.getfixturevalue("slurm")
    train(
        tmp_path,
        cache_dir,
        f"launcher.pack_via={engine}",
        f"launcher.engine={options}",
        "launcher.max_pack=2",
    )
    assert candidates(f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}") == ALL
    if engine.startswith("submitit"):
        (logs,) = (tmp_path / "outputs" / "demo").glob("*/.jobs")
        assert len(list(logs.glob("*_submitted.pkl"))) == 2  # packs of 2 and 1


@pytest.mark.parametrize(("engine", "options"), ENGINES)
def test_a_sweeps_packs_report_to_its_study_from_their_jobs(
    engine, options, tmp_path, cache_dir, request
):
    pytest.importorskip(engine.partition("_")[0])
    if engine == "submitit_slurm":
        request.getfixturevalue("slurm")
    small = [one for one in SMALL if not one.startswith("sampling.")]
    asked = [
        "study.name=s",
        "study.n_trials=2",
        "study.sampler=grid",
        "optimizer.unet_lr=1e-3,1e-6",
    ]
    pruned = [
        "study.pruner=asha",
        "study.pruner_options={}",
        "study.min_epochs=1",
        "adapter.rank=2",
    ]
    how = [f"launcher.pack_via={engine}", f"launcher.engine={options}", "sampling.every_n_epochs=0"]
    said = lorasweep(
        *("sweep", "rank_lr", *small, *asked, *pruned, *how, f"cache_dir={cache_dir}"), cwd=tmp_path
    ).stdout
    assert "Trained 3 epochs of 4 planned" in said
    store = f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}"
    assert candidates(store) == [("demo-0", 1), ("demo-0", 2), ("demo-1", 1)]


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_hydras_submitit_launcher_runs_single_jobs(cluster, tmp_path, cache_dir, request):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    if cluster == "slurm":
        request.getfixturevalue("slurm")
    train(tmp_path, cache_dir, f"hydra/launcher=submitit_{cluster}", *MEMORY[cluster])
    assert candidates(f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}") == ALL


MEMORY = {"local": [], "slurm": ["hydra.launcher.partition=test"]}


def test_postgresql_keeps_what_several_workers_log(postgres, tmp_path, cache_dir):
    train(tmp_path, cache_dir, f"tracking.uri={postgres}", "launcher.devices=[cpu,cpu]")
    assert candidates(postgres) == ALL


def test_postgresql_keeps_a_study(postgres, tmp_path):
    import optuna

    from lorasweep.sweeps.study.study_storage import open_storage

    for _ in range(2):  # as two drivers, one after the other
        study = optuna.create_study(
            storage=open_storage(f"{postgres}_study", tmp_path), study_name="s", load_if_exists=True
        )
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    assert [trial.number for trial in study.trials] == list(range(6))


def test_postgresql_keeps_a_sweep_and_lets_one_process_drive_it(postgres, tmp_path, cache_dir):
    from lorasweep.sweeps.study.study_storage import only_driver

    uri = postgres.replace("postgresql:", "postgresql+psycopg:")
    study = f"{uri}_study"
    places = [f"cache_dir={cache_dir}", f"tracking.uri={uri}", "tracking.experiment=sweep"]
    asked = ["study.name=s", "study.n_trials=2", f"study.storage={study}", "adapter.rank=2"]
    short = [one for one in SHORT if not one.startswith(("sampling.", "adapter.rank"))]
    command = ["sweep", "rank_lr", *short, "sampling.every_n_epochs=0", *places, *asked]
    with only_driver(tmp_path / "elsewhere", "demo-s", study):
        refused = lorasweep(*command, cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert "sweep demo-s is being driven by another process" in refused.stderr
    for _ in range(2):  # the second time there is nothing left to do
        assert "Trained 2 epochs of 2 planned" in lorasweep(*command, cwd=tmp_path).stdout
        known = tracking.candidates(uri, "sweep", "demo-s")
        assert sorted((one.run, one.epoch) for one in known) == [("demo-0", 1), ("demo-1", 1)]
