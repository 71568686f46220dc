"""Runs that were killed, stopped or ran out of disk go on as if nothing had happened."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from mlflow import MlflowClient

from command_line import exit_code
from conftest import SMALL
from lorasweep.cli import main
from lorasweep.config.begun_command import begun_by
from lorasweep.config.build_run import build_run
from lorasweep.config.compose import compose
from lorasweep.core.atomic_write import DiskFullError
from lorasweep.core.failures import FailureKind
from lorasweep.core.interrupts import Interrupts
from lorasweep.core.settings import SettingsError
from lorasweep.lora_files import checkpoint
from lorasweep.runs import run_folder
from lorasweep.runs.session import EpochReport, Failure, Finished, Session, run_pack
from lorasweep.tracking import candidates, records, tracker
from lorasweep.tracking.store import create_store
from lorasweep.tracking.sync import unsent
from lorasweep.training import saved_states
from lorasweep.training.native_trainer import NativeTraining
from lorasweep.training.training_run import Stopped

pytestmark = pytest.mark.usefixtures("shared_base")
EPOCHS = 2
KILLS = int(os.environ.get("LORASWEEP_KILLS", "8"))


TINY = [
    *SMALL,
    "dataset.num_images=2",
    "dataset.num_holdout=1",
    "trainer.batch_size=3",
    "adapter.targets=[unet.*.attn2.*]",
    "optimizer.text_encoder_lr=0",
    f"trainer.max_train_epochs={EPOCHS}",
    "sampling.num_inference_steps=1",
    "sampling.every_n_epochs=2",
    "metrics.validation.max_tuples=2",
    "metrics.validation.num_probe_images=1",
    "metrics.prior_drift.num_timesteps=1",
]
STEPS = 2  # of an epoch


@pytest.fixture(scope="module")
def make_pack(cache_dir):
    """Two unequal runs of a pack, whose everything lies below a folder of their own."""

    def make(folder):
        places = [f"output_root={folder}", f"cache_dir={cache_dir}"]
        return [
            build_run(
                compose([*TINY, *places, f"adapter.rank={rank}", f"seed={number}"]),
                output_dir=folder / str(number),
                sweep="s",
                number=number,
            )
            for number, rank in enumerate((2, 4))
        ]

    return make


@pytest.fixture(scope="module")
def unbroken(make_pack, base, tmp_path_factory):
    """What a pack comes to that nobody broke off, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("unbroken")
    create_store(f"sqlite:///{folder}/other.db", "warm", folder)  # loads what all children need
    runs = make_pack(folder)
    began = time.monotonic()
    assert os.waitpid(in_a_process(lambda: train(runs, base)), 0)[1] == 0
    seconds = time.monotonic() - began
    return outcome(folder, runs), seconds


def in_a_process(work):
    """Fork: the child starts with all that is loaded, and can be killed at any moment."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def train(runs, base):
    with Session(runs[0], load=lambda *_: base) as session:
        for reports in session.train(runs):
            assert not any(isinstance(report, Failure) for report in reports)


def outcome(folder, runs):
    """All that is left in the end: files, weights, scores, and what MLflow knows."""
    paths = [path for run in runs for path in run.output_dir.rglob("*") if path.is_file()]
    assert unsent(folder) == []
    files = sorted(str(p.relative_to(folder)) for p in paths if p.parent.name != ".tracking")
    weights = {
        path.name: checkpoint.data_hash(path)
        for run in runs
        for path in run.output_dir.glob("*.safetensors")
    }
    return files, weights, logged(folder)


def logged(folder):
    """Of each run in MLflow: status, every metric's (step, value), epochs and pictures."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "lorasweep"]
    found = []
    for run in client.search_runs([experiment.experiment_id]):
        metrics = {
            key: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key))
            for key in run.data.metrics
            if key != "train/it_per_s"
        }
        pictures = Counter(
            file.path.split("+timestamp")[0]
            for file in client.list_artifacts(run.info.run_id, "images")
        )
        epochs = sorted(
            one.epoch
            for one in candidates(f"sqlite:///{folder}/mlflow.db", "lorasweep")
            if one.run_id == run.info.run_id
        )
        found.append((run.info.run_name, run.info.status, metrics, pictures, epochs))
    return sorted(found, key=lambda one: one[0])


def unfinished(run):
    """The steps of the running epoch that are on the disk."""
    path = run.output_dir / "epochs" / "unfinished.json"
    return json.loads(path.read_text())["steps"] if path.is_file() else []


def killed_at_random(unbroken, make_pack, base, tmp_path, kills):
    """Kill packs until all kills are made; each ends as the one that nobody killed."""
    expected, seconds = unbroken
    moments, made, packs = random.Random(0), 0, 0
    while made < kills:
        folder = tmp_path / f"killed{packs}"
        runs, ended = make_pack(folder), False
        while not ended:
            child = in_a_process(lambda runs=runs: train(runs, base))
            if made < kills:
                time.sleep(moments.uniform(0.0, 0.6) * seconds)
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            ended = not os.WIFSIGNALED(status)
            made += not ended
        assert os.WEXITSTATUS(status) == 0
        assert outcome(folder, runs) == expected
        packs += 1


def test_a_pack_killed_at_random_moments_ends_as_if_it_had_not_been(
    unbroken, make_pack, base, tmp_path
):
    killed_at_random(unbroken, make_pack, base, tmp_path, KILLS)


@pytest.mark.slow
def test_a_pack_killed_a_hundred_times_ends_as_if_it_had_not_been(
    unbroken, make_pack, base, tmp_path
):
    killed_at_random(unbroken, make_pack, base, tmp_path, 100)


WRITES = ["fsync", "replace", pytest.param("unlink", marks=pytest.mark.slow)]


@pytest.mark.parametrize("call", WRITES)
def test_a_death_at_any_call_that_changes_the_disk_loses_nothing(
    call, unbroken, make_pack, base, tmp_path
):
    """The child dies before its n-th such call, for every n there is in an epoch or so."""
    runs = make_pack(tmp_path / "broken")
    number, ended = 0, False
    while not ended:
        number += 5  # each go makes some progress, at another place

        def work(number=number):
            real, left = getattr(os, call), number

            def dying(*args, **kwargs):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            setattr(os, call, dying)
            train(runs, base)

        status = os.waitpid(in_a_process(work), 0)[1]
        ended = not os.WIFSIGNALED(status)
    assert status == 0
    assert outcome(tmp_path / "broken", runs) == unbroken[0]


def test_a_death_between_the_scores_of_two_runs_changes_neither(
    unbroken, make_pack, base, tmp_path, monkeypatch
):
    """What one has logged isn't lost, and the other is scored beside it, as it would have been."""
    runs = make_pack(tmp_path / "broken")
    write_epoch = records.RunRecords.write_epoch

    def dying(of_run, record):
        write_epoch(of_run, record)
        if record.epoch == EPOCHS:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(records.RunRecords, "write_epoch", dying)
    assert os.WIFSIGNALED(os.waitpid(in_a_process(lambda: train(runs, base)), 0)[1])
    monkeypatch.undo()
    assert os.waitpid(in_a_process(lambda: train(runs, base)), 0)[1] == 0
    assert outcome(tmp_path / "broken", runs) == unbroken[0]


def test_steps_are_logged_as_they_are_done(make_pack, base, tmp_path, monkeypatch):
    """The curves of an epoch that takes an hour are seen while it runs."""
    monkeypatch.setattr(tracker, "FLUSH_VALUES", 1)
    runs, seen = make_pack(tmp_path), []
    take_step = NativeTraining.step

    def look(training, group):
        seen.append([len(unfinished(run)) for run in runs])
        return take_step(training, group)

    monkeypatch.setattr(NativeTraining, "step", look)
    train(runs, base)
    assert seen == [[0, 0], [1, 1]] * EPOCHS


class Signalled:
    """Sends this process a signal within a step of the training, as a person would."""

    def __init__(self, monkeypatch, step, number=signal.SIGINT):
        take_step = NativeTraining.step
        self.finished = []

        def signalled(training, group):
            if training.pack.states[0].num_steps == step - 1:
                os.kill(os.getpid(), number)
            records = take_step(training, group)
            self.finished.append(training.pack.states[0].num_steps)
            return records

        monkeypatch.setattr(NativeTraining, "step", signalled)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_step_and_the_run_goes_on_from_it(
    number, unbroken, make_pack, tmp_path, monkeypatch, capsys
):
    runs = make_pack(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        told = Signalled(patch, step=STEPS + 1, number=number)
        with (
            pytest.raises(Stopped),
            run_folder.stoppable(runs[0].output_dir) as interrupts,
        ):
            list(run_pack(runs, interrupts))
    assert told.finished[-1] == STEPS + 1
    error = capsys.readouterr().err
    assert f"lorasweep resume {runs[0].output_dir}" in error
    assert {one.snapshot.num_steps for one in saved_states.together(places(runs)).values()} == {
        STEPS + 1
    }
    found = list(run_pack(runs))
    assert epochs(found) == [1, 1, 2, 2]  # the first again, for whoever follows the run
    assert outcome(tmp_path / "stopped", runs) == unbroken[0]


def places(runs):
    return {run.name: run.output_dir for run in runs}


SECOND = """
import os, signal
from lorasweep.core.interrupts import Interrupts
with Interrupts(signal.SIGINT) as interrupts, interrupts.calling(lambda: None):
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never said", flush=True)
"""


def test_a_second_signal_ends_at_once():
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stdout == "still here\n"
    assert "once more stops at once" in done.stderr


def test_between_steps_a_signal_stops_at_once():
    with pytest.raises(KeyboardInterrupt), Interrupts(signal.SIGTERM):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # never over


@pytest.mark.parametrize("file", ["000002.safetensors", ".state"])
def test_a_full_disk_stops_the_runs_with_whole_states(
    file, unbroken, make_pack, tmp_path, monkeypatch
):
    runs = make_pack(tmp_path / "full")
    with monkeypatch.context() as patch:
        fill_disk(patch, file, after=4)
        with pytest.raises(DiskFullError, match="No space left"):
            list(run_pack(runs))
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(saved_states.together(places(runs))) == 2
    list(run_pack(runs))
    assert outcome(tmp_path / "full", runs) == unbroken[0]


def fill_disk(patch, ending, after):
    """From the `after`-th file on whose name ends so (the first, for checkpoints), no room."""
    real, seen = os.replace, Counter()

    def no_room(source, target):
        if str(target).endswith(ending):
            seen[ending] += 1
            if ending != ".state" or seen[ending] >= after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(source, target)

    patch.setattr(os, "replace", no_room)


def test_two_processes_do_not_train_in_one_folder(make_run, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0)
    run = make_run("trainer.max_train_epochs=1")
    held = run_folder.lock(run.output_dir)
    (failure,) = run_pack([run])
    assert isinstance(failure, Failure)
    assert "another process trains here" in failure.reason
    assert failure.kind == FailureKind.RETRY  # a worker that was killed may be on its way out
    held.release()
    assert any(isinstance(report, Finished) for report in run_pack([run]))


def test_a_run_whose_log_another_worker_still_sends_may_be_tried_again(make_run, monkeypatch):
    monkeypatch.setattr(records, "LOCK_SECONDS", 0)
    run = make_run("trainer.max_train_epochs=1")
    held = records.RunRecords(run.output_dir.resolve())
    held.acquire()
    (failure,) = run_pack([run])
    assert "in use by another process that logs or sends this run" in failure.reason
    assert failure.kind == FailureKind.RETRY
    held.release()
    assert any(isinstance(report, Finished) for report in run_pack([run]))


def test_a_dropped_run_is_told_again_to_a_sweep_and_trained_to_its_end_without_one(make_run):
    run = make_run()
    for _ in range(2):  # the second: for a driver that was killed before it told the study
        found = []
        with Session(run) as session:
            for reports in session.train([run]):
                found += reports
                if any(isinstance(report, EpochReport) for report in reports):
                    session.drop(run.name)
        assert epochs(found) == [1]
        assert not (run.output_dir / "demo-000002.safetensors").exists()
    assert found[-1] == Finished(run=run.name, dropped=True)
    assert len(logged(run.output_root)) == 1
    assert epochs(run_pack([run])) == [1, 2]


def epochs(reports):
    return [report.checkpoint.epoch for report in reports if isinstance(report, EpochReport)]


def test_a_run_that_was_begun_otherwise_is_not_gone_on_with(make_run, monkeypatch):
    run = make_run("trainer.max_train_epochs=3")
    with monkeypatch.context() as patch:
        Signalled(patch, step=5)
        with pytest.raises(Stopped), run_folder.stoppable(run.output_dir) as interrupts:
            list(run_pack([run], interrupts))
    (failure,) = run_pack([make_run("trainer.max_train_epochs=3", "seed=5")])
    assert "begun with other settings" in failure.reason
    record = json.loads((run.output_dir / "run.json").read_text())
    changed = {**record, "data": "other"}
    (run.output_dir / "run.json").write_text(json.dumps(changed))
    (failure,) = run_pack([run])
    assert "images or captions have changed" in failure.reason


def test_what_could_not_fit_the_disk_is_said_before_training(make_run, monkeypatch):
    run = make_run("trainer.max_train_epochs=1000")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    (failure,) = [one for one in run_pack([run]) if isinstance(one, Failure)]
    assert "trainer.save_dtype=fp16" in failure.reason
    assert not list(run.output_dir.glob("*.safetensors"))


@pytest.fixture
def command(tmp_path, cache_dir, monkeypatch):
    """`lorasweep train` on the small demo, in a folder of its own; its first words."""
    monkeypatch.chdir(tmp_path)
    return ["train", *TINY, f"cache_dir={cache_dir}", "adapter.rank=2", "name=mine"]


def broken_off(command, monkeypatch):
    with monkeypatch.context() as patch:
        Signalled(patch, step=STEPS + 1)
        with pytest.raises(SystemExit) as stopped:
            main.main(command)
    assert stopped.value.code == 130


def test_the_same_command_goes_on_and_another_begins_another_run(command, monkeypatch, tmp_path):
    broken_off(command, monkeypatch)
    (folder,) = (tmp_path / "outputs" / "mine").iterdir()
    assert not (folder / "mine-000002.safetensors").exists()
    main.main(command)
    assert (folder / "mine-000002.safetensors").exists()
    assert list((tmp_path / "outputs" / "mine").iterdir()) == [folder]
    main.main([*command, "seed=1"])
    assert len(list((tmp_path / "outputs" / "mine").iterdir())) == 2


def test_a_run_goes_on_on_another_device():
    here, there, other = (
        run_folder.settings_digest({"captions.wd14.device": device, "seed": seed})
        for device, seed in (("cpu", 0), ("cuda", 0), ("cuda", 1))
    )
    assert here == there != other


@pytest.mark.parametrize("target", ["mine", "folder"])
def test_resume_takes_a_name_or_a_folder(target, command, monkeypatch, tmp_path, capsys):
    broken_off(command, monkeypatch)
    (folder,) = (tmp_path / "outputs" / "mine").iterdir()
    with pytest.raises(SystemExit) as done:
        main.main(["resume", str(folder) if target == "folder" else target])
    assert not done.value.code
    assert (folder / "mine-000002.safetensors").exists()
    with pytest.raises(SystemExit) as ended:
        main.main(["resume", "mine"])
    assert ended.value.code == 2
    assert "mine has ended" in capsys.readouterr().err


def resumed(*words):
    with pytest.raises(SystemExit) as done:
        main.main(["resume", *words])
    return done.value.code or 0


def begun_in(tmp_path, name="mine"):
    (folder,) = (tmp_path / "outputs" / name).iterdir()
    return folder


def test_a_run_that_has_ended_is_trained_further_as_if_it_had_been_longer_from_the_start(
    command, tmp_path
):
    """Weights, scores and curves to the bit; MLflow keeps its run, and learns its new config."""
    places = ["hydra.run.dir=once", "output_root=once"]
    main.main([*command, *places])  # two epochs at once
    main.main([*command, "trainer.max_train_epochs=1"])
    folder = begun_in(tmp_path)
    ((run, *_),) = [of(tmp_path / "outputs")]
    assert resumed(str(folder), f"trainer.max_train_epochs={EPOCHS}") == 0
    ((again, config),) = [of(tmp_path / "outputs")]
    assert again == run
    assert yaml.safe_load(config)["trainer"]["max_train_epochs"] == EPOCHS
    assert logged(tmp_path / "outputs") == logged(tmp_path / "once")
    file = "mine-000002.safetensors"
    assert checkpoint.data_hash(folder / file) == checkpoint.data_hash(tmp_path / "once" / file)
    assert checkpoint.read_metadata(folder / file)["ss_num_epochs"] == str(EPOCHS)
    assert run_folder.read_record(folder).status == "finished"
    assert resumed(str(folder)) == 0  # with the new settings, by which it has ended


def of(output_root):
    """The one run of a store: its id and its config."""
    client = MlflowClient(f"sqlite:///{output_root}/mlflow.db")
    experiment = client.get_experiment_by_name("lorasweep")
    (run,) = client.search_runs([experiment.experiment_id])
    path = client.download_artifacts(run.info.run_id, "config.yaml")
    return run.info.run_id, Path(path).read_text()


@pytest.mark.parametrize(
    ("begun", "changes", "told"),
    [
        ([], ["optimizer.unet_lr=1"], "optimizer.unet_lr=1: .* was begun with optimizer.unet_lr=0"),
        ([], ["trainer.max_train_epochs=1"], "begun with trainer.max_train_epochs=2.* only grow"),
        ([], ["trainer.max_train_epochs=many"], "max_train_epochs=many: .* only grow"),
        ([], ["adapter=locon"], "adapter._target_=LoCon: .* begun with adapter._target_=LoRA"),
        ([], ["optimizer.args.eps=1e-7"], "optimizer.args.eps=1e-07: .* was begun without it"),
        ([], ["seed=1,2"], "seed=1,2: .* was begun without it"),
        ([], ["hydra.run.dir=x"], "hydra.run.dir=x: .* was begun without it"),
        ([], ["trainer.max_train_epochs=3"], "mine has ended and left no state"),
        (["lr_scheduler=cosine"], ["trainer.max_train_epochs=3"], "lr_scheduler.type=cosine foll"),
        (["lr_scheduler.warmup=0.1"], ["trainer.max_train_epochs=3"], "lr_scheduler.warmup=0.1 "),
    ],
)
def test_what_a_run_that_goes_on_cannot_change_is_named(
    begun, changes, told, command, tmp_path, capsys
):
    folder = as_begun(tmp_path, [*command[1:], *begun], "finished")
    before = (folder / ".hydra" / "hydra.yaml").read_text()
    assert resumed("mine", *changes) == 2
    said = capsys.readouterr().err
    assert re.search(told, said)
    assert said.startswith("lorasweep: ") and said.count("\n") == 1
    assert (folder / ".hydra" / "hydra.yaml").read_text() == before


def as_begun(tmp_path, words, status, *, multirun=False):
    """A run's or a multirun's folder, as Hydra and we leave it; with no states."""
    folder = tmp_path / "outputs" / "mine" / "1"
    (folder / ".hydra").mkdir(parents=True)
    hydra = {
        "overrides": {"hydra": [], "task": words},
        "runtime": {"cwd": str(tmp_path), "config_sources": [], "output_dir": str(folder)},
    }
    file = folder / ("multirun.yaml" if multirun else ".hydra/hydra.yaml")
    file.write_text(yaml.safe_dump({"hydra": hydra, "output_root": "outputs"}))
    (folder / ".hydra" / "config.yaml").write_text("output_root: outputs")
    record = {"name": "mine", "status": status, "settings": "x", "data": "x"}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_what_changes_no_result_may_change_as_a_run_goes_on(command, tmp_path):
    """Words are compared by what they come to: what is said again needs no ++."""
    folder = as_begun(tmp_path, [*command[1:], "++optimizer.args={eps: 1e-7}"], "unfinished")
    same = ["optimizer.args={eps: 1e-7}", "optimizer.args.eps=1e-7", "adapter.rank=2"]
    free = ["trainer.device=cpu", "tracking.experiment=x", "launcher.max_pack=1", "cache_dir=c"]
    begun = begun_by(folder, [*same, *free])
    assert begun.longer is None
    assert set(free) <= set(begun.argv)
    assert [w for w in begun.argv if w.startswith("cache_dir")] == ["cache_dir=c"]
    longer = begun_by(folder, ["trainer.max_train_epochs=3"]).longer
    assert longer.trainer.max_train_epochs == 3


def test_of_a_multirun_all_may_change_but_what_its_runs_differ_in(command, tmp_path):
    words = [*command[1:], "adapter.rank=2,4", "optimizer.unet_lr=interval(1e-4,1e-3)"]
    folder = as_begun(tmp_path, words, "finished", multirun=True)
    begun = begun_by(folder, ["adapter.rank=2,4", "trainer.max_train_epochs=3"])
    assert begun.argv[0] == "-m"
    assert begun.argv[-2] == "trainer.max_train_epochs=3"
    assert begun.longer is not None
    for word in ("adapter.rank=2,4,8", "adapter.rank=2", "optimizer.unet_lr=1e-4", "seed=0,1"):
        with pytest.raises(SettingsError, match=f"^{re.escape(word)}: .* change on the way"):
            begun_by(folder, [word])
    folder = as_begun(
        tmp_path / "search", ["+sweeps=rank_lr", "experiment=demo"], "unfinished", multirun=True
    )
    begun_by(folder, ["study.n_trials=50", "study.pruner=none"])  # how it searches
    with pytest.raises(SettingsError, match="alpha=3"):
        begun_by(folder, ["adapter.alpha=3"])


def test_a_job_that_failed_before_fails_again_whatever_launches_it(command, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "ended", lambda run: "failed")
    with pytest.raises(SystemExit) as failed:
        main.main([command[0], "-m", "hydra/launcher=basic", *command[1:]])
    assert failed.value.code == 2
    assert "it failed before" in capsys.readouterr().err
    main.main(command)
    assert "nothing to train" in capsys.readouterr().out


def test_resume_names_what_was_broken_off(command, monkeypatch, tmp_path, capsys):
    broken_off(command, monkeypatch)
    with pytest.raises(SystemExit):
        main.main(["resume", "other"])
    assert "other: no such run" in (said := capsys.readouterr().err)
    assert said.rstrip().endswith("broken off: mine")


def test_resume_without_a_name_lists_what_was_broken_off(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for place, name, status in (
        ("mine/1", "run.json", "unfinished"),
        ("mine/2", "run.json", "completed"),
        ("mine/3/0", "run.json", "unfinished"),
        ("mine/3", "sweep.json", "unfinished"),
    ):
        folder = tmp_path / "outputs" / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"status": status}))
    (tmp_path / "outputs" / "mine" / "3" / "multirun.yaml").touch()
    assert exit_code("resume") == 0
    said = sorted(capsys.readouterr().out.splitlines())
    assert said == [f"lorasweep resume outputs/mine/{one}" for one in (1, 3)]
    assert exit_code("resume", "output_root=none") == 0
    assert "Nothing in none was broken off" in capsys.readouterr().out


def test_a_corrupt_record_is_one_line(make_run):
    run = make_run()
    run.output_dir.mkdir(parents=True)
    (run.output_dir / "run.json").write_text("{")
    with pytest.raises(SettingsError, match=r"run\.json is not JSON: .*delete the folder"):
        run_folder.read_record(run.output_dir)
