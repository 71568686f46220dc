"""Batches through launchers that return when all have ended; a stand-in launcher, no training."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.utils import JobReturn, JobStatus

from lorasweep.core.failures import FailureKind, RunError
from lorasweep.core.settings import SettingsError
from lorasweep.sweeps.study.study import Study
from lorasweep.sweeps.sweep_limits import StopRules, SweepError
from lorasweep.sweeps.sweep_loop import TrialsInBatches
from small_study import SCORE, SETTINGS, SPACE


def jobs_that_left(folder, *values):
    """Jobs whose runs have left checkpoints with these scores, plus the trial's number."""

    def run_of(trial):
        path = folder / str(trial.number)
        (path / "scores").mkdir(parents=True, exist_ok=True)
        for epoch, value in enumerate(values, start=1):
            scored = {"scores": {SCORE: trial.number + value}, "terms": {}}
            (path / "scores" / f"{epoch:06d}.json").write_text(json.dumps(scored))
        return SimpleNamespace(
            name="demo", output_dir=path, params={}, max_train_epochs=len(values)
        )

    return SimpleNamespace(run_of=run_of, overrides=lambda trial: trial.overrides)


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
    TrialsInBatches(
        study, jobs_that_left(tmp_path, 0.5), launcher, StopRules(None, 1, time.monotonic())
    ).run()
    assert launcher.launched == [[0, 1], [0, 1], [2]]
    assert [(t.number, t.value) for t in study.trials] == [(0, 0.5), (1, 1.5), (2, 2.5)]
    assert [t.user_attrs.get("attempt") for t in study.trials] == [1, 1, None]


def test_a_trial_that_cannot_be_composed_fails_alone(tmp_path):
    study, jobs = study_in(tmp_path), jobs_that_left(tmp_path, 0.5)

    def run_of(trial, real=jobs.run_of):
        if trial.number == 0:
            raise SettingsError("adapter.network_dropout=4.0: must be less than 1")
        return real(trial)

    jobs.run_of = run_of
    launcher = launcher_that(JobReturn(status=JobStatus.COMPLETED))
    TrialsInBatches(study, jobs, launcher, StopRules(None, None, time.monotonic())).run()
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert (
        study.trials[0].user_attrs["reason"] == "adapter.network_dropout=4.0: must be less than 1"
    )


def test_a_launchers_setting_that_is_wrong_ends_the_sweep_and_no_trial_fails_for_it(tmp_path):
    study = study_in(tmp_path)
    launcher = launcher_that(SettingsError("launcher.pack_via=ray: ray is not installed"))
    with pytest.raises(SettingsError, match="ray is not installed"):
        TrialsInBatches(
            study, jobs_that_left(tmp_path), launcher, StopRules(None, None, time.monotonic())
        ).run()
    assert study.take_over() == [0, 1]
    assert not any("attempt" in trial.user_attrs for trial in study.trials)


def test_trials_without_a_finite_score_count_as_failures(tmp_path):
    jobs = jobs_that_left(tmp_path, math.nan)
    launcher = launcher_that(JobReturn(status=JobStatus.COMPLETED))
    rules = StopRules(None, 2, time.monotonic())
    TrialsInBatches(study_in(tmp_path), jobs, launcher, rules).run()
    assert rules.too_many_failed
    assert rules.last_reason == f"no epoch had a finite {SCORE}"


def test_of_a_trial_that_another_driver_began_the_later_epochs_count_too(tmp_path):
    trial = study_in(tmp_path).next()
    trial.plan(2)
    trial.report(1, Path("e1"), {SCORE: 0.9}, {})
    study = study_in(tmp_path)
    assert study.take_over() == [0]
    jobs = jobs_that_left(tmp_path, 1.0, 0.5)
    launcher = launcher_that(JobReturn(status=JobStatus.COMPLETED))
    TrialsInBatches(study, jobs, launcher, StopRules(None, None, time.monotonic())).run()
    assert study.trials[0].value == 0.5
    assert study.trials[0].user_attrs["best"]["epoch"] == 2


def test_a_launcher_that_breaks_on_a_value_loses_its_batch_as_by_any_other_error(tmp_path):
    study, rules = study_in(tmp_path), StopRules(None, 2, time.monotonic())
    broken = launcher_that(ValueError("Expecting value: line 1"))  # of JSON, say
    TrialsInBatches(study, jobs_that_left(tmp_path), broken, rules).run()
    assert [trial.user_attrs.get("attempt") for trial in study.trials] == [1, 1]


@pytest.mark.parametrize(
    ("kind", "attempts"), [(FailureKind.RETRY, [1, 1]), (FailureKind.OWN, [None, None])]
)
def test_trials_whose_job_was_lost_are_tried_again_and_those_that_failed_are_not(
    kind, attempts, tmp_path
):
    returned = JobReturn(status=JobStatus.FAILED)
    returned.return_value = RunError("its ray job failed", kind)
    study, rules = study_in(tmp_path), StopRules(None, 2, time.monotonic())
    TrialsInBatches(study, jobs_that_left(tmp_path), launcher_that(returned), rules).run()
    assert [trial.user_attrs.get("attempt") for trial in study.trials] == attempts
    assert rules.too_many_failed  # in the end


@pytest.mark.parametrize(
    "error",
    [
        RunError("the disk is full", FailureKind.ENVIRONMENT),
        RunError("captions.wd.model: no weights found", FailureKind.SETUP),
        SettingsError("captions.wd.model: no weights found"),  # of Hydra's own launchers
    ],
)
def test_what_has_to_be_mended_stops_the_sweep_and_leaves_its_trials_open(error, tmp_path):
    broken = JobReturn(status=JobStatus.FAILED)
    broken.return_value = error
    returns = [broken, JobReturn(status=JobStatus.COMPLETED)]
    launcher = SimpleNamespace(launch=lambda overrides, initial_job_idx: returns)
    study = study_in(tmp_path)
    with pytest.raises(SweepError, match=str(error)):
        jobs = jobs_that_left(tmp_path, 0.5)
        TrialsInBatches(
            study, jobs, launcher, StopRules(None, None, time.monotonic(), same_setup=True)
        ).run()
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "COMPLETE"]


def test_what_runs_of_several_kinds_lack_is_known_when_all_were_tried(tmp_path):
    broken = JobReturn(status=JobStatus.FAILED)
    broken.return_value = RunError("captions.wd.model: no weights found", FailureKind.SETUP)
    study, rules = study_in(tmp_path), StopRules(None, None, time.monotonic())
    with pytest.raises(SweepError, match=r"trial 0: captions.wd.model: no weights"):
        TrialsInBatches(study, jobs_that_left(tmp_path), launcher_that(broken), rules).run()
    assert [trial.state.name for trial in study.trials] == ["RUNNING"] * 3


def test_what_one_kind_of_runs_lacks_fails_those_alone(tmp_path):
    broken = JobReturn(status=JobStatus.FAILED)
    broken.return_value = RunError("captions.wd.model: no weights found", FailureKind.SETUP)
    returns = [broken, JobReturn(status=JobStatus.COMPLETED)]
    launcher = SimpleNamespace(launch=lambda overrides, initial_job_idx: returns[: len(overrides)])
    study, rules = study_in(tmp_path), StopRules(None, None, time.monotonic())
    TrialsInBatches(study, jobs_that_left(tmp_path, 0.5), launcher, rules).run()
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "FAIL"]
