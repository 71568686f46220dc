"""A sweep's trials as Hydra jobs, in this process or another."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lorasweep import config as configs
from lorasweep import dataset, metrics, run_folder
from lorasweep.checkpoint import checkpoint_path
from lorasweep.config import Run
from lorasweep.launcher import Job, compose_job, save_hydra_files
from lorasweep.run import EpochReport, Failure, Finished, RunError, Session
from lorasweep.search import Search
from lorasweep.settings import build

if TYPE_CHECKING:
    from lorasweep.metrics import Scores, Terms
    from lorasweep.study.settings import StudySettings
    from lorasweep.study.trial import Trial

log = logging.getLogger(__name__)

# null in conf/, for Hydra lets a command line replace null by a mapping, and nothing else
_MAPS = ("conditions", "vars", "sampler_options", "pruner_options", "constraints")


@dataclass(frozen=True)
class Scored:
    """A checkpoint of a run that another process trained."""

    epoch: int
    path: Path
    scores: Scores
    terms: Terms


class Jobs:
    """Hydra jobs of a sweep's trials."""

    def __init__(self, config: DictConfig, config_loader: Any, found: Search) -> None:
        self._config, self._loader, self._search = config, config_loader, found
        self._folder = Path(config.hydra.sweep.dir).absolute()
        self.epochs = 0

    def check(self, settings: StudySettings) -> Run:
        """Compose the sweep's first run and one of each value; SettingsError for what is wrong."""
        probes = [self._composed(self._search.space.overrides(p), 0) for p in self._probes()]
        for images in dict.fromkeys(job.run.dataset for job in probes):
            dataset.find(images)
        for job in probes:
            job.run.check()
            scores = _scores(job.run)
            if scores is not None:
                settings.check_scores(scores, [name for name, terms in scores.items() if terms])
        self.epochs = max(job.run.trainer.max_train_epochs for job in probes)
        return probes[0].run

    def prepare(self, trial: Trial) -> Run:
        """The run of a trial; its folder has what Hydra leaves in a job's folder."""
        job = self._composed(trial.overrides, trial.number)
        job.run.check()
        save_hydra_files(job)
        return job.run

    def overrides(self, trial: Trial, *, reports: bool = False) -> list[str]:
        """The overrides of a trial's job, with the study for it to report to."""
        found = [*self._search.fixed, *trial.overrides]
        if not reports:
            return found
        # in hydra's own node, so that it isn't listed among the job's overrides
        return [*found, f"++hydra.sweeper.folder={configs.quoted(str(self._folder))}"]

    def scored(self, trial: Trial) -> list[Scored]:
        """The candidates that a trial's run left in its folder."""
        run = self._composed(trial.overrides, trial.number).run
        found: list[Scored] = []
        for epoch in range(1, run.trainer.max_train_epochs + 1):
            known = run_folder.read_scores(run.output_dir, epoch)
            if known is not None:
                path = checkpoint_path(run.output_dir, run.name, epoch)
                found.append(Scored(epoch, path, *known))
        return found

    def was_dropped(self, trial: Trial) -> bool:
        """Was the trial's run stopped to be pruned, by who was killed before the study knew?"""
        return run_folder.was_dropped(self._composed(trial.overrides, trial.number).run)

    def _composed(self, params: Sequence[str], number: int) -> Job:
        return compose_job(self._config, self._loader, [*self._search.fixed, *params], number)

    def _probes(self) -> list[Mapping[str, Any]]:
        return list(self._search.space.probes())


def _scores(run: Run) -> Mapping[str, bool] | None:
    """The scores that a run will have, and whether each has terms, if its metrics say so."""
    return metrics.names(run.metrics.values(), run.captions, run.dataset.num_holdout)


def train_trial(run: Run, trial: Trial) -> None:
    """Train a trial's run in this process, and stop it where it is to be pruned.

    For Hydra's own launchers, whose jobs report to the study themselves. Raises RunError if it
    fails.
    """
    with Session(run) as session:
        for reports in session.train([run]):
            for report in reports:
                if isinstance(report, Failure):
                    raise RunError.of(report)
                if isinstance(report, EpochReport):
                    note(trial, report)
                    if trial.should_prune():
                        say_pruned(trial)
                        session.drop(run.name)
                        trial.mark_pruned()
                if isinstance(report, Finished) and report.dropped:  # by a job that was killed
                    trial.mark_pruned()


def trial_of(cfg: DictConfig, hydra_cfg: DictConfig) -> Trial:
    """The trial that a Hydra job is, which a sweep started."""
    from lorasweep.study.study import join_study

    settings = study_settings(cfg, hydra_cfg.overrides.task)
    epochs = int(cfg.trainer.max_train_epochs)
    return join_study(
        settings, Path(hydra_cfg.sweeper.folder), int(hydra_cfg.job.num), max_epochs=epochs
    )


def study_settings(config: DictConfig, overrides: Sequence[str] = ()) -> Any:
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
    empty: dict[str, Any] = {key: {} for key in _MAPS if given.get(key) is None}
    return build({**given, **empty}, "study")


def note(trial: Trial, report: EpochReport) -> None:
    checkpoint = report.checkpoint
    trial.report(checkpoint.epoch, checkpoint.path, report.scores, report.terms)


def say_pruned(trial: Trial) -> None:
    best = f"{trial.values[0]:.4f} at epoch {trial.best.epoch}" if trial.best else "none"
    log.info("trial %d is pruned after epoch %d; its best: %s", trial.number, trial.epochs, best)
