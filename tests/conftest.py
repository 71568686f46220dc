"""What the tests share: the real config, composed and shrunk, and the embedded base model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a shared machine: no busy waiting
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network

import pytest
import yaml

from lorasweep.config.build_run import build_run
from lorasweep.config.compose import compose
from lorasweep.config.conf_folder import conf_dir
from lorasweep.config.run import Run

yaml.SafeLoader = yaml.CSafeLoader  # Hydra's files are parsed thousands of times

SMALL = [
    "experiment=demo",
    "dataset.num_images=4",
    "dataset.resolution=[32,32]",
    "dataset.num_holdout=2",
    "trainer.max_train_epochs=2",
    "trainer.batch_size=3",
    "sampling.prompts=[a high contrast icon of a rocket]",
    "sampling.num_inference_steps=2",
    "metrics.validation.num_timesteps=2",
    "metrics.validation.max_tuples=6",
    "metrics.validation.num_probe_images=2",
    "metrics.validation.num_bootstrap=50",
    "metrics.prior_drift.num_timesteps=2",
]
"""The demo, as small as it says something."""


def options(group: str) -> list[str]:
    """Names of all options of a config group."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all tests share, as all runs of a user do."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_run(tmp_path: Path, cache_dir: Path) -> Callable[..., Run]:
    """Build a Run from overrides on the small demo."""

    def make(*overrides: str, number: int | None = None) -> Run:
        cfg = compose([*SMALL, f"output_root={tmp_path}", f"cache_dir={cache_dir}", *overrides])
        output_dir = tmp_path / "run" / str(number or 0)
        return build_run(cfg, output_dir=output_dir, overrides=overrides, sweep="s", number=number)

    return make


@pytest.fixture(scope="session")
def base():
    """The embedded base model, loaded once; nothing may change its weights."""
    from lorasweep.core.settings import build

    cfg = compose(["experiment=demo"])
    return build(cfg.model, "model").load()
