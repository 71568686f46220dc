"""What of a demo sweep's time is the harness's own: `python -m benchmarks.overhead`.

Runs `lorasweep train -m +sweeps=demo` in a temporary folder and compares what the runs' own clock
(seconds.json) says of training, scoring and sampling with the wall time of `run_pack`, from the
first image read to the last byte logged. Start-up (imports, Hydra) comes before. The target: the
harness and tracking take at most 2 %.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from benchmarks.common import show
from lorasweep.cli.main import main as lorasweep
from lorasweep.config.run import Run
from lorasweep.runs.session import Failure, run_pack
from lorasweep.sweeps import multirun

TARGET = 0.02


def main() -> None:
    """Run the sweep and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
    overrides = parser.parse_args().overrides
    stopwatch = _Stopwatch()
    timed = patch.multiple(
        multirun, open_pool=lambda *_: None, _train_by_jobs=stopwatch.train
    )  # as packs that are jobs, but here
    with tempfile.TemporaryDirectory() as name, timed:
        places = [f"output_root={name}", f"cache_dir={name}/cache"]
        lorasweep(["train", "-m", "+sweeps=demo", *places, *overrides])
        clocks = [json.loads(path.read_text()) for path in stopwatch.clocks]
    _print(stopwatch, clocks)


class _Stopwatch:
    """Times the packs as the launcher runs them."""

    def __init__(self) -> None:
        self.wall = 0.0  # seconds of all packs
        self.cpu = 0.0  # likewise, of all threads
        self.tracking_cpu = 0.0  # seconds of the thread that writes to MLflow
        self.clocks: list[Path] = []  # one a pack: its runs share theirs

    def train(
        self, runs: Sequence[Run], settings: multirun.LauncherSettings, *_: object
    ) -> list[Failure]:
        """What the launcher does, here and not in a worker process; those that failed."""
        failures = []
        for pack in multirun.group(runs, settings.max_pack):
            begun, cpu_begun = time.perf_counter(), time.process_time()
            spent = 0.0
            for report in run_pack(pack):
                spent = _tracking_cpu()
                if isinstance(report, Failure):
                    failures.append(report)
            self.wall += time.perf_counter() - begun
            self.cpu += time.process_time() - cpu_begun
            self.tracking_cpu += spent
            self.clocks.append(pack[-1].output_dir / "seconds.json")
        return failures


def _tracking_cpu() -> float:
    """CPU seconds of the tracking thread so far; it writes behind the training."""
    for thread in threading.enumerate():
        if thread.name == "tracking" and thread.ident is not None:
            return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return 0.0


def _print(stopwatch: _Stopwatch, clocks: Sequence[dict[str, float]]) -> None:
    parts = {
        name: sum(clock.get(name, 0.0) for clock in clocks)
        for name in ("prepare", "train", "score", "sample")
    }
    rest = stopwatch.wall - sum(parts.values())
    rows = {**parts, "everything else": rest, "run_pack": stopwatch.wall}
    show(
        "A demo sweep's wall time",
        ["what", "seconds", "share", "target"],
        [
            [
                name,
                f"{seconds:.2f}",
                f"{seconds / stopwatch.wall:.1%}",
                f"<= {TARGET:.0%}" if name == "everything else" else "",
            ]
            for name, seconds in rows.items()
        ],
    )
    print(
        f"Behind the training, the thread that writes to MLflow took {stopwatch.tracking_cpu:.2f} s"
        f" of the {stopwatch.cpu:.0f} s of CPU ({stopwatch.tracking_cpu / stopwatch.cpu:.1%}), its"
        " start included: importing MLflow and making the store."
    )


if __name__ == "__main__":
    main()
