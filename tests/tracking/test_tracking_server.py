"""A real MLflow server that is killed, stopped and started again while a run is logged."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from logged import SETTINGS, finish, log_epochs, new_run, run_id, snapshot
from lorasweep import tracking
from lorasweep.tracking import Tracker, TrackingError
from lorasweep.tracking.store import create_store
from lorasweep.tracking.sync import unsent


class Server:
    """An MLflow server on localhost, over a SQLite store."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        # MLflow's own tables take five seconds of flushing, ours one
        create_store(f"sqlite:///{folder}/mlflow.db", "other", None)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers=1"]
        command += ["--port", str(self.port), "--serve-artifacts"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        ours = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # saves eight processes
        with (self.folder / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **ours},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while not self.answers():
            assert self.process.poll() is None, (self.folder / "log.txt").read_text()[-2000:]
            time.sleep(0.05)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return True
        except OSError:
            return False

    def send(self, number: signal.Signals) -> None:
        """A signal for all its processes."""
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # seconds, 20 by default
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    server.start()
    yield server
    server.send(signal.SIGCONT)
    server.send(signal.SIGKILL)


@pytest.fixture
def unbroken(tmp_path: Path) -> list[dict[str, Any]]:
    """What MLflow has of the same run when nothing disturbs it, in a store without a server."""
    root = tmp_path / "unbroken"
    with Tracker(SETTINGS, root) as tracker:
        log = tracker.open_run(new_run(root))
        log_epochs(log, root / "a")
        finish(log)
    return snapshot(SETTINGS.resolve(root))


def wait_for_trouble(tracker: Tracker) -> None:
    """Until a write has failed, which is what the test is about."""
    thread = tracker._thread
    with thread._change:
        assert thread._change.wait_for(lambda: thread._trouble is not None, timeout=60)


def test_a_server_that_dies_hangs_and_comes_back_gets_everything_once(
    server: Server, unbroken: list[dict[str, Any]], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, uri=server.uri)
    with Tracker(settings, tmp_path) as tracker:
        tracker.ready(tmp_path / "a", "grid")
        server.send(signal.SIGSTOP)  # what is sent now is given up, and answered later
        log = tracker.open_run(new_run(tmp_path))
        log_epochs(log, tmp_path / "a", last=0)
        wait_for_trouble(tracker)
        server.send(signal.SIGCONT)
        log_epochs(log, tmp_path / "a", first=1, last=1)
        server.send(signal.SIGSTOP)
        log_epochs(log, tmp_path / "a", first=2, last=2)
        wait_for_trouble(tracker)
        server.send(signal.SIGKILL)
        log_epochs(log, tmp_path / "a", first=3)
        server.start()
        finish(log)
    assert snapshot(server.uri) == unbroken
    assert unsent(tmp_path) == []


@pytest.mark.slow
def test_what_a_dead_server_lacks_at_the_end_is_sent_by_sync(
    server: Server,
    unbroken: list[dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = replace(SETTINGS, uri=server.uri, max_wait_seconds=0.5)
    with Tracker(settings, tmp_path) as tracker:
        log = tracker.open_run(new_run(tmp_path))
        log_epochs(log, tmp_path / "a", last=1)
        run_id(tmp_path, uri=server.uri)
        server.send(signal.SIGKILL)
        log_epochs(log, tmp_path / "a", first=2)
        finish(log)
    assert "lorasweep sync" in caplog.text
    assert unsent(tmp_path) == [tmp_path / "a"]
    with pytest.raises(TrackingError, match="can't be opened"):
        tracking.sync(settings, tmp_path)
    server.start()
    (left,) = tracking.sync(SETTINGS, tmp_path)  # an address that only the folder names
    assert left.left_out is not None
    tracking.sync(replace(settings, max_wait_seconds=20), tmp_path)
    assert unsent(tmp_path) == []
    assert snapshot(server.uri) == unbroken
