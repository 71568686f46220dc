"""Trials that are jobs, of a cluster or of Hydra's launchers: each reports to the study itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from lorasweep.config.run import Run
from lorasweep.runs.session import EpochReport, Failure, Finished, Report, Session
from lorasweep.sweeps.study.study_settings import StudySettings
from lorasweep.sweeps.sweep_file import read_study_settings

if TYPE_CHECKING:
    from lorasweep.sweeps.study.trial import Trial

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobsStudy:
    """The study of jobs that are trials: what they need to report to it."""

    settings: StudySettings
    folder: Path
    max_epochs: int

    @staticmethod
    def of(cfg: DictConfig, hydra_cfg: DictConfig) -> JobsStudy | None:
        """That of a job; None if no sweep gave it."""
        folder = (hydra_cfg.sweeper or {}).get("folder")
        if folder is None:
            return None
        settings = read_study_settings(cfg, hydra_cfg.overrides.task)
        return JobsStudy(settings, Path(folder), int(cfg.trainer.max_train_epochs))


def train_trials(runs: Sequence[Run], study: JobsStudy) -> list[Failure]:
    """Train trials' runs as one pack, and stop those that are to be pruned; those that failed."""
    from lorasweep.sweeps.study.study import join_study

    numbers = [run.number for run in runs if run.number is not None]
    joined = join_study(study.settings, study.folder, numbers, max_epochs=study.max_epochs)
    trials = dict(zip([run.name for run in runs], joined, strict=True))
    failures: list[Failure] = []
    with Session(runs[0]) as session:
        for reports in session.train(runs):
            failures += [report for report in reports if isinstance(report, Failure)]
            for report in reports:
                if isinstance(report, Finished) and report.dropped:  # by a job that was killed
                    trials[report.run].mark_pruned()
            for name in report_epochs(trials, reports):
                session.drop(name)
                trials[name].mark_pruned()
    return failures


def report_epochs(trials: Mapping[str, Trial], reports: Sequence[Report]) -> list[str]:
    """Tell trials, by their run's name, of epochs of their runs; the names of runs to be pruned.

    All report before one is judged, so that each is compared with all.
    """
    ended = {one.run for one in reports if isinstance(one, Failure | Finished)}
    epochs = [one for one in reports if isinstance(one, EpochReport) and one.run in trials]
    for one in epochs:
        checkpoint = one.checkpoint
        trials[one.run].report(checkpoint.epoch, checkpoint.path, one.scores, one.terms)
    going_on = [name for name in dict.fromkeys(one.run for one in epochs) if name not in ended]
    to_prune = [name for name in going_on if trials[name].should_prune()]
    for name in to_prune:
        say_pruned(trials[name])
    return to_prune


def say_pruned(trial: Trial) -> None:
    """Log that the trial is stopped, and what it came to."""
    best = f"{trial.values[0]:.4f} at epoch {trial.best.epoch}" if trial.best else "none"
    log.info("trial %d is pruned after epoch %d; its best: %s", trial.number, trial.epochs, best)
