"""Trials that a process other than the sweep's driver trains: its jobs report to the study."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from lorasweep.config.run import Run
from lorasweep.core.settings import build
from lorasweep.runs.session import EpochReport, Failure, Finished, Session
from lorasweep.sweeps.study.study_settings import StudySettings

if TYPE_CHECKING:
    from lorasweep.sweeps.study.trial import Trial

log = logging.getLogger(__name__)

# null in conf/, for Hydra lets a command line replace null by a mapping, and nothing else
_MAPS = ("conditions", "vars", "sampler_options", "pruner_options", "constraints")


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
        settings = study_settings(cfg, hydra_cfg.overrides.task)
        return JobsStudy(settings, Path(folder), int(cfg.trainer.max_train_epochs))


def study_settings(config: DictConfig, overrides: Sequence[str] = ()) -> StudySettings:
    """The typed settings of `study`. Raises SettingsError.

    A sampler or pruner that the command's overrides name has the options that they give: those of
    the sweep's file are another's.
    """
    values = OmegaConf.to_container(config.study, resolve=True)
    assert isinstance(values, dict)
    given = {str(key): value for key, value in values.items()}
    keys = [one.lstrip("+").partition("=")[0] for one in overrides]
    for what in ("sampler", "pruner"):
        options = given.get(f"{what}_options") or {}
        if f"study.{what}" in keys and f"study.{what}_options" not in keys:
            own = {k: v for k, v in options.items() if f"study.{what}_options.{k}" in keys}
            given[f"{what}_options"] = own
    empty: dict[str, object] = {key: {} for key in _MAPS if given.get(key) is None}
    settings: StudySettings = build({**given, **empty}, "study")
    return settings


def train(runs: Sequence[Run], study: JobsStudy) -> list[Failure]:
    """Train trials' runs as one pack, and stop those that are to be pruned; those that failed."""
    from lorasweep.sweeps.study.study import join_study

    numbers = [run.number for run in runs if run.number is not None]
    joined = join_study(study.settings, study.folder, numbers, max_epochs=study.max_epochs)
    trials = dict(zip([run.name for run in runs], joined, strict=True))
    failures: list[Failure] = []
    with Session(runs[0]) as session:
        for reports in session.train(runs):
            for report in reports:
                if isinstance(report, Failure):
                    failures.append(report)
                elif isinstance(report, EpochReport):
                    note(trials[report.run], report)
                elif isinstance(report, Finished) and report.dropped:  # by a job that was killed
                    trials[report.run].mark_pruned()
            for report in reports:  # once all have reported: each is compared with all
                if isinstance(report, EpochReport) and trials[report.run].should_prune():
                    say_pruned(trials[report.run])
                    session.drop(report.run)
                    trials[report.run].mark_pruned()
    return failures


def note(trial: Trial, report: EpochReport) -> None:
    """Tell the trial of an epoch of its run."""
    checkpoint = report.checkpoint
    trial.report(checkpoint.epoch, checkpoint.path, report.scores, report.terms)


def say_pruned(trial: Trial) -> None:
    """Log that the trial is stopped, and what it came to."""
    best = f"{trial.values[0]:.4f} at epoch {trial.best.epoch}" if trial.best else "none"
    log.info("trial %d is pruned after epoch %d; its best: %s", trial.number, trial.epochs, best)
