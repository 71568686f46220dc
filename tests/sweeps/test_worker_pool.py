"""Worker processes: what they train, what becomes of their runs when they die, how they stop."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mlflow import MlflowClient

from lorasweep.core.failures import FailureKind
from lorasweep.core.settings import SettingsError
from lorasweep.lora_files import checkpoint
from lorasweep.models.devices import choose_devices
from lorasweep.runs.session import EpochReport, Failure, Finished
from lorasweep.sweeps import worker_pool, worker_process
from lorasweep.sweeps.worker_pool import WorkerPool
from small_training import relative_difference, reports


def told(events):
    return [(type(event).__name__, event.run) for event in events]


def test_a_place_left_is_taken_a_killed_worker_replaced_and_results_are_the_same(
    make_run, caplog, forked_workers
):
    runs = [make_run("adapter.rank=2", f"seed={n}", number=n) for n in range(4)]
    last, failures, dropped = {}, [], []
    pool = WorkerPool(["cpu"], max_pack=2)
    with caplog.at_level(logging.INFO), pool.ready(1), pool:
        got_ready = pool.workers[0].process.pid
        assert [pool.submit(run) for run in runs[:3]] == [True, True, False]
        assert told(pool.events()) == [("Started", "demo-0"), ("Started", "demo-1")]
        assert told(pool.events()) == [("EpochReport", "demo-0"), ("EpochReport", "demo-1")]
        pool.drop("demo-1")
        assert pool.events() == [Finished(run="demo-1", dropped=True)]
        assert pool.submit(runs[2])
        assert told(pool.events()) == [("Started", "demo-2")]
        queue = [runs[3]]
        assert not pool.submit(runs[3])  # there is no room for it yet
        os.kill(got_ready, signal.SIGKILL)
        while events := pool.events():
            last.update({e.run: e.checkpoint for e in events if isinstance(e, EpochReport)})
            dropped += [event.dropped for event in events if isinstance(event, Finished)]
            failures += [event for event in events if isinstance(event, Failure)]
            failed = {event.run for event in events if isinstance(event, Failure)}
            queue += [run for run in runs if run.name in failed]
            queue = [run for run in queue if not pool.submit(run)]
    assert {failure.run: failure.kind for failure in failures} == {
        "demo-0": FailureKind.RETRY,
        "demo-2": FailureKind.RETRY,
    }
    assert "killed by SIGKILL" in failures[0].reason
    assert dropped == [False] * 3
    assert "epoch 2, val/score: " in caplog.text  # what workers say is heard
    assert {name: one.epoch for name, one in last.items()} == dict.fromkeys(
        ("demo-0", "demo-2", "demo-3"), 2
    )
    client = MlflowClient(runs[0].tracking.resolve(runs[0].output_root))
    found = {run.info.run_name: run.info.status for run in client.search_runs(["1"])}
    assert len(client.search_runs(["1"])) == 4  # each once
    assert found == {"demo-1": "KILLED", **dict.fromkeys(last, "FINISHED")}
    files = {name: checkpoint.read(one.path)[0] for name, one in last.items()}
    reports(runs[2])  # alone, and in this process
    alone = checkpoint.read(last["demo-2"].path)[0]
    assert relative_difference(files["demo-2"], alone) < 1e-5


class Wire:
    """A driver's end, played by the test: the turns it gives, and what it was told."""

    def __init__(self, *turns):
        self.turns, self.told = list(turns), []

    def send(self, message):
        self.told.append(message)

    def recv(self):
        return self.turns.pop(0) if self.turns else worker_process.Instruction(stop=True)


@pytest.mark.parametrize(
    ("error", "number", "kind", "last"),
    [
        (torch.OutOfMemoryError("CUDA out of memory (by the test)"), 2, FailureKind.RETRY, True),
        (torch.OutOfMemoryError("CUDA out of memory (by the test)"), 1, FailureKind.OWN, True),
        (SettingsError("model.path=x can't be loaded"), 2, FailureKind.SETUP, False),
        (RuntimeError("CUDA error: an illegal memory access"), 2, FailureKind.OWN, True),
    ],
    ids=["memory shared", "memory alone", "user's mistake", "device broken"],
)
def test_what_breaks_a_pack_fails_its_runs_and_says_if_it_may_go_well_again(
    error, number, kind, last, make_run, monkeypatch
):
    def broken(run, device):
        raise error

    monkeypatch.setattr(worker_process, "load_base", broken)
    runs = [make_run(number=n) for n in range(number)]
    options = worker_process.WorkerOptions(
        device="cpu", max_pack=4, num_threads=None, log_levels={}
    )
    wire = Wire(worker_process.Instruction(joining=runs))
    one = worker_process.WorkerProcess(
        wire, worker_process._Outbox(wire), options, worker_process.Interrupts()
    )
    if last:
        one.serve()
    else:
        with pytest.raises(KeyboardInterrupt):  # the test's wire says stop
            one.serve()
    (end,) = [told for told in wire.told if told.reports]
    assert [failure.run for failure in end.reports] == [run.name for run in runs]
    assert {failure.kind for failure in end.reports} == {kind}
    assert end.last is last
    assert end.max_runs == (
        1 if kind == FailureKind.RETRY else None
    )  # half of those that were too many
    assert error.args[0] in end.reports[0].reason


def test_runs_go_to_the_emptiest_device_with_memory_for_them(make_run, monkeypatch):
    monkeypatch.setattr(worker_pool.Worker, "_open", lambda self: None)
    pool = WorkerPool(["cuda:0", "cuda:1"], max_pack=3)
    runs = [make_run(number=n) for n in range(6)]
    for run in runs[:4]:
        pool.submit(run)
    first, second = pool.workers
    assert [list(worker.runs) for worker in pool.workers] == [
        ["demo-0", "demo-2"],
        ["demo-1", "demo-3"],
    ]
    first.note(worker_process.EpochEnd(max_runs=2))
    pool.submit(runs[4])
    assert list(second.runs) == ["demo-1", "demo-3", "demo-4"]
    assert not pool.submit(runs[5])
    assert not pool.has_room
    pool.drop("demo-0")  # its worker has not heard of it yet
    assert pool._inbox.get_nowait().content == Finished(run="demo-0", dropped=True)
    assert pool.has_room
    assert not pool.submit(make_run("dataset.seed=5", number=7))  # it can't share
    assert pool.submit(runs[5])
    assert list(first.runs) == ["demo-2", "demo-5"]
    second.note(
        worker_process.EpochEnd(reports=[Finished(run=name, dropped=False) for name in second.runs])
    )
    assert pool.submit(make_run("dataset.seed=5", number=7))


def test_runs_that_were_too_many_for_the_memory_come_again_in_smaller_packs(make_run, monkeypatch):
    monkeypatch.setattr(worker_pool.Worker, "_open", lambda self: None)
    pool = WorkerPool(["cuda:0"], max_pack=4)
    runs = [make_run(number=n) for n in range(4)]
    for run in runs:
        pool.submit(run)
    failures = [Failure(run=run.name, reason="memory", kind=FailureKind.RETRY) for run in runs]
    pool.workers[0].note(worker_process.EpochEnd(reports=failures, max_runs=2, last=True))
    assert [pool.submit(run) for run in runs] == [True, True, False, False]
    assert list(pool.workers[0].runs) == ["demo-0", "demo-1"]


def test_a_worker_that_cannot_begin_fails_its_runs_once(make_run, monkeypatch):
    class Here:
        """A process that has ended before it said anything."""

        exitcode = 3

        def join(self, timeout):
            pass

        def is_alive(self):
            return False

    monkeypatch.setattr(worker_pool, "mark_broken", lambda *_: None)
    monkeypatch.setattr(
        worker_pool.Worker, "_open", lambda worker: setattr(worker, "process", Here())
    )
    pool = WorkerPool(["cpu"], max_pack=3)
    pool.workers[0]._reader = SimpleNamespace(join=lambda: None)
    pool.submit(make_run(number=0))
    pool._inbox.put(worker_pool._Message(pool.workers[0], None, pool.workers[0].process))
    (failure,) = pool.events()
    assert failure.kind == FailureKind.OWN
    assert "exit code 3" in failure.reason
    assert pool.events() == []


def test_workers_that_got_ready_in_vain_end_at_once():
    pool = WorkerPool(["cpu", "cpu", "cpu"], max_pack=1)
    with pytest.raises(SettingsError), pool.ready(2):
        processes = [worker.process for worker in pool.workers]
        assert [process and process.is_alive() for process in processes] == [True, True, None]
        raise SettingsError("a job is wrong")
    assert [process.exitcode for process in processes[:2]] == [-signal.SIGTERM] * 2


def test_a_worker_that_died_before_there_was_a_run_is_replaced_at_no_runs_cost(monkeypatch):
    started = []

    def start(worker):
        started.append(worker)
        worker.process = SimpleNamespace(is_alive=lambda: False)

    monkeypatch.setattr(worker_pool.Worker, "_start", start)
    (worker,) = WorkerPool(["cpu"], max_pack=1).workers
    worker.start()
    worker.start()
    assert len(started) == 2
    worker._has_options = True  # for a run: now its death is that run's
    worker.start()
    assert len(started) == 2


def test_who_interrupts_a_sweep_is_told_at_once_what_it_waits_for(caplog, monkeypatch):
    monkeypatch.setattr(worker_pool.Worker, "join", lambda worker, _: caplog.text or pytest.fail())
    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt), WorkerPool(["cpu"], 1):
        raise KeyboardInterrupt
    assert "stopping at the end of this step; once more stops at once" in caplog.text


def test_a_reader_that_breaks_on_a_line_says_so_to_the_driver_that_waits(monkeypatch):
    def broken(worker, record):
        raise RuntimeError("no such line")

    monkeypatch.setattr(worker_pool.Worker, "_log", broken)
    pool = WorkerPool(["cpu"], max_pack=1)
    (worker,) = pool.workers
    with pytest.raises(RuntimeError, match="no such line"):
        worker._listen(Wire(logging.makeLogRecord({})), None)
    assert pool._inbox.get_nowait().content is None


def test_devices_are_all_that_are_there_or_those_named(monkeypatch):
    assert choose_devices("auto") == ["cpu"]
    assert choose_devices(("cpu", "cpu")) == ["cpu", "cpu"]
    with pytest.raises(SettingsError, match=r"launcher\.devices=cuda:0: there is no such device"):
        choose_devices(["cuda:0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_devices("auto") == ["cuda:0", "cuda:1"]
    assert choose_devices("auto", "cuda:1") == ["cuda:1"]


DRIVER = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from types import SimpleNamespace
from conftest import SMALL
from lorasweep.config.build_run import build_run
from lorasweep.config.compose import compose
from lorasweep.sweeps.worker_pool import WorkerPool

if __name__ == "__main__":
    cfg = compose([*SMALL, *sys.argv[1:], "trainer.max_train_epochs=50"])
    run = build_run(cfg, output_dir=Path("run"), sweep="s", number=0)
    with WorkerPool(["cpu"], 2) as pool:
        pool.submit(run)
        while events := pool.events():
            print(pool.workers[0].process.pid, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "ctrl-c"])
def test_no_worker_outlives_its_driver(how, tmp_path, cache_dir):
    script = tmp_path / "driver.py"
    script.write_text(DRIVER.format(tests=str(Path(__file__).parents[1])))
    driver = subprocess.Popen(
        [sys.executable, str(script), f"output_root={tmp_path}", f"cache_dir={cache_dir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    )
    pid = int(driver.stdout.readline())  # its run has started
    driver.stdout.readline()  # and ended an epoch
    worker_end = os.pidfd_open(pid)
    if how == signal.SIGINT:
        os.killpg(driver.pid, how)  # as a terminal does: worker included
    else:
        driver.kill()
    import select

    ended, _, _ = select.select([worker_end], [], [], 120)
    os.close(worker_end)
    assert ended
    driver.wait(120)
    driver.stdout.close()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs(["1"])
    assert run.info.status == ("KILLED" if how == signal.SIGINT else "RUNNING")
