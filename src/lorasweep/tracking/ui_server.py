"""The server of `lorasweep ui`: MLflow's own pages for a store, on this machine only."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from lorasweep.core.local_pages import HOST, allowed_hosts, check_port
from lorasweep.tracking.mlflow_page import DEFAULT_PORT, Shown, experiment_page
from lorasweep.tracking.store import create_store, is_server


def serve(
    uri: str,
    experiment: str,
    artifacts: Path | None,
    port: int = DEFAULT_PORT,
    what: Shown | None = None,
) -> int:
    """Show the store in MLflow's own pages, on this machine only, until interrupted.

    This process becomes the server; it returns only when the store is behind one already. Raises
    SettingsError when the port is taken, TrackingError when the store can't be opened.
    """
    if is_server(uri):
        address = experiment_page(uri, experiment, what=what)
        print(f"This project is tracked on a server: open {address}")
        return 0
    check_port(port)
    create_store(uri, experiment, artifacts)
    address = experiment_page(uri, experiment, port, what)
    print(f"MLflow starts, which takes some seconds: {address}")
    print("Stop it with Ctrl-C.", flush=True)
    return _become_server(uri, artifacts, port)


def _become_server(uri: str, artifacts: Path | None, port: int) -> NoReturn:
    """Replace this process by MLflow's, so that signals reach it and nothing is left behind."""
    command = [sys.executable, "-m", "mlflow", "ui", "--host", HOST, "--port", str(port)]
    # MLflow's own list has every name that begins like a private address: 10.anything.example
    command += ["--workers", "1", "--allowed-hosts", ",".join(allowed_hosts(port))]
    if artifacts is not None:
        command += ["--artifacts-destination", artifacts.as_uri()]
    ours = {
        "MLFLOW_BACKEND_STORE_URI": uri,  # not an argument: it may hold a password
        # runs evaluations: 8 processes and 1.3 GB that training has no use for
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    os.execve(sys.executable, command, {**os.environ, **ours})
