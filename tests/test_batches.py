"""Batches through launchers that return when all have ended; a stand-in launcher, no training."""

import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.utils import JobReturn, JobStatus

from lorasweep.batches import Batches
from lorasweep.flow import Limits
from lorasweep.jobs import Scored
from lorasweep.run import PassingError, RunError
from lorasweep.settings import SettingsError
from lorasweep.study.study import Study
from test_study import SCORE, SETTINGS, SPACE

JOBS = SimpleNamespace(
    epochs=2,
    overrides=lambda trial, reports: trial.overrides,
    was_dropped=lambda trial: False,
    scored=lambda trial: [Scored(1, Path("e1"), {SCORE: trial.number + 0.5}, {})],
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


def study_in(folder):
    settings = replace(SETTINGS, n_trials=3, batch_size=2)
    return Study(settings, SPACE, "demo-s", folder / "demo" / "s", max_epochs=2)


def launcher_that(returned):
    """A launcher that gives this of each job, or raises it."""

    def launch(overrides, initial_job_idx):
        if isinstance(returned, Exception):
            raise returned
        return [returned for _ in overrides]

    return SimpleNamespace(launch=launch)


def test_a_lost_batch_is_launched_again_under_its_numbers_with_its_parameters(tmp_path):
    study, launcher = study_in(tmp_path), DyingOnce()
    Batches(study, JOBS, launcher, Limits(None, 1, time.monotonic())).run()
    assert launcher.launched == [[0, 1], [0, 1], [2]]
    assert [(t.number, t.value) for t in study.trials] == [(0, 0.5), (1, 1.5), (2, 2.5)]
    assert [t.user_attrs.get("attempt") for t in study.trials] == [1, 1, None]


def test_a_launchers_setting_that_is_wrong_ends_the_sweep_and_no_trial_fails_for_it(tmp_path):
    study = study_in(tmp_path)
    launcher = launcher_that(SettingsError("launcher.pack_via=ray: ray is not installed"))
    with pytest.raises(SettingsError, match="ray is not installed"):
        Batches(study, JOBS, launcher, Limits(None, None, time.monotonic())).run()
    assert study.take_over() == [0, 1]
    assert not any("attempt" in trial.user_attrs for trial in study.trials)


def test_trials_without_a_finite_score_count_as_failures(tmp_path):
    one = Scored(1, Path("e1"), {SCORE: math.nan}, {})
    jobs = SimpleNamespace(**{**vars(JOBS), "scored": lambda trial: [one]})
    launcher = launcher_that(JobReturn(status=JobStatus.COMPLETED))
    limits = Limits(None, 2, time.monotonic())
    Batches(study_in(tmp_path), jobs, launcher, limits).run()
    assert limits.hopeless
    assert limits.last_reason == f"no epoch had a finite {SCORE}"


def test_of_a_trial_that_another_driver_began_the_later_epochs_count_too(tmp_path):
    trial = study_in(tmp_path).next()
    trial.plan(2)
    trial.report(1, Path("e1"), {SCORE: 0.9}, {})
    study = study_in(tmp_path)
    assert study.take_over() == [0]
    found = [Scored(epoch, Path(f"e{epoch}"), {SCORE: 1 / epoch}, {}) for epoch in (1, 2)]
    jobs = SimpleNamespace(**{**vars(JOBS), "scored": lambda trial: found})
    launcher = launcher_that(JobReturn(status=JobStatus.COMPLETED))
    Batches(study, jobs, launcher, Limits(None, None, time.monotonic())).run()
    assert study.trials[0].value == 0.5
    assert study.trials[0].user_attrs["best"]["epoch"] == 2


@pytest.mark.parametrize(("error", "attempts"), [(PassingError, [1, 1]), (RunError, [None, None])])
def test_trials_whose_job_was_lost_are_tried_again_and_those_that_failed_are_not(
    error, attempts, tmp_path
):
    returned = JobReturn(status=JobStatus.FAILED)
    returned.return_value = error("its ray job failed")
    study, limits = study_in(tmp_path), Limits(None, 2, time.monotonic())
    Batches(study, JOBS, launcher_that(returned), limits).run()
    assert [trial.user_attrs.get("attempt") for trial in study.trials] == attempts
    assert limits.hopeless  # in the end
