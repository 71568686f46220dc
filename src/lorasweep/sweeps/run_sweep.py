"""Drives a sweep: asks the study for trials, trains them, tells it what they came to."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lorasweep.config.foreign_settings import check_job
from lorasweep.config.run import Run
from lorasweep.core.progress import say
from lorasweep.runs.run_folder import as_typed, nothing_left_if_refused, stoppable, sweep_name
from lorasweep.sweeps import sweep_file
from lorasweep.sweeps.compose_jobs import TrialJobs
from lorasweep.sweeps.read_yaml_once import read_yaml_once
from lorasweep.sweeps.study.study_storage import only_driver
from lorasweep.sweeps.sweep_file import Search
from lorasweep.sweeps.sweep_limits import StopRules, SweepError
from lorasweep.sweeps.sweep_loop import TrialsInBatches, TrialsOneByOne
from lorasweep.tracking.read_candidates import deleted_trials

if TYPE_CHECKING:
    from lorasweep.sweeps.study.study import Study
    from lorasweep.sweeps.study.study_settings import StudySettings

log = logging.getLogger(__name__)


def sweep(config: DictConfig, config_loader: Any, launcher: Any, arguments: Sequence[str]) -> None:
    """Run the sweep of a composed config to its end, or go on with it.

    `arguments` are the command line's overrides. Raises SettingsError, in one line and before any
    work, for what is wrong in the sweep; SweepError when too many trials failed.
    """
    folder = Path(config.hydra.sweep.dir).absolute()
    with ExitStack() as workers:
        with nothing_left_if_refused(folder, Path(str(config.output_root))):
            check_job(config, config.hydra)
            log.info("the sweep's runs go to %s", as_typed(folder))
            read_yaml_once(config_loader)
            found = sweep_file.read_search(config, config_loader, arguments)
            settings = sweep_file.read_study_settings(config, config.hydra.overrides.task)
            pool = launcher.worker_pool() if hasattr(launcher, "worker_pool") else None
            if pool:
                workers.enter_context(pool.ready(settings.n_trials))
            jobs = TrialJobs(config, config_loader, found)
            probes = jobs.check(settings)
        first, *others = probes.values()
        with only_driver(folder, sweep_name(folder), settings.storage), stoppable(folder):
            if hasattr(launcher, "begin"):
                launcher.begin()
            study = open_study(settings, found, folder, probes)
            OmegaConf.save(config, folder / "multirun.yaml")  # for resume; not of a refused command
            if left := study.take_over():
                said = "trials that an ended driver left go on: %s"
                log.warning(said, ", ".join(map(str, left)))
            goes_on = bool(study.trials)  # runs of an earlier command may be deleted by now
            try:
                same_setup = all(map(first.can_share_pack, others))
                drive(study, jobs, pool or launcher, same_setup=same_setup)
            finally:
                place = first.tracking, first.output_root
                _show(study, deleted_trials(*place, study.name) if goes_on else set())


def drive(study: Study, jobs: TrialJobs, trains: Any, *, same_setup: bool) -> None:
    """Train the study's trials: as they come by a WorkerPool, else batch by batch by a launcher."""
    settings = study.settings
    rules = StopRules(settings.max_hours, settings.max_failures, time.monotonic(), same_setup)
    if hasattr(trains, "launch"):
        TrialsInBatches(study, jobs, trains, rules).run()
    else:
        with trains:
            TrialsOneByOne(study, jobs.prepare, trains, rules).run()
    if rules.too_many_failed:
        raise SweepError(
            f"sweep {study.name}: {rules.failures} trials failed one after another, so it stops"
            f" (study.max_failures); the last: {rules.last_reason}"
        )
    if rules.reached:
        log.info("study.max_hours is over; the same command goes on with the sweep")


def open_study(
    settings: StudySettings, found: Search, folder: Path, probes: Mapping[str, Run]
) -> Study:
    """The study of a sweep, begun or gone on with, and warmed up if that is wanted."""
    from lorasweep.sweeps.study.check_unchanged import runs_basis
    from lorasweep.sweeps.study.study import Study
    from lorasweep.sweeps.study.warm_start import warm_start

    run = next(iter(probes.values()))
    study = Study(
        settings,
        found.space,
        sweep_name(folder),
        folder,
        max_epochs=run.max_train_epochs,
        guesses=found.guesses,
        basis=runs_basis(found.fixed, probes),
    )
    if settings.n_trials is not None and study.n_trials < settings.n_trials:
        log.info(
            "study.n_trials is %d, but there are %d points to try, each once",
            settings.n_trials,
            study.n_trials,
        )
    if "seed" in found.space.parameters and settings.sampler != "grid":
        log.warning(
            "seed is searched: %s takes it for a setting like any other, and will find lucky seeds;"
            " study.sampler=grid trains every setting with every seed, and ranks by their mean",
            settings.sampler,
        )
    warm_start(study, run.output_root, folder)
    if settings.pareto and settings.pruner != "none":
        log.info(
            "several objectives: runs are pruned by the first of them, %s",
            study.settings.objectives[0],
        )
    return study


def _show(study: Study, deleted: Collection[int]) -> None:
    from rich.console import Console

    from lorasweep.sweeps.study.study_summary import lines, summarise, table

    summary, console = summarise(study, deleted), Console()
    with console.capture() as shown:  # rich itself exits where stdout is closed
        console.print(table(summary))
        for line in lines(summary):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        if summary.best:
            console.print(f"Choose: lorasweep pick {study.name}", highlight=False)
    say(shown.get().rstrip())
