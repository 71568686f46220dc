"""A sweep in packs against the same runs in processes of their own: `python -m benchmarks.sweep`.

Trains --runs jobs of --epochs epochs of the demo from the command line: by `train` once a run, one
after another, and by `train -m` in packs, with one worker and with two on the same CPU. All with
warm caches, from the start of the first process to the end of the last. The target is a third of
the wall time. CPU time is printed beside it, as on a busy machine wall time says little.

The demo is shrunk, so that the lone runs are over in minutes, and has our default batch of 1.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import show

TARGET = 1 / 3
SHRUNK = [
    "experiment=demo",
    "trainer.batch_size=1",
    "dataset.num_images=8",
    "sampling.every_n_epochs=0",
    "metrics.validation.max_tuples=24",
    "metrics.validation.num_timesteps=6",
    "metrics.prior_drift.num_timesteps=2",
]


WAYS = {
    "packs, one worker": [],
    "packs, two workers": ["launcher.devices=[cpu,cpu]", "launcher.max_pack=4"],
}


@dataclass(frozen=True)
class Cost:
    """Seconds of a command and all its processes."""

    wall: float
    cpu: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)


def main() -> None:
    """Measure both ways in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8, help="runs of the sweep (default 8)")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of each (default 6)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
    arguments = parser.parse_intermixed_args()
    settings = [f"trainer.max_train_epochs={arguments.epochs}", *arguments.overrides]
    with tempfile.TemporaryDirectory() as name:
        common = [*SHRUNK, f"cache_dir={name}/cache", *settings]
        _train([*common, "trainer.max_train_epochs=1", f"output_root={name}/warm"])
        half = arguments.runs // 2  # before and after, so that a machine that slows hits both
        alone = _alone(common, range(half), Path(name))
        packs = {
            how: _packs([*common, *given], range(arguments.runs), Path(name) / f"packs{number}")
            for number, (how, given) in enumerate(WAYS.items())
        }
        alone += _alone(common, range(half, arguments.runs), Path(name))
    show(
        f"{arguments.runs} runs of {arguments.epochs} epochs",
        ["how", "wall s", "share", "target", "CPU s", "share"],
        [
            ["processes of their own", f"{alone.wall:.1f}", "1", "", f"{alone.cpu:.1f}", "1"],
            *(
                [
                    how,
                    f"{cost.wall:.1f}",
                    f"{cost.wall / alone.wall:.2f}",
                    f"<= {TARGET:.2f}",
                    f"{cost.cpu:.1f}",
                    f"{cost.cpu / alone.cpu:.2f}",
                ]
                for how, cost in packs.items()
            ),
        ],
    )


def _packs(common: Sequence[str], seeds: Sequence[int], root: Path) -> Cost:
    swept = ",".join(map(str, seeds))
    return _train(["-m", *common, f"output_root={root}", f"seed={swept}"])


def _alone(common: Sequence[str], seeds: Sequence[int], folder: Path) -> Cost:
    costs = (
        _train([*common, f"output_root={folder}/alone", f"name=run-{seed}", f"seed={seed}"])
        for seed in seeds
    )
    return sum(costs, Cost(0.0, 0.0))


def _train(arguments: Sequence[str]) -> Cost:
    """What one command took, its workers included."""
    begun, before = time.perf_counter(), _cpu_of_ended_children()
    subprocess.run(
        [sys.executable, "-m", "lorasweep", "train", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return Cost(time.perf_counter() - begun, _cpu_of_ended_children() - before)


def _cpu_of_ended_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
