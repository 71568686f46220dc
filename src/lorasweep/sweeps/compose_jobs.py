"""A multirun's jobs, as Hydra composes them and leaves them in their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lorasweep.config.build_run import build_run, job_identity
from lorasweep.config.compose import added, quoted
from lorasweep.config.error_messages import one_line
from lorasweep.config.foreign_settings import check_job
from lorasweep.config.run import Run
from lorasweep.core.settings import SettingsError
from lorasweep.judging.metrics import metric
from lorasweep.runs.prepare import check_inputs, check_server
from lorasweep.sweeps.sweep_file import Search

if TYPE_CHECKING:
    from lorasweep.sweeps.study.study_settings import StudySettings
    from lorasweep.sweeps.study.trial import Trial


@dataclass(frozen=True)
class Job:
    """One job of a multirun: what Hydra composed and what we made of it."""

    overrides: Sequence[str]
    config: DictConfig
    run: Run


def compose_job(config: DictConfig, loader: Any, overrides: Sequence[str], number: int) -> Job:
    """Compose and check one job of a multirun. Raises SettingsError."""
    from hydra.errors import HydraException

    try:
        return _composed(config, loader, overrides, number)
    except (HydraException, OmegaConfBaseException) as error:
        if _was_interrupted(error):
            raise KeyboardInterrupt from error
        raise SettingsError(one_line(error)) from error


def _was_interrupted(error: BaseException | None) -> bool:
    """OmegaConf, interrupted, raises errors of its own in its cleaning up."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _composed(config: DictConfig, loader: Any, overrides: Sequence[str], number: int) -> Job:
    composed = loader.load_sweep_config(config, added(overrides))
    with open_dict(composed):
        composed.hydra.job.id = str(number)
        composed.hydra.job.num = number
        # a name made of a swept value would give each job a folder, and a sweep, of its own
        composed.hydra.sweep.dir = str(config.hydra.sweep.dir)
        output_dir = Path(composed.hydra.sweep.dir) / str(composed.hydra.sweep.subdir)
        composed.hydra.runtime.output_dir = str(output_dir.absolute())
    check_job(composed, composed.hydra)
    run = build_run(own_config(composed), **job_identity(composed.hydra))
    return Job(overrides, composed, run)


def own_config(config: DictConfig) -> DictConfig:
    """The config without Hydra's own part."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def save_hydra_files(job: Job) -> None:
    """What Hydra's own launchers leave in a job's folder."""
    folder = job.run.output_dir / str(job.config.hydra.output_subdir or ".hydra")
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(own_config(job.config), folder / "config.yaml")
    OmegaConf.save(OmegaConf.masked_copy(job.config, ["hydra"]), folder / "hydra.yaml")
    OmegaConf.save(job.config.hydra.overrides.task, folder / "overrides.yaml")


class TrialJobs:
    """Composes the jobs of a sweep's trials."""

    def __init__(self, config: DictConfig, config_loader: Any, found: Search) -> None:
        self._config, self._loader, self._search = config, config_loader, found
        self._folder = Path(config.hydra.sweep.dir).absolute()

    def check(self, settings: StudySettings) -> dict[str, Run]:
        """Runs that together have each value of the space, by their overrides, the first first.

        Raises SettingsError for what is wrong with one.
        """
        points = map(self._search.space.overrides, self._search.space.probes())
        probes = {" ".join(point): self._composed(point, 0).run for point in points}
        check_inputs(probes.values())
        check_server(next(iter(probes.values())))
        for run in probes.values():
            run.check()
            scores = _scores(run)
            if scores is not None:
                settings.check_scores(scores, [name for name, terms in scores.items() if terms])
        return probes

    def prepare(self, trial: Trial) -> Run:
        """The run of a trial; its folder has what Hydra leaves in a job's folder."""
        job = self._composed(trial.overrides, trial.number)
        job.run.check()
        save_hydra_files(job)
        return job.run

    def run_of(self, trial: Trial) -> Run:
        """The run that the trial's job will train, or has trained."""
        run = self._composed(trial.overrides, trial.number).run
        run.check()
        return run

    def overrides(self, trial: Trial) -> list[str]:
        """The overrides of a trial's job, with the study for it to report to."""
        # in hydra's own node, so that it isn't listed among the job's overrides
        folder = f"++hydra.sweeper.folder={quoted(str(self._folder))}"
        return [*self._search.fixed, *trial.overrides, folder]

    def _composed(self, params: Sequence[str], number: int) -> Job:
        return compose_job(self._config, self._loader, [*self._search.fixed, *params], number)


def _scores(run: Run) -> Mapping[str, bool] | None:
    """The scores that a run will have, and whether each has terms, if its metrics say so."""
    return metric.names(run.metrics.values(), run.captions, run.dataset.num_holdout)
