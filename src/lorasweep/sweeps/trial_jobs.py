"""A sweep's trials as Hydra jobs, in this process or another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from lorasweep.config.compose import quoted
from lorasweep.config.run import Run
from lorasweep.judging.metrics import metric
from lorasweep.runs.prepare import check_inputs
from lorasweep.sweeps.compose_jobs import Job, compose_job, save_hydra_files
from lorasweep.sweeps.sweep_file import Search

if TYPE_CHECKING:
    from lorasweep.sweeps.study.study_settings import StudySettings
    from lorasweep.sweeps.study.trial import Trial


class Jobs:
    """Hydra jobs of a sweep's trials."""

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
