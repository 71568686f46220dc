"""Batches through launchers that return when all have ended; a stand-in launcher, no training."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from hydra.core.utils import JobReturn, JobStatus

from lorasweep.batches import Batches
from lorasweep.flow import Limits
from lorasweep.study.study import Study
from test_study import SCORE, SETTINGS, SPACE

JOBS = SimpleNamespace(
    epochs=2,
    overrides=lambda trial, reports: trial.overrides,
    tracked=lambda number: [
        SimpleNamespace(epoch=1, path=Path("e1"), scores={SCORE: number + 0.5}, terms={})
    ],
)


class DyingOnce:
    """A launcher whose first batch is lost."""

    def __init__(self):
        self.launched = []

    def launch(self, overrides, initial_job_idx):
        self.launched.append([initial_job_idx + n for n in range(len(overrides))])
        if len(self.launched) == 1:
            raise RuntimeError("a worker died")
        return [JobReturn(status=JobStatus.COMPLETED) for _ in overrides]


def test_a_lost_batch_is_launched_again_under_its_numbers_with_its_parameters(tmp_path):
    settings = replace(SETTINGS, n_trials=3, batch_size=2)
    study = Study(settings, SPACE, "demo-s", tmp_path / "demo" / "s", max_epochs=2)
    launcher = DyingOnce()
    Batches(study, JOBS, launcher, Limits(None, 1, time.monotonic())).run()
    assert launcher.launched == [[0, 1], [0, 1], [2]]
    assert [(t.number, t.value) for t in study.trials] == [(0, 0.5), (1, 1.5), (2, 2.5)]
    assert [t.user_attrs.get("attempt") for t in study.trials] == [1, 1, None]
