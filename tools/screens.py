"""Pictures of MLflow's pages for a store: the runs with their curves, the sample cards, a model.

    python tools/screens.py sqlite:///PATH/mlflow.db FOLDER [--experiment lorasweep]

Needs Chromium. Look at what it writes: it asserts nothing.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from lorasweep import tracking
from lorasweep.tracking import mlflow_page
from lorasweep.tracking.store import sqlite_path

PORT = 5057
SIZE = {"width": 1600, "height": 2000, "deviceScaleFactor": 1, "mobile": False}
# the assistant opens by itself on a browser's first visit
CLOSE_ASSISTANT = "document.querySelectorAll('button[aria-label*=Close]').forEach(b => b.click())"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("uri")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experiment", default="lorasweep")
    parser.add_argument("--seconds", type=float, default=12, help="given to each page")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with (
        server(arguments.uri, arguments.experiment),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        closing(Browser(profile)) as browser,
    ):
        browser.page("Emulation.setDeviceMetricsOverride", **SIZE)
        for name, address in pages(arguments.uri, arguments.experiment).items():
            browser.shoot(address, arguments.folder / f"{name}.png", arguments.seconds)
            print(arguments.folder / f"{name}.png", address)


def pages(uri: str, experiment: str) -> dict[str, str]:
    """Addresses of the pages worth seeing."""
    last = tracking.candidates(uri, experiment)[-1]
    curves = mlflow_page.experiment_page(uri, experiment, PORT)
    run = f"http://127.0.0.1:{PORT}/#/experiments/{last.experiment_id}/runs/{last.run_id}"
    return {
        "curves": curves,
        "runs": curves.replace("&compareRunsMode=CHART", ""),
        "run": f"{run}?workflowType=machine_learning",
        "model": mlflow_page.page(uri, last, PORT),
    }


@contextmanager
def server(uri: str, experiment: str) -> Iterator[None]:
    """MLflow's pages, until the block is left."""
    database = sqlite_path(uri)
    assert database is not None, f"{uri} is not a sqlite:/// store"
    call = "import sys; from pathlib import Path; from lorasweep.tracking.ui_server import serve; "
    call += "serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))"
    artifacts = database.parent / "mlartifacts"
    command = [sys.executable, "-c", call, uri, experiment, str(artifacts), str(PORT)]
    with subprocess.Popen(command) as process:
        try:
            wait_for(f"http://127.0.0.1:{PORT}/health", process)
            yield
        finally:
            process.send_signal(2)  # as Ctrl-C does


def wait_for(address: str, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"no server answered at {address}")


class Browser:
    """Headless Chromium, driven by the DevTools protocol over a pipe."""

    def __init__(self, profile: str) -> None:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        if chromium is None:
            raise RuntimeError("no Chromium found: apt-get install chromium")
        to_browser, self._commands = os.pipe()
        self._answers, from_browser = os.pipe()
        command = [chromium, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        # Chromium reads commands from file descriptor 3 and answers on 4
        shell = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", *command]
        quiet = subprocess.DEVNULL
        fds = (to_browser, from_browser)
        self._process = subprocess.Popen(shell, pass_fds=fds, stdout=quiet, stderr=quiet)
        self._number = 0
        self._rest = b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def shoot(self, address: str, target: Path, seconds: float) -> None:
        """Save a picture of the page, `seconds` after it was opened."""
        self.page("Page.navigate", url="about:blank")  # else a new #fragment loads nothing
        self.page("Page.navigate", url=address)
        time.sleep(seconds)
        self.page("Runtime.evaluate", expression=CLOSE_ASSISTANT)
        time.sleep(2)  # for what the closing moves
        data = self.page("Page.captureScreenshot", format="png")["data"]
        target.write_bytes(base64.b64decode(data))

    def page(self, method: str, **params: Any) -> dict[str, Any]:
        return self.call(method, self._session, **params)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            pass  # an event, which nobody waits for
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return dict(answer["result"])

    def close(self) -> None:
        self.call("Browser.close")
        self._process.wait(timeout=30)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            self._rest += os.read(self._answers, 1 << 20)
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


if __name__ == "__main__":
    main()
