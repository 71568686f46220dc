"""What the tests share.

Here: `SMALL`, `FEW`, `FAMILIES` and `options`, and the fixtures
  cache_dir       a cache of latents, captions and hashes, the same for all tests of a process
  make_run        overrides -> a Run of the small demo below `tmp_path`
  base            the embedded base model, loaded; with `FAMILIES` one of each family
  sdxl_folder     a tiny SDXL as diffusers saves it; `sdxl` is it, loaded; `sd2` likewise
  shared_base     sessions in this process take `base`, of each kind they ask for, from memory
  forked_workers  a sweep's worker processes begin as copies of this one
  short_pictures  an export's check draws its pictures in few steps
  empty_store     an MLflow store without runs, copied wherever a test would make one

Helper modules beside this file, named by what they hold:
  small_training    training in this process, and its losses, checkpoints, reports and weights
  adapter_packs     packs as if they had been trained, and the model's predictions with them
  candidates        made-up checkpoints of the tracking store
  command_line      `lorasweep …`, in a process of its own or in this one
  small_study       settings and search space of a study
  logged            a run as a trainer logs it, and all that MLflow then has of it
  fake_worker_pool  stands in for a sweep's worker processes
  lora_tensors      a module's tensors of every type of LoRA file
  renamed_loras     a LoRA's tensors under the names of every program
  bad_files         images, LoRA files and models that are broken on purpose
  tiny_sdxl         a tiny SDXL and SD2 of random weights, and the full SDXL without any
  narrow_sd15       a narrow base model of SD1.5's shape, which the real sd-scripts can train
  sd_scripts_stand_in  a checkout of kohya's sd-scripts without torch, and what may go amiss in it
  kept_configs      configs of the shipped conf/ are composed with a tenth of the work
  old_runs          runs that an earlier lorasweep left (made by make_old_runs)
recorded/ holds what other programs have written.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a shared machine: no busy waiting
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network

import pytest

from kept_configs import keep_configs
from lorasweep.config.build_run import build_run
from lorasweep.config.compose import compose
from lorasweep.config.conf_folder import conf_dir
from lorasweep.config.run import Run
from lorasweep.core.atomic_write import write_atomically
from lorasweep.tracking import store

keep_configs()

SMALL = [
    "experiment=demo",
    "dataset.num_images=4",
    "dataset.resolution=[32,32]",
    "dataset.num_holdout=2",
    "trainer.max_train_epochs=2",
    "trainer.batch_size=3",
    "sampling.prompts=[a high contrast icon of a rocket]",
    "sampling.num_inference_steps=1",
    "metrics.validation.num_timesteps=2",
    "metrics.validation.max_tuples=6",
    "metrics.validation.num_probe_images=2",
    "metrics.validation.num_bootstrap=50",
    "metrics.prior_drift.num_timesteps=1",
]
"""The demo, as small as it says something."""

FEW = "adapter.targets=[unet.*.attn2.*,unet.*.proj_in,text_encoder.*.q_proj]"
"""Adapters on a quarter of the modules, which trains in half of the time."""


LONGEST_FIRST = (
    "test_resume.py",
    "test_sweep.py",
    "test_adapters.py",
    "test_native.py",
    "test_other_readers.py",
    "test_bad_inputs.py",
    "test_sdxl.py",
    "test_shipped_sweeps.py",
    "test_merge.py",
    "test_convert.py",
    "test_golden.py",
    "test_states.py",
    "test_sd_scripts.py",
    "test_hostile_log.py",
    "test_old_runs.py",
    "test_resize_and_draw.py",
    "test_combine_loras.py",
    "test_run.py",
    "test_publish.py",
    "test_worker_pool.py",
    "test_kills.py",
    "test_end_to_end.py",
    "test_reproduce.py",
    "test_peft_files.py",
    "test_diffusers_lora.py",
    "test_lycoris.py",
    "test_study.py",
    "test_config.py",
    "test_tracking.py",
    "test_tracking_server.py",
    "test_multirun.py",
    "test_foreign_settings.py",
)
"""Files that are given to the workers of pytest-xdist before others, so that none is left alone
with a long one at the end."""


def pytest_collection_finish() -> None:
    """Take what was imported and collected out of every later look of the garbage collector."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def options(group: str) -> list[str]:
    """Names of all options of a config group."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


@pytest.fixture(autouse=True)
def no_log_file_of_an_earlier_test() -> None:
    """Hydra gives the root logger a file for each command line that runs in this process."""
    root = logging.getLogger()
    root.handlers[:] = [one for one in root.handlers if type(one) is not logging.FileHandler]


@pytest.fixture(autouse=True)
def no_store_of_an_earlier_test() -> None:
    """MLflow names the store that it is told of to the processes that it may start."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all tests share, as all runs of a user do."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_run(tmp_path: Path, cache_dir: Path) -> Callable[..., Run]:
    """Build a Run from overrides on the small demo."""

    def make(*overrides: str, number: int | None = None) -> Run:
        cfg = compose([*SMALL, *overrides])
        cfg.cache_dir = str(cache_dir)
        if not any(one.startswith("output_root=") for one in overrides):
            cfg.output_root = str(tmp_path)
        output_dir = tmp_path / "run" / str(number or 0)
        return build_run(cfg, output_dir=output_dir, overrides=overrides, sweep="s", number=number)

    return make


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an MLflow store without runs, to copy: making one takes a second."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    store.quieten_mlflow()
    _create_database(database)
    return database


_create_database = store._create_database


@pytest.fixture(scope="module", autouse=True)
def quick_stores(request: pytest.FixtureRequest) -> Iterator[None]:
    """Stores are copies of `empty_store`, but for tests of tracking, which make their own."""

    def copied(database: Path) -> None:
        empty = request.getfixturevalue("empty_store")
        write_atomically(database, empty.read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name != "tracking":
            patch.setattr(store, "_create_database", copied)
        yield


@pytest.fixture(scope="module")
def forked_workers() -> Iterator[None]:
    """Worker processes are copies of this one, which has its libraries loaded: 7 s less for each.

    That they begin on their own, too, is for the tests of kills to show.
    """
    import torch
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    from lorasweep.sweeps import worker_pool, worker_process

    def work(connection: Connection) -> None:
        torch.set_num_threads(1)  # a thread pool is not copied
        for engine in SqlAlchemyStore._engine_map.values():
            engine.dispose(close=False)  # the connections stay the driver's
        worker_process.work(connection)

    forked = SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_pool, "multiprocessing", forked)
        patch.setattr(worker_pool, "work", work)
        yield


@pytest.fixture
def short_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export's check draws its pictures in 2 steps, not 8: what it finds here shows in them."""
    from lorasweep.export import picture_check

    monkeypatch.setattr(picture_check, "NUM_STEPS", 2)


FAMILIES = pytest.mark.parametrize("base", ["embedded_base", "sdxl"], indirect=True)
"""Of a test that holds for base models of every family."""


@pytest.fixture(scope="session")
def base(request: pytest.FixtureRequest):
    """The embedded base model, or by `FAMILIES` another; nothing may change its weights."""
    return request.getfixturevalue(getattr(request, "param", "embedded_base"))


@pytest.fixture(scope="session")
def embedded_base():
    """The embedded base model, loaded once."""
    return _load()


def _load(*overrides: str):
    from lorasweep.core.settings import build

    return build(compose(["experiment=demo", *overrides]).model, "model").load()


@pytest.fixture(scope="session")
def sdxl_folder(embedded_base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL of random weights, as diffusers saves it."""
    import tiny_sdxl

    target = tmp_path_factory.mktemp("sdxl") / "model"
    tiny_sdxl.write(target, embedded_base.tokenizer)
    return target


@pytest.fixture(scope="session")
def sdxl(sdxl_folder):
    """It, loaded once; nothing may change its weights."""
    return _load(f"model.path={sdxl_folder}")


@pytest.fixture(scope="session")
def sd2(embedded_base, tmp_path_factory: pytest.TempPathFactory):
    """A tiny Stable Diffusion 2.1 of random weights, loaded."""
    import tiny_sdxl

    target = tmp_path_factory.mktemp("sd2") / "model"
    tiny_sdxl.write_sd2(target, embedded_base.tokenizer)
    return _load(f"model.path={target}")


@pytest.fixture(scope="module")
def shared_base() -> Iterator[None]:
    """Loading the base model takes half a second; sessions leave its weights as they were."""
    from lorasweep.runs import session

    @cache
    def loaded(model, device, precision, gradient_checkpointing):
        return model.load(device, precision)

    def load_base(run: Run, device: str):
        settings = run.trainer.precision, run.trainer.gradient_checkpointing
        return loaded(run.model, device, *settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "load_base", load_base)
        yield
