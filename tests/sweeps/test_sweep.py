"""Sweeps as a person starts them, with a stand-in for the workers: what is asked, dropped, kept."""

import json
import math
import os
import signal
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
from mlflow import MlflowClient
from omegaconf import OmegaConf
from optuna.trial import TrialState
from PIL import Image

from conftest import FEW, SMALL
from fake_worker_pool import FakePool
from lorasweep import tracking
from lorasweep.cli import main
from lorasweep.config.conf_folder import conf_dir
from lorasweep.core import local_pages
from lorasweep.core.failures import FailureKind
from lorasweep.core.settings import SettingsError
from lorasweep.judging.pick_rule import rank
from lorasweep.lora_files import checkpoint as lora
from lorasweep.lora_files.checkpoint import Checkpoint
from lorasweep.runs import run_folder
from lorasweep.runs.session import Failure, Finished
from lorasweep.sweeps import multirun, sweep_limits
from lorasweep.sweeps import run_sweep as sweeping
from lorasweep.sweeps.study import study_storage
from lorasweep.tracking.read_candidates import deleted_trials

SWEEP = """\
# @package _global_
defaults:
  - override /hydra/sweeper: optuna
study:
  params:
    adapter.rank: choice(4,8)
    optimizer.unet_lr: tag(log,interval(1e-4,1e-2))
  sampler: random
  pruner: none
  n_trials: 4
"""


def by_rate(run, epoch):
    """A run whose best is its second epoch, the better the nearer its rate is to 1e-3."""
    value = 0.5 + 0.1 * abs(math.log10(run.optimizer.unet_lr) + 3) + 0.05 * abs(epoch - 2)
    drift = run.adapter.rank / 100
    return {"val/score": value, "val/loss_rel": value, "val/prior_drift": drift}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Run `lorasweep sweep mine` with fake workers; the study and the workers."""
    (tmp_path / "sweeps").mkdir()
    places = [f"output_root={tmp_path}/outputs", f"cache_dir={tmp_path}/cache"]

    def started(*overrides, script=by_rate, max_pack=2, text=SWEEP):
        workers = FakePool(script, max_pack)
        monkeypatch.setattr(multirun, "WorkerPool", lambda devices, max_pack: workers)
        (tmp_path / "sweeps" / "mine.yaml").write_text(text)
        base = ["experiment=demo", "trainer.max_train_epochs=4", *places]
        main.main(["sweep", "mine", "--config-dir", str(tmp_path), *base, *overrides])
        return study_of(tmp_path), workers

    return started


def study_of(tmp_path):
    journal = study_storage.find_journal(None, tmp_path / "outputs")
    opened = study_storage.open_storage(str(journal), tmp_path)
    return optuna.load_study(study_name=None, storage=opened)  # the only one


def test_a_sweep_fills_its_packs_and_goes_on_where_it_was(sweep, tmp_path, capsys):
    study, workers = sweep("study.n_trials=3")
    assert workers.most == 2
    assert [trial.value < 0.8 for trial in study.trials] == [True] * 3
    names = [run.name for run in workers.submitted]
    assert names == ["demo-0", "demo-1", "demo-2"]
    folder = tmp_path / "outputs" / "demo" / "mine"
    assert all((folder / str(n) / ".hydra" / "overrides.yaml").exists() for n in range(3))
    assert {run.sweep for run in workers.submitted} == {"demo-mine"}
    assert "pruning saved 0" in capsys.readouterr().out

    study, workers = sweep("study.n_trials=4")
    assert [run.name for run in workers.submitted] == ["demo-3"]
    assert len(study.trials) == 4

    _, workers = sweep("study.n_trials=4")
    assert workers.submitted == []


def test_a_sweep_whose_stdout_is_closed_goes_on_to_its_end(sweep, tmp_path, monkeypatch, capfd):
    ours, theirs = os.pipe()
    os.close(ours)  # as `| head` does
    with os.fdopen(theirs, "w") as stdout, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stdout)
        study, _ = sweep("study.n_trials=3")
        assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    (file,) = (tmp_path / "outputs").rglob("*.log")
    assert "trial 2: " in file.read_text()
    assert "Error" not in capfd.readouterr().err


def test_the_summary_of_a_sweep_may_meet_a_closed_stdout(sweep, monkeypatch):
    sweep("study.n_trials=1")
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as stdout, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stdout)
        sweep("study.n_trials=1")  # has ended: it says nothing but its summary


def test_the_best_is_none_whose_run_was_deleted_in_mlflow(sweep, tmp_path, capsys):
    study, workers = sweep("study.n_trials=3")
    runs = workers.submitted
    log_in_mlflow(runs, study)
    first = runs[0]
    client = MlflowClient(first.tracking.resolve(first.output_root))
    ids = {one.run: one.run_id for one in tracking.candidates(client.tracking_uri, "lorasweep")}
    best, *others = sorted(study.trials, key=lambda trial: trial.value)
    client.delete_run(ids[f"demo-{best.number}"])
    log_in_mlflow([runs[others[1].number]], study)  # its earlier attempt is deleted, not itself
    capsys.readouterr()
    sweep("study.n_trials=3")
    said = capsys.readouterr().out
    assert f"Best: trial {others[0].number}, epoch 2" in said
    assert f"Deleted in MLflow, so not to be chosen: trial {best.number}." in said
    left = tracking.candidates(client.tracking_uri, "lorasweep")  # what pick chooses among
    assert rank(left, "val/loss_rel")[0].file.run == f"demo-{others[0].number}"
    place = first.tracking, first.output_root, "demo-mine"
    assert deleted_trials(*place) == {best.number}
    (tmp_path / "outputs" / "mlflow.db").unlink()
    assert deleted_trials(*place) == set()


def log_in_mlflow(runs, study):
    """As their workers would: each trial's best."""
    with tracking.Tracker(runs[0].tracking, runs[0].output_root) as tracker:
        for run in runs:
            found = study.trials[run.number].user_attrs["best"]
            path = Path(found["path"])
            lora.write(path, {"lora_unet_x.alpha": torch.ones(())}, {})
            new = tracking.NewRun(
                name=run.name,
                sweep=run.sweep,
                output_dir=run.output_dir,
                params=run.params,
                config_yaml=run.config_yaml,
                overrides=run.overrides,
                image_dir=run.dataset.image_dir,
                dataset_digest="ab" * 32,
                tags={"lorasweep.trial": str(run.number)},
            )
            log = tracker.open_run(new)
            scored = Checkpoint(path=path, run=run.name, epoch=found["epoch"], step=2)
            log.log_epoch(scored, found["scores"], {})
            log.finish("FINISHED")


def test_what_would_train_without_a_sweep_is_tried_first(sweep):
    study, _ = sweep("adapter.rank=8", "study.n_trials=1")  # the demo's rate is 1e-3
    assert study.trials[0].params == {"optimizer.unet_lr": 1e-3}


def test_hydras_command_line_alone_is_a_sweep_too(tmp_path, monkeypatch):
    workers = FakePool(by_rate)
    monkeypatch.setattr(multirun, "WorkerPool", lambda devices, max_pack: workers)
    places = [f"output_root={tmp_path}/outputs", f"cache_dir={tmp_path}/cache"]
    asked = ["adapter.rank=choice(4,8,16)", "seed=1,2", "study.n_trials=3", *places]
    main.main(["train", "-m", "hydra/sweeper=optuna", "experiment=demo", *asked])
    assert study_of(tmp_path).study_name == "demo-optuna"
    assert [run.name for run in workers.submitted] == ["demo-0", "demo-1", "demo-2"]
    first, *others = [(run.adapter.rank, run.seed) for run in workers.submitted]
    assert first[0] == 16  # the demo's, and its seed 0 is not searched
    assert {first[1], *(seed for _, seed in others)} <= {1, 2}


def test_of_several_objectives_it_is_said_which_one_prunes(sweep, capsys):
    two = "study.objectives=[val/prior_drift,val/loss_rel]"
    sweep(two, "study.pruner=median", "study.n_trials=1")
    said = " ".join(capsys.readouterr().out.split())
    assert "several objectives: runs are pruned by the first of them, val/prior_drift" in said


def test_a_pruned_run_leaves_its_pack_and_another_takes_its_place(sweep):
    def script(run, epoch):
        return {"val/loss_rel": run.number + 1 / epoch, "val/prior_drift": 0.0}

    study, workers = sweep("study.pruner=asha", "study.startup_trials=0", script=script)
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE, *[TrialState.PRUNED] * 3]
    assert [workers.epochs[f"demo-{n}"] for n in range(4)] == [4, 2, 2, 2]
    assert study.trials[3].value == 3.5


def test_failures_are_told_with_reasons_and_passing_ones_tried_again(sweep, capsys):
    tried = []

    def script(run, epoch):
        tried.append(run.name)
        if tried == ["demo-0"]:
            return Failure(run=run.name, reason="worker was killed", kind=FailureKind.RETRY)
        if run.number == 1:
            return Failure(run=run.name, reason="loss is NaN")
        return by_rate(run, epoch)

    study, _workers = sweep("study.n_trials=3", script=script)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    reasons = [t.user_attrs.get("reason") for t in study.trials]
    assert reasons == ["worker was killed", "loss is NaN", None]
    assert "Trial 0 was begun again: worker was killed" in capsys.readouterr().out


def test_what_all_runs_lack_stops_the_sweep_until_it_is_mended(sweep, tmp_path, capsys):
    def script(run, epoch):
        return Failure.of_pack([run.name], SettingsError("captions.wd.model: no weights found"))[0]

    with pytest.raises(SystemExit):
        sweep("study.n_trials=3", script=script)
    assert "trial 0: captions.wd.model: no weights found" in capsys.readouterr().err
    assert {trial.state.name for trial in study_of(tmp_path).trials} == {"RUNNING"}

    study, _ = sweep("study.n_trials=3")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3


def test_what_all_runs_of_several_kinds_lack_stops_it_too_once_all_were_tried(sweep, tmp_path):
    def script(run, epoch):
        lacked = SettingsError(f"captions.of_{run.trainer.batch_size}: no weights found")
        return Failure.of_pack([run.name], lacked)[0]

    searched = "trainer.batch_size=choice(4,8)", "study.n_trials=4", "study.max_failures=2"
    with pytest.raises(SystemExit):
        sweep(*searched, script=script)
    assert {trial.state.name for trial in study_of(tmp_path).trials} == {"RUNNING"}

    study, _ = sweep(*searched)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4


def test_a_sweep_that_had_trained_nothing_may_begin_anew(sweep, tmp_path, capsys):
    def script(run, epoch):
        return Failure.of_pack([run.name], SettingsError("captions.wd.model: no weights found"))[0]

    with pytest.raises(SystemExit):
        sweep("study.n_trials=3", "seed=1", script=script)
    study, workers = sweep("study.n_trials=2", "seed=2")
    assert "demo-mine had trained nothing: it begins anew" in capsys.readouterr().out
    assert [trial.number for trial in study.trials] == [0, 1]
    assert {run.seed for run in workers.submitted} == {2}
    with pytest.raises(SystemExit):
        sweep("study.n_trials=2", "seed=3")
    assert "was begun with seed=2 (not given now)" in capsys.readouterr().err


def test_what_one_kind_of_runs_lacks_fails_those_alone(sweep):
    def script(run, epoch):
        if run.trainer.batch_size == 8:
            return Failure.of_pack([run.name], SettingsError("captions.wd.model: no weights"))[0]
        return by_rate(run, epoch)

    study, _ = sweep("trainer.batch_size=choice(4,8)", "study.n_trials=4", script=script)
    states = {trial.params["trainer.batch_size"]: trial.state.name for trial in study.trials}
    assert states == {4: "COMPLETE", 8: "FAIL"}
    assert study.trials[0].state.name == "FAIL"  # the demo's batch, before any had trained


def test_what_one_run_lacks_when_another_had_it_fails_that_trial_alone(sweep):
    def script(run, epoch):
        if run.number == 1 and epoch == 2:
            return Failure.of_pack([run.name], SettingsError("captions.wd.model: no weights"))[0]
        return by_rate(run, epoch)

    study, _ = sweep("study.n_trials=3", script=script)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_the_death_of_one_worker_does_not_end_a_sweep_whose_whole_pack_it_had(sweep):
    def script(run, epoch):
        if epoch == 1:
            return Failure(run=run.name, reason="worker was killed", kind=FailureKind.RETRY)
        return by_rate(run, epoch)

    study, _ = sweep("study.n_trials=8", script=script, max_pack=8)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 8


def test_a_sweep_whose_trials_all_fail_stops(sweep, capsys):
    def script(run, epoch):
        return Failure(run=run.name, reason="no such luck")

    with pytest.raises(SystemExit):
        sweep("study.max_failures=2", "study.n_trials=9", script=script)
    said = capsys.readouterr()
    assert "2 trials failed one after another" in said.err
    assert "no such luck" in said.err


def test_no_trial_begins_when_the_time_is_up_and_those_that_train_go_on(sweep, monkeypatch, caplog):
    hours = [0.0]
    clock = SimpleNamespace(monotonic=lambda: hours[0] * 3600)
    monkeypatch.setattr(sweep_limits, "time", clock)
    monkeypatch.setattr(sweeping, "time", clock)

    def script(run, epoch):
        hours[0] += 0.2  # an epoch of a run
        return by_rate(run, epoch)

    study, workers = sweep("study.max_hours=1", "study.n_trials=9", script=script)
    assert [run.name for run in workers.submitted] == ["demo-0", "demo-1"]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    hours[0] = 0.0
    study, _ = sweep("study.max_hours=null", "study.n_trials=4")  # the same command goes on
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4


GRID = """\
# @package _global_
defaults:
  - override /hydra/sweeper: optuna
study:
  params: {PARAMS}
  sampler: grid
  pruner: none
"""


def test_while_a_trial_waits_that_can_share_no_pack_another_takes_the_place(sweep):
    params = "{adapter.rank: 'choice(16,8,4)', trainer.batch_size: 'choice(1,2)'}"
    study, workers = sweep(text=GRID.replace("{PARAMS}", params))
    assert [run.number for run in workers.submitted] == [0, 2, 1, 3, 4, 5]
    assert workers.most == 2
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 6


def test_no_more_than_a_pack_of_trials_wait(sweep, tmp_path):
    asked = []

    def script(run, epoch):
        asked.append(len(study_of(tmp_path).trials))
        return by_rate(run, epoch)

    params = "{trainer.batch_size: 'choice(1,2,3,4,5)'}"
    study, _ = sweep(text=GRID.replace("{PARAMS}", params), script=script)
    assert asked[0] == 3
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 5


def test_a_trial_that_waits_for_room_does_not_begin_when_too_many_have_failed(sweep, monkeypatch):
    tried = []

    def script(run, epoch):
        tried.append(run.name)
        return Failure(run=run.name, reason="loss is NaN")

    def has_room_for(pool, run):  # no other can join: the second trial is asked for, and waits
        return not pool._live

    monkeypatch.setattr(FakePool, "has_room_for", has_room_for)
    with pytest.raises(SystemExit):
        sweep("study.max_failures=1", "study.n_trials=3", script=script)
    assert tried == ["demo-0"]


@pytest.mark.parametrize(
    "how",
    [
        ["hydra/launcher=basic", "study.batch_size=1"],
        ["launcher.pack_via=joblib", "study.batch_size=2"],
    ],
    ids=["hydras", "packs"],
)
def test_jobs_of_other_launchers_report_themselves_and_stop_when_pruned(
    tmp_path, cache_dir, how, shared_base
):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text(SWEEP)
    places = [f"output_root={tmp_path}/outputs", f"cache_dir={cache_dir}"]
    small = [
        *(one for one in SMALL if not one.startswith("sampling.")),
        "sampling.every_n_epochs=0",
        FEW,
    ]
    asked = ["study.n_trials=2", "study.pruner=asha", "study.min_epochs=1"]
    rates = ["optimizer.unet_lr=choice(1e-3,1e-6)", "study.sampler=grid", "adapter.rank=4"]
    # two held-out images tell nothing of captions
    by_loss = ["study.objectives=[val/loss_rel]", "study.startup_trials=0"]
    given = [*small, *places, *asked, *rates, *how, *by_loss]
    main.main(["sweep", "mine", "--config-dir", str(tmp_path), *given])
    study = study_of(tmp_path)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert [trial.user_attrs["epochs"] for trial in study.trials] == [2, 1]
    store = f"sqlite:///{tmp_path}/outputs/mlflow.db"
    known = [(one.run, one.epoch) for one in tracking.candidates(store, "lorasweep", "demo-mine")]
    assert sorted(known) == [("demo-0", 1), ("demo-0", 2), ("demo-1", 1)]


def test_packs_as_jobs_leave_their_scores_in_their_folders_and_a_lost_one_is_tried_again(
    sweep, monkeypatch
):
    launched = []

    def train_by_jobs(packs, engine, options, folder, study):
        launched.append([[run.name for run in pack] for pack in packs])
        if len(launched) == 1:
            lost = packs[-1]
            return [
                Failure(run=run.name, reason="node down", kind=FailureKind.RETRY) for run in lost
            ]
        for run in (run for pack in packs for run in pack):
            (run.output_dir / "scores").mkdir(parents=True)
            for epoch in (1, 2, 3):  # MLflow knows of none
                scored = {"scores": by_rate(run, epoch), "terms": {}}
                file = run.output_dir / "scores" / f"{epoch:06d}.json"
                file.write_text(json.dumps(scored))
        return []

    monkeypatch.setattr(multirun, "train_by_jobs", train_by_jobs)
    study, _ = sweep("launcher.pack_via=ray", "launcher.max_pack=2", "study.n_trials=2")
    assert launched == [[["demo-0", "demo-1"]]] * 2  # by the study: launcher.retries are not added
    assert [trial.user_attrs["attempt"] for trial in study.trials] == [1, 1]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    for trial in study.trials:
        best = trial.user_attrs["best"]
        assert best["path"].endswith(f"mine/{trial.number}/demo-{trial.number}-000002.safetensors")


def test_a_sweep_with_packs_as_jobs_that_is_stopped_says_once_how_to_go_on(
    sweep, monkeypatch, capsys
):
    def train_by_jobs(packs, engine, options, folder, study):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(multirun, "train_by_jobs", train_by_jobs)
    with pytest.raises(SystemExit) as stopped:
        sweep("launcher.pack_via=ray", "study.n_trials=2")
    assert stopped.value.code == 130
    assert capsys.readouterr().err.count("Go on with: lorasweep resume") == 1


def test_a_warm_start_says_once_how_many_trials_fit(sweep, capsys):
    sweep("study.n_trials=3", "study.name=old")
    narrow = "optimizer.unet_lr=0.001"
    known = "study.warm_start=demo-old"
    capsys.readouterr()
    sweep("study.n_trials=1", "study.name=mine", known)
    assert "3 of 3 trials of demo-old fit" in capsys.readouterr().out
    sweep("study.n_trials=2", "study.name=mine", known)
    assert "warm start" not in capsys.readouterr().out
    sweep("study.n_trials=1", "study.name=narrow", narrow, known)
    assert "0 of 3 trials of demo-old fit" in capsys.readouterr().out
    sweep("study.n_trials=2", "study.name=mine", "study.warm_start=demo-narrow")
    said = " ".join(capsys.readouterr().out.split())
    assert "took the trials of demo-old when it began; those of demo-narrow are not taken" in said


def test_a_sweep_is_not_warmed_by_itself(sweep, tmp_path, capsys):
    sweep("study.n_trials=1", "study.name=old")
    own = tmp_path / "outputs" / "demo" / "old"
    for known in ("old", "demo-old", own, own / study_storage.JOURNAL):
        with pytest.raises(SystemExit):
            sweep("study.n_trials=2", "study.name=old", f"study.warm_start={known}")
        assert "there is no such sweep but this one with a study" in capsys.readouterr().err
    sweep("study.n_trials=1", "study.name=old", "name=other", "study.warm_start=old")
    assert "1 of 1 trials of old fit" in capsys.readouterr().out


def test_a_sweep_in_a_storage_is_not_warmed_by_itself(sweep, tmp_path, capsys):
    kept = [f"study.storage={tmp_path}/kept.journal", "study.name=old", "study.n_trials=1"]
    with pytest.raises(SettingsError):  # the sweep has no journal of its own
        sweep(*kept)
    for known in ("demo-old", tmp_path / "kept.journal"):
        with pytest.raises(SystemExit):
            sweep(*kept, f"study.warm_start={known}")
        assert "no such sweep but this one" in capsys.readouterr().err


@pytest.fixture
def dashboard(monkeypatch):
    """What optuna-dashboard is given to show: names of studies, and the port."""
    module, shown = pytest.importorskip("optuna_dashboard"), []
    monkeypatch.setattr(module, "wsgi", optuna.get_all_study_names)
    monkeypatch.setattr(local_pages, "serve", lambda names, port: shown.append((names, port)))
    return shown


def test_the_dashboard_is_given_the_sweeps_study(sweep, tmp_path, dashboard):
    sweep("study.n_trials=2")
    places = [f"output_root={tmp_path}/outputs", "experiment=demo"]
    with pytest.raises(SystemExit) as ended:
        main.main(["ui", "--optuna", "demo-mine", "--port", "8123", *places])
    assert ended.value.code == 0
    assert dashboard == [(["demo-mine"], 8123)]


def test_a_setting_behind_the_dashboards_flag_is_no_sweeps_name(sweep, tmp_path, dashboard):
    kept = tmp_path / "kept.journal"
    with pytest.raises(SettingsError):  # the sweep has no journal of its own
        sweep("study.n_trials=1", f"study.storage={kept}")
    with pytest.raises(SystemExit) as ended:
        main.main(["ui", "--optuna", f"++study.storage={kept}", "experiment=demo"])
    assert ended.value.code == 0
    assert [names for names, _ in dashboard] == [["demo-mine"]]


def test_what_a_killed_driver_left_goes_on_under_its_number(sweep, tmp_path):
    def script(run, epoch):
        if len(run.name) and epoch == 2:
            raise KeyboardInterrupt  # stands in for a kill: nothing is told
        return by_rate(run, epoch)

    with pytest.raises(SystemExit):
        sweep("study.n_trials=2", script=script)
    left = [trial.params for trial in study_of(tmp_path).trials]
    study, workers = sweep("study.n_trials=2")
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE"]
    assert [trial.params for trial in study.trials] == left
    assert [run.number for run in workers.submitted] == [0, 1]


def test_a_run_that_a_killed_driver_had_dropped_is_told_as_pruned(sweep, monkeypatch):
    epoch_of = FakePool._epoch

    def _epoch(workers, run):
        found = epoch_of(workers, run)
        if run.number == 0:
            del workers._live[run.name]
            found.append(Finished(run=run.name, dropped=True))
        return found

    monkeypatch.setattr(FakePool, "_epoch", _epoch)
    study, _ = sweep("study.n_trials=2")
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "COMPLETE"]
    assert study.trials[0].user_attrs["epochs"] == 1


def test_what_a_killed_driver_had_dropped_is_not_trained_by_packs_as_jobs(sweep, monkeypatch):
    def script(run, epoch):
        if epoch == 1:
            return by_rate(run, epoch)
        settings = run_folder.settings_digest(run.params)
        record = {"name": run.name, "status": "dropped", "settings": settings, "data": ""}
        (run.output_dir / "run.json").write_text(json.dumps(record))
        raise KeyboardInterrupt  # stands in for a kill: the study is not told

    trained = []

    def train_by_jobs(packs, engine, options, folder, study):
        trained.extend(run.name for pack in packs for run in pack)
        return []

    with pytest.raises(SystemExit):
        sweep("study.n_trials=1", script=script)
    monkeypatch.setattr(multirun, "train_by_jobs", train_by_jobs)
    study, _ = sweep("launcher.pack_via=joblib", "study.n_trials=1")
    assert trained == []
    assert [trial.state.name for trial in study.trials] == ["PRUNED"]
    assert study.trials[0].user_attrs["epochs"] == 1


def test_hydras_own_grammar_on_the_command_line_is_searched(sweep, capsys):
    study, _ = sweep(
        "adapter.rank=choice(16,32)",
        "seed=range(0,3)",
        "optimizer.text_encoder_lr=interval(0.0001,0.0002)",
        "trainer.max_train_epochs=int(interval(2,4))",
        "study.n_trials=2",
    )
    trial = study.trials[1]
    assert trial.params.keys() == {
        "adapter.rank",
        "optimizer.unet_lr",
        "seed",
        "optimizer.text_encoder_lr",
        "trainer.max_train_epochs",
    }
    assert trial.params["adapter.rank"] in (16, 32)
    assert isinstance(trial.params["trainer.max_train_epochs"], int)
    assert "seed is searched: random takes it" in " ".join(capsys.readouterr().out.split())


def test_a_shuffled_range_has_every_point(sweep):
    asked = ["adapter.rank=shuffle(range(1,10))", "optimizer.unet_lr=1e-3", "study.sampler=grid"]
    study, _ = sweep(*asked, "study.n_trials=null")
    assert sorted(trial.params["adapter.rank"] for trial in study.trials) == list(range(1, 10))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["study.n_trial=3"], "study.n_trial: there is no such setting"),
        (["study.sampler=bayes"], "study.sampler=bayes"),
        (["study.objectives=val/loss_rel"], "val/loss_rel: give a list, [val/loss_rel]"),
        (["study.enqueue=3"], "study.enqueue=3: give a list of points"),
        (["~study.params"], "study.params can't be removed"),
        (["hydra/launcher=baic"], "choose one of basic, "),
        (["adapter.rnk=choice(1,2)"], "adapter.rnk"),
        (["adapter.rank=choice(four,8)"], "adapter.rank=four"),
        (["adapter=choice(lora,nolora)"], "adapter=nolora: there is no such option"),
        (["study.enqueue=[{adapter.rank: 5}]"], "study.enqueue"),
        (["study.vars.ratio=1"], "write ++study.vars.ratio"),
        (["study.conditions={adapter.rank: 'seed=1'}"], "study.conditions.adapter.rank"),
        (["dataset.image_dir=/nowhere"], "/nowhere"),
        (["captions=choice([demo],[demo,sidecar])"], "captions.sidecar.suffix=.txt: no caption"),
        (["adapter.rank=tag(log,range(4,64))"], "adapter.rank: tag log belongs to interval"),
        (["adapter.rank=tag(log,choice(4,64))"], "adapter.rank: tag log belongs to interval"),
        (["adapter.rank=tag(lg,interval(4,64))"], "tag lg is unknown"),
        (["study.warm_start=none-such"], "none-such: there is no such sweep"),
        (["study.objectives=[val/los]"], "study.objectives: the runs have no score val/los; they"),
        (["study.constraints={val/x: 1}"], "study.constraints: the runs have no score val/x"),
        (["dataset.num_holdout=0"], "no score val/score; they have val/prior_drift"),
        (["study.objectives=[val/gap]", "study.pruner=wilcoxon"], "val/gap has no values by image"),
    ],
)
def test_mistakes_end_in_one_line_before_any_work(sweep, capsys, overrides, said):
    def script(run, epoch):
        raise AssertionError("it has begun to train")

    with pytest.raises(SystemExit) as ended:
        sweep(*overrides, script=script)
    assert ended.value.code == 2
    errors = capsys.readouterr().err.strip()
    assert said in errors
    assert len(errors.splitlines()) == 1


def test_images_that_cannot_be_decoded_end_a_sweep_before_its_first_trial(sweep, tmp_path, capsys):
    image = BytesIO()
    Image.effect_noise((64, 64), 50).save(image, "PNG")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(image.getvalue()[:-1000])
    with pytest.raises(SystemExit):
        sweep(f"dataset.image_dir={tmp_path}/images")
    assert "1 bad images" in (said := capsys.readouterr()).err
    assert "broken.png" in said.err
    assert "trial 0" not in said.out


def test_a_sweep_reads_its_files_once(sweep, tmp_path):
    def script(run, epoch):
        (tmp_path / "sweeps" / "mine.yaml").write_text(f"{SWEEP}seed: 7\n")
        return by_rate(run, epoch)

    of_its_own = f"{SWEEP}# not what kept_configs has kept from an earlier test\n"
    _, workers = sweep(script=script, text=of_its_own)
    assert [run.seed for run in workers.submitted] == [0] * 4


def test_another_set_of_overrides_is_another_sweep(sweep, capsys):
    sweep("study.n_trials=1")
    with pytest.raises(SystemExit):
        sweep("study.n_trials=1", "dataset.num_images=5")
    said = capsys.readouterr().err
    assert "demo-mine was begun without dataset.num_images=5; give another study.name (and" in said
    sweep("study.n_trials=1", "study.name=small", "dataset.num_images=5")
    with pytest.raises(SystemExit):
        sweep("study.n_trials=1", "study.name=small", "dataset.num_images=6")
    said = capsys.readouterr().err
    changed = "with dataset.num_images=5 (not given now) and without dataset.num_images=6; give"
    assert f"demo-small was begun {changed}" in said


def test_an_edited_file_is_another_sweep_which_names_what_was_edited(sweep, capsys):
    sweep("study.n_trials=1")
    with pytest.raises(SystemExit):
        sweep("study.n_trials=2", text=f"{SWEEP}dataset:\n  num_images: 5\n")
    said = capsys.readouterr().err.strip()
    assert "demo-mine was begun with dataset.num_images=30, not 5; give another study.name" in said
    assert len(said.splitlines()) == 1


def test_an_edited_option_that_only_some_trials_have_is_noticed_too(sweep, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    tiny = tmp_path / "adapter" / "tiny.yaml"
    tiny.write_text((conf_dir() / "adapter" / "lora.yaml").read_text())
    sweep("adapter=choice(lora,tiny)", "study.n_trials=1")
    edited = tiny.read_text().replace("rank_dropout: 0.0", "rank_dropout: 0.5")
    assert edited != tiny.read_text()
    tiny.write_text(edited)
    with pytest.raises(SystemExit):
        sweep("adapter=choice(lora,tiny)", "study.n_trials=2")
    said = capsys.readouterr().err
    assert "was begun with " in said and "adapter=tiny" in said
    assert "adapter.rank_dropout=0.0, not 0.5" in said


VARS = f"""\
{SWEEP}  vars:
    half: 0.5
optimizer:
  text_encoder_lr: ${{times:${{.unet_lr}},${{study.vars.half}}}}
"""


def test_a_variable_that_is_not_searched_counts_as_a_setting(sweep, capsys):
    sweep("study.n_trials=1", text=VARS)
    with pytest.raises(SystemExit):
        sweep("study.n_trials=2", "study.vars.half=0.25", text=VARS)
    assert "demo-mine was begun without study.vars.half=0.25; give" in capsys.readouterr().err


def test_how_and_where_a_sweep_runs_may_change(sweep, tmp_path):
    sweep("study.n_trials=1")
    text = f"{SWEEP}launcher:\n  max_pack: 3\n"
    where = ["trainer.device=cpu", "pick.by=val/gap", f"cache_dir={tmp_path}/other"]
    _, workers = sweep("study.n_trials=2", "trainer.keep_states=1", *where, text=text)
    assert [run.name for run in workers.submitted] == ["demo-1"]


def test_resume_goes_on_after_other_overrides_were_refused(sweep, tmp_path, capsys):
    sweep("study.n_trials=1")
    with pytest.raises(SystemExit):
        sweep("study.n_trials=1", "dataset.num_images=5")
    folder = tmp_path / "outputs" / "demo" / "mine"
    said = OmegaConf.load(folder / "multirun.yaml").hydra.overrides.task
    assert "dataset.num_images=5" not in said
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main.main(["resume", str(folder)])
    assert ended.value.code == 0
    assert "demo-mine: 1 trials" in capsys.readouterr().out


def test_resume_takes_a_sweeps_name_as_messages_print_it(sweep, tmp_path, capsys):
    sweep("study.n_trials=1")
    assert "lorasweep pick demo-mine" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main.main(["resume", "demo-mine", f"output_root={tmp_path}/outputs"])
    assert not done.value.code
    assert "demo-mine: 1 trials" in capsys.readouterr().out


def test_a_second_driver_is_refused(sweep, tmp_path, capsys):
    folder = tmp_path / "outputs" / "demo" / "mine"
    with study_storage.only_driver(folder, "demo-mine"), pytest.raises(SystemExit):
        sweep()
    assert "demo-mine is being driven" in capsys.readouterr().err


def test_the_newest_journal_is_the_one_that_is_shown(tmp_path):
    for name in ("a", "b"):
        path = tmp_path / "demo" / name / study_storage.JOURNAL
        path.parent.mkdir(parents=True)
        path.write_text("")
    assert study_storage.find_journal("demo-a", tmp_path).parent.name == "a"
    assert study_storage.find_journal(str(tmp_path / "demo" / "b"), Path("x")).parent.name == "b"
