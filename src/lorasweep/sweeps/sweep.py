"""Drives a sweep: asks the study for trials, trains them, tells it what they came to."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lorasweep.config.conf_folder import PACKAGE
from lorasweep.config.run import Run
from lorasweep.config.settings_digest import changes_nothing
from lorasweep.core.progress import say
from lorasweep.core.settings import SettingsError
from lorasweep.runs.run_folder import stoppable, sweep_name
from lorasweep.sweeps import sweep_file
from lorasweep.sweeps.compose_jobs import read_once
from lorasweep.sweeps.stop_rules import Limits, SweepError
from lorasweep.sweeps.study.study_storage import only_driver
from lorasweep.sweeps.sweep_file import Search
from lorasweep.sweeps.trial_jobs import Jobs
from lorasweep.sweeps.trial_processes import study_settings
from lorasweep.sweeps.trials_in_batches import Batches
from lorasweep.sweeps.trials_in_packs import Flow

if TYPE_CHECKING:
    from lorasweep.sweeps.study.study import Study
    from lorasweep.sweeps.study.study_settings import StudySettings

log = logging.getLogger(__name__)


def sweep(config: DictConfig, config_loader: Any, launcher: Any, arguments: Sequence[str]) -> None:
    """Run the sweep of a composed config to its end, or go on with it.

    `arguments` are the command line's overrides. Raises SettingsError, in one line and before any
    work, for what is wrong in the sweep; SweepError when too many trials failed.
    """
    read_once(config_loader)
    found = sweep_file.read(config, config_loader, arguments)
    settings = study_settings(config, config.hydra.overrides.task)
    fleet = launcher.fleet() if hasattr(launcher, "fleet") else None
    with fleet.ready(settings.n_trials) if fleet else nullcontext():
        folder = Path(config.hydra.sweep.dir).absolute()
        jobs = Jobs(config, config_loader, found)
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
            try:
                drive(study, jobs, fleet or launcher, alike=all(map(first.can_share_pack, others)))
            finally:
                _show(study)


def drive(study: Study, jobs: Jobs, trains: Any, *, alike: bool) -> None:
    """Train the study's trials: as they come with a Fleet, else batch by batch by a launcher."""
    settings = study.settings
    limits = Limits(settings.max_hours, settings.max_failures, time.monotonic(), alike)
    if hasattr(trains, "launch"):
        Batches(study, jobs, trains, limits).run()
    else:
        with trains:
            Flow(study, jobs.prepare, trains, limits).run()
    if limits.hopeless:
        raise SweepError(
            f"sweep {study.name}: {limits.failures} trials failed one after another, so it stops"
            f" (study.max_failures); the last: {limits.last_reason}"
        )
    if limits.reached:
        log.info("study.max_hours is over; the same command goes on with the sweep")


def open_study(
    settings: StudySettings, found: Search, folder: Path, probes: Mapping[str, Run]
) -> Study:
    """The study of a sweep, begun or gone on with, and warmed up if that is wanted."""
    from lorasweep.sweeps.study.study import Study

    run = next(iter(probes.values()))
    study = Study(
        settings,
        found.space,
        sweep_name(folder),
        folder,
        max_epochs=run.max_train_epochs,
        guesses=found.guesses,
        basis={
            "overrides": _basis(found.fixed),
            "settings": _settings(run),
            "points": _varying({point: _settings(run) for point, run in probes.items()}),
        },
    )
    if settings.n_trials is not None and study.n_trials < settings.n_trials:
        log.info(
            "study.n_trials is %d, but there are %d points to try, each once",
            settings.n_trials,
            study.n_trials,
        )
    _warm_start(study, run.output_root, folder)
    if settings.pareto and settings.pruner != "none":
        log.info(
            "several objectives: runs are pruned by the first of them, %s", settings.objectives[0]
        )
    return study


def _basis(fixed: Sequence[str]) -> list[str]:
    """The overrides that make another sweep of it; how and where it runs may change."""
    names = {one: one.lstrip("+~").partition("=")[0] for one in fixed}
    return sorted(one for one, name in names.items() if not _is_free(name))


def _varying(points: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What is not the same at all points, by point and key."""
    first, *others = points.values()
    same = {key for key in first if all(key in o and o[key] == first[key] for o in others)}
    return {
        f"{point}: {key}": value
        for point, settings in points.items()
        for key, value in settings.items()
        if key not in same
    }


def _settings(run: Run) -> dict[str, Any]:
    """Likewise the settings of a run of the sweep, for files are edited too."""
    plain = {key: value for key, value in run.params.items() if not _is_free(key)}
    text = json.dumps(plain, default=str)
    found: dict[str, Any] = json.loads(text.replace(str(PACKAGE), ""))  # may be installed elsewhere
    return found


def _is_free(key: str) -> bool:
    searches = key.startswith("study.") and not key.startswith("study.vars")
    return searches or changes_nothing(key)


def _warm_start(study: Study, output_root: Path, folder: Path) -> None:
    """Once, and whole: what a kill broke off is finished before the study goes on."""
    from lorasweep.sweeps.study.study import known_trials

    other, known = study.settings.warm_start, study.learns_from
    if study.has_learned:
        if other not in (None, known):
            said = "sweep %s took the trials of %s when it began; those of %s are not taken"
            log.warning(said, study.name, known, other)
        return
    if known is not None and other != known:
        raise SettingsError(
            f"sweep {study.name} was broken off while it took the trials of {known}: give"
            f" study.warm_start={known}, or another study.name"
        )
    if other is None:
        return
    found = known_trials(other, study.settings, output_root, folder)
    taken = study.learn(found, other)
    level = logging.INFO if taken else logging.WARNING
    said = (
        "warm start: %d of %d trials of %s fit this search space (same parameters, values within,"
        " a score for each constraint)"
    )
    log.log(level, said, taken, len(found), other)


def _show(study: Study) -> None:
    from rich.console import Console

    from lorasweep.sweeps.study.study_summary import lines, summarise, table

    summary, console = summarise(study), Console()
    with console.capture() as shown:  # rich itself exits where stdout is closed
        console.print(table(summary))
        for line in lines(summary):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        if summary.best:
            console.print(f"Choose: lorasweep pick {study.name}", highlight=False)
    say(shown.get().rstrip())
