"""What is logged while MLflow is away or the process dies arrives whole, and each thing once."""

from __future__ import annotations

import base64
import errno
import itertools
import json
import multiprocessing
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    TEMPORARILY_UNAVAILABLE,
)

from logged import SETTINGS, finish, log_epochs, new_run, picture, run_id, snapshot
from lorasweep import tracking
from lorasweep.cli import main
from lorasweep.tracking import Tracker, TrackingError, outage, publish_thread, records
from lorasweep.tracking.ledger import unsent_items
from lorasweep.tracking.store import MlflowStore, client_of
from lorasweep.tracking.sync import publish_left, unsent
from lorasweep.tracking.tracker import mark_broken

CALLS = """search_runs create_run log_batch log_inputs log_artifacts log_artifact set_tag delete_tag
    create_logged_model log_outputs log_model_artifacts finalize_logged_model set_terminated
    update_run search_logged_models"""


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Path:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> list[dict[str, Any]]:
    """What MLflow has of a run that nothing disturbed."""
    root = tmp_path_factory.mktemp("unbroken")
    shutil.copy(empty_store, root / "mlflow.db")
    train(root)
    return snapshot(SETTINGS.resolve(root))


def train(root: Path, *, goes_on: bool = False) -> None:
    """A whole run; what was logged before is logged again, as after a resume."""
    with Tracker(SETTINGS, root) as tracker:
        log = tracker.open_run(new_run(root), goes_on=goes_on)
        log_epochs(log, root / "a")
        finish(log)


def die_in(train: Callable[[Path], None], root: Path, *, call: int, patched: list[Any]) -> bool:
    """Train in a process that dies right after the call with that number; did it come so far?"""

    def child() -> None:
        done = 0

        def dying(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                nonlocal done
                result = original(*args, **kwargs)
                done += 1
                if done == call:
                    os._exit(9)
                return result

            return wrapper

        for owner, name in patched:
            patch.object(owner, name, dying(getattr(owner, name))).start()
        train(root)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, 9)
    return process.exitcode == 9


CLIENT = [(MlflowClient, name) for name in CALLS.split()]
DISK = [(records, "write_atomically"), (os, "fsync"), (os, "replace"), (Path, "unlink")]
STRIDE = 6  # of the default suite; `slow` does them all


@pytest.mark.parametrize(
    ("patched", "first", "stride"),
    [
        pytest.param(CLIENT, 2, STRIDE, id="store"),
        pytest.param(DISK, 3, STRIDE, id="disk"),
        pytest.param(CLIENT, 1, 1, id="store-all", marks=pytest.mark.slow),
        pytest.param(DISK, 1, 1, id="disk-all", marks=pytest.mark.slow),
    ],
)
def test_a_process_killed_after_any_call_loses_nothing_and_repeats_nothing(
    patched: list[Any],
    first: int,
    stride: int,
    tmp_path: Path,
    empty_store: Path,
    unbroken: list[dict[str, Any]],
) -> None:
    for call in range(first, 1000, stride):
        root = tmp_path / str(call)
        root.mkdir()
        shutil.copy(empty_store, root / "mlflow.db")
        if not die_in(train, root, call=call, patched=patched):
            break
        assert is_begun_and_whole(logged_offline(root))
        train(root, goes_on=True)
        assert snapshot(SETTINGS.resolve(root)) == unbroken, f"killed after call {call}"
        assert unsent(root) == []
        left = {path.name for path in (root / "a" / ".tracking").iterdir()}
        assert left - {"lock"} == {"published.json"}
    assert call > 20


def logged_offline(root: Path) -> frozenset[int]:
    """What a process that goes on knows without a store; it then stops in good order."""
    with Tracker(replace(SETTINGS, offline=True), root) as tracker:
        log = tracker.open_run(new_run(root), goes_on=True)
        log.suspend("a signal")
        return log.logged_epochs


def is_begun_and_whole(epochs: frozenset[int]) -> bool:
    """Epochs are logged in order, so that none is missing between two."""
    return epochs == frozenset(range(len(epochs)))


def test_what_goes_on_is_the_same_run_and_knows_its_epochs(root: Path) -> None:
    uri = SETTINGS.resolve(root)
    with Tracker(SETTINGS, root) as tracker:
        log = tracker.open_run(new_run(root))
        log_epochs(log, root / "a", last=1)
        log.log_step(3, {"train/loss": 0.1})
        log.suspend("SIGTERM")
    first = run_id(root)
    suspended = MlflowClient(uri).get_run(first)
    with Tracker(SETTINGS, root) as tracker:
        log = tracker.open_run(new_run(root), goes_on=True)
        logged = log.logged_epochs
        log.tag("kept", "yes")
        while "kept" not in (running := MlflowClient(uri).get_run(first)).data.tags:
            time.sleep(0.05)
        finish(log)
    second = run_id(root)
    assert second == first
    assert logged == {0, 1}
    assert suspended.info.status == "KILLED"
    assert suspended.data.tags["lorasweep.suspended"] == "SIGTERM"
    assert suspended.data.metrics["train/loss"] == 0.1
    assert running.info.status == "RUNNING"
    assert "lorasweep.suspended" not in running.data.tags


def test_a_new_attempt_drops_what_an_earlier_one_left(root: Path) -> None:
    with Tracker(replace(SETTINGS, offline=True), root) as tracker:
        log_epochs(tracker.open_run(new_run(root)), root / "a")
    with Tracker(SETTINGS, root) as tracker:
        log = tracker.open_run(new_run(root))
        assert log.logged_epochs == frozenset()
        log_epochs(log, root / "a", last=1)
        log.finish("FINISHED")
    (run,) = snapshot(SETTINGS.resolve(root))
    assert [step for step, _ in run["curves"]["val/loss_rel"]] == [0, 1]
    assert unsent(root) == []


def test_offline_runs_are_sent_by_sync_as_if_they_had_been_online(
    root: Path, unbroken: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(SETTINGS, offline=True, uri="http://127.0.0.1:1")
    with Tracker(settings, root) as tracker:
        tracker.ready(root / "a", "grid")
        log = tracker.open_run(new_run(root))
        log_epochs(log, root / "a")
        finish(log)
    assert unsent(root) == [root / "a"]
    store = [f"output_root={root}", f"tracking.uri={SETTINGS.resolve(root)}"]
    codes = [main_code(["sync", *store]) for _ in range(2)]
    said = capsys.readouterr().out
    assert codes == [0, 0]
    assert "a: 8 writes sent" in said
    assert "MLflow has everything" in said
    assert snapshot(SETTINGS.resolve(root)) == unbroken


def test_what_a_run_that_ended_left_is_sent_when_its_command_is_given_again(
    root: Path, unbroken: list[dict[str, Any]]
) -> None:
    with Tracker(replace(SETTINGS, offline=True), root) as tracker:  # as if killed before sending
        log = tracker.open_run(new_run(root))
        log_epochs(log, root / "a")
        finish(log)
    publish_left(SETTINGS, root, [root / "a", root / "b"])
    assert snapshot(SETTINGS.resolve(root)) == unbroken
    assert unsent(root) == []
    publish_left(SETTINGS, root, [root / "a"])  # there is nothing left, and nothing is asked


def main_code(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main.main(argv)
    assert isinstance(end.value.code, int)
    return end.value.code


def test_sync_leaves_alone_what_another_process_sends_and_names_what_is_not_there(
    root: Path,
) -> None:
    offline = replace(SETTINGS, offline=True)
    with Tracker(offline, root) as tracker:
        tracker.open_run(new_run(root))
        (busy,) = tracking.sync(SETTINGS, root)
        with pytest.raises(TrackingError, match="no such run"):
            tracking.sync(SETTINGS, root, "b")
    assert busy.is_busy
    assert "another process" in busy.line()
    (sent,) = tracking.sync(SETTINGS, root, "a")
    assert (sent.sent, sent.left) == (1, 0)


def test_two_processes_cannot_log_into_one_folder(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline = replace(SETTINGS, offline=True)
    monkeypatch.setattr(records, "LOCK_SECONDS", 0)
    with Tracker(offline, root) as one, Tracker(offline, root) as other:
        log = one.open_run(new_run(root))
        with pytest.raises(TrackingError, match="in use by another process"):
            other.open_run(new_run(root))
        with pytest.raises(TrackingError, match="two runs can't have one folder"):
            one.open_run(new_run(root))
        log.finish("FINISHED")


def test_a_run_whose_process_died_is_closed_with_all_that_it_had_logged(root: Path) -> None:
    def die(root: Path) -> None:
        tracker = Tracker(SETTINGS, root)
        log_epochs(tracker.open_run(new_run(root)), root / "a")
        os._exit(9)

    die_in(die, root, call=0, patched=[])
    mark_broken(SETTINGS, root, root / "a", "its worker died")
    (run,) = snapshot(SETTINGS.resolve(root))
    assert run["status"] == "FAILED"
    assert run["tags"]["lorasweep.reason"] == "its worker died"
    assert [step for step, _ in run["curves"]["val/loss_rel"]] == [0, 1, 2, 3]
    train(root, goes_on=True)
    (run,) = snapshot(SETTINGS.resolve(root))
    assert (run["status"], "lorasweep.reason" in run["tags"]) == ("FINISHED", False)


def test_a_broken_run_of_a_dead_server_is_closed_later(root: Path) -> None:
    with Tracker(replace(SETTINGS, offline=True), root) as tracker:
        log_epochs(tracker.open_run(new_run(root)), root / "a")
    dead = replace(SETTINGS, uri="http://127.0.0.1:1", max_wait_seconds=0.1)
    mark_broken(dead, root, root / "a", "its worker died")
    tracking.sync(SETTINGS, root, uri_is_given=True)
    (run,) = snapshot(SETTINGS.resolve(root))
    assert (run["status"], run["tags"]["lorasweep.reason"]) == ("FAILED", "its worker died")


def test_a_server_that_refuses_or_hangs_at_the_start_is_one_line_and_leaves_nothing(
    root: Path,
) -> None:
    with socket.socket() as hanging:
        hanging.bind(("127.0.0.1", 0))
        hanging.listen()
        for port in (1, hanging.getsockname()[1]):
            uri = f"http://me:sec/ret@127.0.0.1:{port}".replace("/ret", "ret")
            settings = replace(SETTINGS, uri=uri, max_wait_seconds=0.5)
            with (
                pytest.raises(TrackingError, match=r"tracking\.offline=true") as error,
                Tracker(settings, root) as tracker,
            ):
                tracker.ready(root / "a", "grid")
            told = str(error.value)
            assert f"http://***@127.0.0.1:{port}" in told
            assert "secret" not in told
            assert "\n" not in told
            assert not (root / "a").exists()


def test_a_store_that_took_the_sweep_before_may_be_away_when_more_of_it_starts(
    root: Path, unbroken: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    away = replace(SETTINGS, uri="http://127.0.0.1:1", max_wait_seconds=0.1)
    here = replace(SETTINGS, uri=SETTINGS.resolve(root))  # which waits as long as it takes
    with Tracker(here, root) as tracker:
        tracker.open_run(new_run(root, "b")).finish("FINISHED")
    for file in (root / "b" / "mlflow.json", root / "b" / ".tracking" / "published.json"):
        text = file.read_text().replace(SETTINGS.resolve(root), "http://127.0.0.1:1")
        file.write_text(text)  # as if it had been on that server
    with pytest.raises(TrackingError), Tracker(away, root) as tracker:
        tracker.ready(root / "a", "another sweep")
    with Tracker(away, root) as tracker:
        tracker.ready(root / "a", "grid")
        log = tracker.open_run(new_run(root))
        log_epochs(log, root / "a")
        finish(log)
    assert "waits on the disk" in caplog.text
    tracking.sync(SETTINGS, root, uri_is_given=True)
    assert snapshot(SETTINGS.resolve(root))[:1] == unbroken


def test_what_an_ended_run_left_is_sent_when_another_of_its_sweep_starts(
    root: Path, unbroken: list[dict[str, Any]]
) -> None:
    with Tracker(replace(SETTINGS, offline=True), root) as tracker:
        log = tracker.open_run(new_run(root))
        log_epochs(log, root / "a")
        finish(log)
    with Tracker(SETTINGS, root) as tracker:
        tracker.open_run(new_run(root, "b")).finish("FINISHED")
    assert unsent(root) == []
    assert snapshot(SETTINGS.resolve(root))[:1] == unbroken


@pytest.mark.parametrize("offline", [False, True])
def test_what_an_ended_run_left_is_held_no_longer_than_sending_it_takes(
    root: Path, *, offline: bool
) -> None:
    """Another worker may be about to go on with it."""
    with Tracker(replace(SETTINGS, offline=True), root) as tracker:
        tracker.open_run(new_run(root)).finish("FAILED", "its worker died")
    settings = replace(SETTINGS, offline=offline)
    with Tracker(settings, root) as one, Tracker(settings, root) as other:
        one.open_run(new_run(root, "b"))
        other.open_run(new_run(root), goes_on=True).finish("FINISHED")
    assert [path.name for path in unsent(root)] == (["a", "b"] if offline else [])


def test_who_adopted_a_run_may_go_on_with_it(
    root: Path, unbroken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Tracker(replace(SETTINGS, offline=True), root) as tracker:
        log = tracker.open_run(new_run(root))
        log_epochs(log, root / "a")
        log.finish("FAILED", "its worker died")
    opened = threading.Event()
    open_store = publish_thread.open_store
    monkeypatch.setattr(
        publish_thread,
        "open_store",
        lambda *place: (opened.wait(60) and None) or open_store(*place),
    )
    with Tracker(SETTINGS, root) as tracker:
        other = tracker.open_run(new_run(root, "b"))
        log = tracker.open_run(new_run(root), goes_on=True)  # before it is sent
        opened.set()
        finish(log)
        other.finish("FINISHED")
    assert snapshot(SETTINGS.resolve(root))[:1] == unbroken


def test_the_end_of_a_run_does_not_wait_for_a_hanging_server(
    root: Path, unbroken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered, log_batch = threading.Event(), MlflowClient.log_batch

    def hanging(*args: Any, **kwargs: Any) -> None:
        answered.wait()
        log_batch(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", hanging)
    monkeypatch.setattr(publish_thread, "sqlite_path", lambda _uri: None)  # as for a server
    with Tracker(SETTINGS, root) as tracker:
        tracker.ready(root / "a", "grid")
        log = tracker.open_run(new_run(root))
        log_epochs(log, root / "a")
        finish(log)  # comes back, though nothing is answered
        assert len(unsent_items(records.RunRecords(root / "a"))[0]) == 8
        answered.set()
    assert snapshot(SETTINGS.resolve(root)) == unbroken


def test_a_store_that_fails_for_a_while_gets_everything_in_order(
    root: Path, unbroken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of 13 calls fail, one of them after it has worked."""
    calls = itertools.count(1)

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number = next(calls)
            if number % 13 == 11:
                raise MlflowException("database is locked", TEMPORARILY_UNAVAILABLE)
            result = original(*args, **kwargs)
            if number % 13 == 4:
                raise MlflowException("the answer was lost", TEMPORARILY_UNAVAILABLE)
            return result

        return call

    monkeypatch.setattr(publish_thread, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(outage, "answers", lambda _store: False)
    with pytest.MonkeyPatch.context() as during:
        for owner, name in CLIENT:
            if not name.startswith("search"):
                during.setattr(owner, name, failing(getattr(owner, name)))
        train(root)
    assert next(calls) > 30
    assert snapshot(SETTINGS.resolve(root)) == unbroken


def test_a_write_that_only_fails_by_itself_is_put_aside_and_sync_tries_it_again(
    root: Path, unbroken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise MlflowException("the disk of the artifacts is full", INTERNAL_ERROR)

    monkeypatch.setattr(publish_thread, "FIRST_PAUSE", 0.0)
    with pytest.MonkeyPatch.context() as during:
        during.setattr(MlflowClient, "log_artifact", broken)  # the contact sheet's
        train(root)
    (run,) = snapshot(SETTINGS.resolve(root))
    assert (run["status"], run["tags"]["kept"]) == ("FINISHED", "yes")
    assert unsent(root) == [root / "a"]
    (result,) = tracking.sync(SETTINGS, root)
    assert (result.sent, result.left, dict(result.refused)) == (1, 0, {})
    assert snapshot(SETTINGS.resolve(root)) == unbroken


def test_a_run_that_mlflow_refuses_to_begin_waits_whole(
    root: Path, unbroken: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise MlflowException("a name of that kind is not taken", INVALID_PARAMETER_VALUE)

    with pytest.MonkeyPatch.context() as during:
        during.setattr(MlflowClient, "create_run", broken)
        train(root)
    assert caplog.text.count("is not taken") == 1
    assert snapshot(SETTINGS.resolve(root)) == []
    (result,) = tracking.sync(SETTINGS, root)
    assert (result.sent, result.left) == (8, 0)
    assert snapshot(SETTINGS.resolve(root)) == unbroken


def test_a_damaged_record_of_an_epoch_is_refused_and_the_others_are_sent(root: Path) -> None:
    with Tracker(replace(SETTINGS, offline=True), root) as tracker:
        log = tracker.open_run(new_run(root))
        log_epochs(log, root / "a")
        finish(log)
    (root / "a" / "epochs" / "000001.json").write_bytes(b'{"uid": "a')
    (result,) = tracking.sync(SETTINGS, root)
    (run,) = snapshot(SETTINGS.resolve(root))
    assert list(result.refused) == ["epoch 1"]
    assert "000001.json is damaged" in result.line()
    assert [step for step, _ in run["curves"]["val/loss_rel"]] == [0, 2, 3]


def test_steps_of_a_long_epoch_are_published_while_it_runs(root: Path) -> None:
    with Tracker(SETTINGS, root) as tracker:
        log = tracker.open_run(new_run(root))
        for step in range(1, 701):
            log.log_step(step, {"train/loss": 1 / step})
        client = MlflowClient(SETTINGS.resolve(root))
        until = time.monotonic() + 60
        while not (known := client.get_run(run_id(root)).data.metrics):
            assert time.monotonic() < until
            time.sleep(0.05)
        log.log_base({}, {})
        log.finish("FINISHED")
    (run,) = snapshot(SETTINGS.resolve(root))
    assert known == {"train/loss": 1 / 600}
    assert [step for step, _ in run["curves"]["train/loss"]] == list(range(1, 701))
    assert not (root / "a" / "epochs" / "unfinished.json").exists()


def test_what_was_deleted_in_mlflow_is_sent_anew_when_the_run_goes_on(
    root: Path, unbroken: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with Tracker(SETTINGS, root) as tracker:
        log = tracker.open_run(new_run(root))
        log_epochs(log, root / "a", last=1)
        log.log_file(picture(root / "a" / "sheet.png", (0, 0, 0)))
        log.suspend("SIGTERM")
    MlflowClient(SETTINGS.resolve(root)).delete_run(run_id(root))
    picture(root / "a" / "sheet.png", (255, 255, 0))
    assert unsent(root) == [root / "a"]
    (result,) = tracking.sync(SETTINGS, root)
    assert list(result.refused) == ["run"]
    assert "was it deleted?" in result.line()
    train(root, goes_on=True)
    assert "All is sent anew" in caplog.text
    (run,) = snapshot(SETTINGS.resolve(root))
    assert run["curves"] == unbroken[0]["curves"]
    assert run["artifacts"] == sorted([*unbroken[0]["artifacts"], "sheet.png"])


def test_what_a_full_disk_refused_is_sent_when_the_command_is_given_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(publish_thread, "FIRST_PAUSE", 0.0)
    with pytest.MonkeyPatch.context() as during:
        during.setattr(MlflowClient, "log_artifact", full)
        train(root)
    assert unsent(root) == [root / "a"]
    with Tracker(SETTINGS, root) as tracker:
        tracker.publish_left(root / "a")
    assert unsent(root) == []


class _Busy(BaseHTTPRequestHandler):
    """A server that has too many requests."""

    after: str | None = "7"
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(429)
        if self.after is not None:
            self.send_header("Retry-After", self.after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def busy() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("after", "pause"),
    [("7", 7), ("99999999", outage.LONGEST_ASKED), (None, 0), ("soon", 0), ("-5", 0)],
)
def test_a_server_with_too_many_requests_is_left_alone_as_long_as_it_asks(
    after: str | None, pause: float, busy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Busy, "after", after)
    store = MlflowStore(client_of(busy), "1", busy, "e", Path("datasets"))
    with pytest.raises(MlflowException) as error:
        store.client.get_experiment("1")
    with pytest.raises(outage.OutageError) as away:
        outage.is_refused(error.value, store, "end")
    assert away.value.pause == pause


def test_between_two_tries_a_server_has_the_pause_that_it_asks_for(
    busy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish_thread, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(_Busy, "asked", 0)
    thread = publish_thread.PublishThread(replace(SETTINGS, uri=busy, max_wait_seconds=3), tmp_path)
    with pytest.raises(TrackingError, match="429"):
        thread.ready()
    time.sleep(0.5)
    thread.abandon()
    assert _Busy.asked == 2  # to open it, and for the pause


def test_another_store_gets_a_whole_run(root: Path, unbroken: list[dict[str, Any]]) -> None:
    """Of which the first store has a part."""
    with Tracker(SETTINGS, root) as tracker:
        log_epochs(tracker.open_run(new_run(root)), root / "a", last=1)
    elsewhere = replace(SETTINGS, uri=f"sqlite:///{root}/other.db")
    with Tracker(elsewhere, root) as tracker:
        log = tracker.open_run(new_run(root), goes_on=True)
        log_epochs(log, root / "a")
        finish(log)
    assert snapshot(elsewhere.resolve(root)) == unbroken


def older_version(root: Path, *, begun: bool) -> None:
    """What an older version left of a run: all waits, or all but its second epoch is sent."""
    run = {"uid": "f" * 32, "name": "a", "sweep": "grid", "uri": None, "experiment": "e"}
    settings = {
        "kind": "open",
        "time": 1000,
        "tags": {"lorasweep.trial": "4"},
        "params": {"adapter.rank": "4"},
        "files": {"config.yaml": "adapter: {}", "overrides.yaml": "[]", "manifest.json": "{}"},
        "dataset": {
            "name": "icons",
            "digest": "ab" * 8,
            "source": json.dumps({"uri": "/icons"}),
            "profile": json.dumps({"digest": "ab" * 32}),
        },
        "replaces": True,
        "goes_on": False,
    }

    def epoch(number: int) -> dict[str, Any]:
        path = root / "a" / f"a-{number:06d}.safetensors"
        path.write_bytes(b"weights")
        checkpoint = {"path": path.name, "run": "a", "epoch": number, "step": number * 2}
        png = picture(root / "drawn.png", (number, 0, 0)).read_bytes()
        points = [[step, {"train/loss": 1 / step}] for step in (number * 2 - 1, number * 2)]
        return {
            "kind": "epoch",
            "epoch": number,
            "points": [
                {"key": key, "value": value, "time": 1000 + step, "step": step}
                for step, values in points
                for key, value in values.items()
            ],
            "scores": [{"key": "val/gap", "value": "nan", "time": 1000, "step": number}],
            "samples": [
                {
                    "stem": f"samples~00 a rocket+step+{number}+timestamp+1000+{number}",
                    "png": base64.urlsafe_b64encode(png).decode(),
                }
            ],
            "model": {"checkpoint": checkpoint, "terms": {"val/gap": [0.5]}, "upload": False},
        }

    folder = root / "a" / ".tracking"
    folder.mkdir(parents=True)
    operations = [(settings, [], {}), (epoch(1), [1], {"train/loss": 2})]
    operations.append((epoch(2), [1, 2], {"train/loss": 4}))
    for number, (operation, epochs, steps) in enumerate(operations):
        state = {**run, "epochs": epochs, "steps": steps, "is_open": True}
        text = json.dumps({"run": state, "operation": operation})
        if not begun or number > 0:
            suffix = "done" if begun and number == 1 else "json"
            (folder / f"{number:06d}.{suffix}").write_text(text)


def test_what_an_older_version_left_is_sent(root: Path) -> None:
    older_version(root, begun=False)
    assert unsent(root) == [root / "a"]
    (result,) = tracking.sync(SETTINGS, root, "a")
    (run,) = snapshot(SETTINGS.resolve(root))
    assert (result.sent, unsent(root)) == (4, [])
    assert run["params"] == {"adapter.rank": "4"}
    assert run["inputs"] == ["ab" * 8]
    assert run["curves"]["train/loss"] == [(1, "1.0"), (2, "0.5"), (3, repr(1 / 3)), (4, "0.25")]
    assert run["curves"]["val/gap"] == [(1, "nan"), (2, "nan")]
    assert [model["name"] for model in run["models"]] == ["a-e001", "a-e002"]
    assert sum("rocket" in name and name.endswith(".png") for name in run["artifacts"]) == 2
    assert {path.name for path in (root / "a" / ".tracking").iterdir()} == {
        "lock",
        "published.json",
    }


def test_a_run_that_an_older_version_began_goes_on_as_the_same_run(root: Path) -> None:
    client = MlflowClient(SETTINGS.resolve(root))
    experiment = client.create_experiment("e", (root / "mlartifacts").as_uri())
    tags = {"lorasweep.uid": "f" * 32, "lorasweep.run": "a", "lorasweep.sweep": "grid"}
    begun = client.create_run(experiment, tags=tags, run_name="a").info.run_id
    older_version(root, begun=True)
    with Tracker(SETTINGS, root) as tracker:
        log = tracker.open_run(new_run(root), goes_on=True)
        assert log.logged_epochs == {1, 2}
        log_epochs(log, root / "a")
        finish(log)
    assert [run.info.run_id for run in client.search_runs([experiment])] == [begun]
    (run,) = snapshot(SETTINGS.resolve(root))
    assert [step for step, _ in run["curves"]["train/loss"]] == [3, 4, 5, 6]  # 1 and 2: before
    assert [model["name"] for model in run["models"]] == ["a-e002", "a-e003"]


SECRET = "http://me:hunter2@host:5000/x?api_key=hunter2&page=2"
PUBLIC = "http://***@host:5000/x?api_key=***&page=2"


def test_secrets_in_uris_reach_neither_mlflow_nor_the_records(root: Path) -> None:
    new = replace(
        new_run(root),
        params={"tracking.uri": SECRET},
        config_yaml=f"tracking:\n  uri: {SECRET}\n",
        overrides=[f"tracking.uri={SECRET}", "study.storage='postgresql://a:hunter2@b/c'"],
        tags={"where": SECRET},
    )
    with Tracker(replace(SETTINGS, offline=True, uri=SECRET), root) as tracker:
        log = tracker.open_run(new)
        log.tag("also", SECRET)
        log.finish("FAILED", f"{SECRET} is away")
    written = [path.read_text() for path in (root / "a").rglob("*.json")]
    assert written
    assert not any("hunter2" in text for text in written)
    tracking.sync(SETTINGS, root, uri_is_given=True)
    run = MlflowClient(SETTINGS.resolve(root)).get_run(run_id(root))
    assert run.data.params == {"tracking.uri": PUBLIC}
    assert run.data.tags["where"] == run.data.tags["also"] == PUBLIC
    assert run.data.tags["lorasweep.reason"] == f"{PUBLIC} is away"
    files = [path for path in (root / "mlartifacts").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"config.yaml", "overrides.yaml"}
    assert not any(b"hunter2" in path.read_bytes() for path in files)


def test_sync_asks_for_a_password_that_is_kept_nowhere(root: Path) -> None:
    with Tracker(replace(SETTINGS, offline=True, uri=SECRET), root) as tracker:
        tracker.open_run(new_run(root)).finish("FINISHED")
    (result,) = tracking.sync(SETTINGS, root)
    assert not result.is_done
    assert f"give tracking.uri={PUBLIC}, with its password" in result.line()
    assert "hunter2" not in result.line()
