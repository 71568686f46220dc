"""What asking and telling Optuna costs: `python -m benchmarks.study`.

CPU of asking, reporting 3 epochs, pruning and telling, a trial, in a study of 1,000 on the journal.
Target: at most 100 ms at the 1,000th. The first row is ours and the journal's; what a sampler or
pruner of Optuna's adds is the difference of rows. What a trial's job takes, most
of it Hydra's composing, comes on top and is printed below.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from benchmarks.common import show
from lorasweep.config.compose import compose
from lorasweep.config.conf_folder import conf_dir
from lorasweep.config.resolvers import register_resolvers
from lorasweep.sweeps.compose_jobs import compose_job, save_hydra_files
from lorasweep.sweeps.read_yaml_once import read_yaml_once
from lorasweep.sweeps.study.search_space import Choice, Number, Space
from lorasweep.sweeps.study.study import Study
from lorasweep.sweeps.study.study_settings import StudySettings
from lorasweep.sweeps.sweep_file import read_study_settings

SCORE, DRIFT = "val/loss_rel", "val/prior_drift"
RANKS, RATES = (4, 8, 16, 32), (3e-4, 1e-3, 3e-3, 1e-2)


CASES = (
    ("random", "none", [SCORE]),
    ("random", "median", [SCORE]),
    ("random", "asha", [SCORE]),
    ("tpe", "median", [SCORE]),
    ("nsgaii", "median", [SCORE, DRIFT]),
)


def main() -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="of each study (default 1000)")
    _bookkeeping(parser.parse_args().trials)


def _bookkeeping(num_trials: int) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for sampler, pruner, objectives in CASES:
            folder = Path(name) / "b" / f"{sampler}-{pruner}"
            seconds = _ask_and_tell(_settings(sampler, pruner, objectives, num_trials), folder)
            rows.append([sampler, pruner, str(len(objectives)), *_around(seconds)])
            print(" | ".join(rows[-1]), flush=True)
    columns = [
        "sampler",
        "pruner",
        "objectives",
        "around the 100th",
        "the 500th",
        "the last",
        "all",
    ]
    show(f"CPU ms a trial, of {num_trials} (target: at most 100)", columns, rows)
    print(f"A trial's job, with Hydra: {_job() * 1000:.0f} ms of CPU")


def _job() -> float:
    """CPU seconds of a trial's job: composed with Hydra, checked, Hydra's files written."""
    seconds = []
    with (
        tempfile.TemporaryDirectory() as name,
        initialize_config_dir(str(conf_dir()), version_base="1.3"),
    ):
        register_resolvers()
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        given = ["experiment=demo", f"output_root={name}", "hydra/sweeper=optuna"]
        sweep = hydra.compose_config("config", [*given, "hydra.job.name=x"], RunMode.MULTIRUN)
        read_yaml_once(hydra.config_loader)
        for number in range(20):
            began = time.process_time()
            overrides = [*given, f"adapter.rank={number + 1}"]
            job = compose_job(sweep, hydra.config_loader, overrides, number)
            job.run.check()
            save_hydra_files(job)
            seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def _settings(
    sampler: str, pruner: str, objectives: Sequence[str], num_trials: int
) -> StudySettings:
    config = compose(
        [
            "experiment=demo",
            "hydra/sweeper=optuna",
            f"study.n_trials={num_trials}",
            f"study.sampler={sampler}",
            f"study.pruner={pruner}",
            f"study.objectives=[{','.join(objectives)}]",
            "study.name=bench",
        ]
    )
    settings: StudySettings = read_study_settings(config)
    return settings


def _ask_and_tell(settings: StudySettings, folder: Path) -> list[float]:
    """CPU seconds of each trial."""
    ranks = Choice("adapter.rank", RANKS, tuple(map(str, RANKS)))
    rates = Number("optimizer.unet_lr", RATES[0], RATES[-1], log=True)
    space = Space({"adapter.rank": ranks, "optimizer.unet_lr": rates}, {})
    study = Study(settings, space, "bench", folder, max_epochs=3)
    seconds: list[float] = []
    while True:
        began = time.process_time()
        trial = study.next()
        if trial is None:
            return seconds
        trial.plan(3)
        for epoch in (1, 2, 3):
            value = abs(float(trial.params["optimizer.unet_lr"]) - 1e-3) + 1 / epoch
            trial.report(epoch, Path("x"), {SCORE: value, DRIFT: 1 / (value + 0.01)}, {})
            trial.should_prune()
        study.complete(trial)
        seconds.append(time.process_time() - began)


def _around(seconds: Sequence[float]) -> list[str]:
    parts = [seconds[75:125], seconds[475:525], seconds[-50:], seconds]
    return [f"{statistics.median(part) * 1000:.1f}" if part else "" for part in parts]


if __name__ == "__main__":
    main()
