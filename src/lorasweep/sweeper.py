"""Drives a sweep: asks the study for trials, trains them, tells it what they came to."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from omegaconf import DictConfig, OmegaConf

from lorasweep import config as configs
from lorasweep import dataset, search
from lorasweep.config import Run
from lorasweep.launcher import Job, compose_job, save_hydra_files
from lorasweep.run import EpochReport, Failure, Finished, Report, RunError, Session
from lorasweep.search import Search
from lorasweep.settings import build
from lorasweep.study.storage import only_driver, sweep_name

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn

    from lorasweep.study.study import Study
    from lorasweep.study.trial import Trial

log = logging.getLogger(__name__)

# null in conf/, for Hydra lets a command line replace null by a mapping, and nothing else
_MAPS = ("conditions", "vars", "sampler_options", "pruner_options", "constraints")


class SweepError(RuntimeError):
    """A sweep that can't go on; the message says why."""


class Trainers(Protocol):
    """What trains runs: a Fleet, as far as a sweep needs it."""

    def room_for(self, run: Run) -> bool: ...
    def submit(self, run: Run) -> None: ...
    def drop(self, name: str) -> None: ...
    def events(self, timeout: float | None = None) -> Sequence[Report]: ...
    def __enter__(self) -> Trainers: ...
    def __exit__(self, *error: Any) -> None: ...


@dataclass
class Limits:
    """When a sweep begins no more trials: its time is up, or too many failed one after another."""

    max_hours: float | None
    max_failures: int | None
    began: float
    failures: int = 0  # since the last trial that ended well
    last_reason: str = ""

    @property
    def hopeless(self) -> bool:
        """Have too many failed?"""
        return self.max_failures is not None and self.failures >= self.max_failures

    @property
    def reached(self) -> bool:
        """Is no more trial to begin?"""
        hours = (time.monotonic() - self.began) / 3600
        return self.hopeless or (self.max_hours is not None and hours >= self.max_hours)

    def failed(self, reason: str) -> None:
        """Count a failure."""
        self.failures, self.last_reason = self.failures + 1, reason


def sweep(config: DictConfig, config_loader: Any, launcher: Any, arguments: Sequence[str]) -> None:
    """Run the sweep of a composed config to its end, or go on with it.

    `arguments` are the command line's overrides. Raises SettingsError, in one line and before any
    work, for what is wrong in the sweep; SweepError when too many trials failed.
    """
    found = search.read(config, config_loader, arguments)
    folder = Path(config.hydra.sweep.dir).absolute()
    jobs = Jobs(config, config_loader, found)
    plan = jobs.check()
    with only_driver(folder, sweep_name(folder)):
        OmegaConf.save(config, folder / "multirun.yaml")
        study = open_study(config, found, folder, plan)
        if left := study.take_over():
            log.warning("trials that an ended driver left go on: %s", ", ".join(map(str, left)))
        try:
            drive(study, jobs, launcher)
        finally:
            _show(study)


def drive(study: Study, jobs: Jobs, launcher: Any) -> None:
    """Train the study's trials: as they come with packs, else batch by batch."""
    settings = study.settings
    limits = Limits(settings.max_hours, settings.max_failures, time.monotonic())
    fleet = launcher.fleet() if hasattr(launcher, "fleet") else None
    if fleet is None:
        Batches(study, jobs, launcher, limits).run()
    else:
        with fleet:
            Flow(study, jobs.prepare, fleet, limits).run()
    if limits.hopeless:
        raise SweepError(
            f"sweep {study.name}: {limits.failures} trials failed one after another, so it stops"
            f" (study.max_failures); the last: {limits.last_reason}"
        )
    if limits.reached:
        log.info("study.max_hours is over; the same command goes on with the sweep")


class Flow:
    """Trials that come and go one by one: a new one begins as soon as there is room for it."""

    def __init__(
        self,
        study: Study,
        prepare: Callable[[Trial], Run],
        fleet: Trainers,
        limits: Limits,
    ) -> None:
        self._study, self._prepare, self._fleet = study, prepare, fleet
        self._limits = limits
        self._trials: dict[str, Trial] = {}  # by their run's name, those that train
        self._dropped: set[str] = set()
        self._held: tuple[Trial, Run] | None = None  # asked for, and waiting for room
        self._probe: Run | None = None  # like the last, under a name that nobody has

    def run(self) -> None:
        """Go on until the study has enough trials, or a limit is reached."""
        self._fill()
        while self._trials:
            events = self._fleet.events()
            if not events:
                raise SweepError("the workers ended without a word of their runs; see the log")
            for event in events:
                self._take(event)
            for event in events:  # once all have reported: each is compared with all
                self._prune(event)
            self._fill()

    def _fill(self) -> None:
        """Begin trials while there is room; each knows all that was told before it."""
        while self._hold():
            assert self._held is not None
            trial, run = self._held
            if self._trials and not self._fleet.room_for(run):
                return
            self._fleet.submit(run)
            self._trials[run.name] = trial
            self._held, self._probe = None, replace(run, name=f"{run.name}-next")

    def _hold(self) -> bool:
        """Have a trial in hand that could begin, unless all places are taken."""
        while self._held is None:
            full = self._probe is not None and not self._fleet.room_for(self._probe)
            if self._limits.reached or (self._trials and full):
                return False
            trial = self._study.next()
            if trial is None:
                return False
            try:
                run = self._prepare(trial)
            except ValueError as error:
                self._failed(trial, configs.one_line(error) or str(error), transient=False)
                continue
            trial.plan(run.trainer.max_train_epochs)
            log.info("trial %d: %s", trial.number, " ".join(trial.overrides))
            self._held = trial, run
        return True

    def _take(self, event: Report) -> None:
        trial = self._trials.get(event.run)
        if trial is None:  # of a run that was ended before
            return
        if isinstance(event, EpochReport):
            _report(trial, event)
        elif isinstance(event, Failure):
            del self._trials[event.run]
            self._failed(trial, event.reason, transient=event.transient)
        elif isinstance(event, Finished):
            del self._trials[event.run]
            self._ended(trial, pruned=event.run in self._dropped and event.dropped)

    def _prune(self, event: Report) -> None:
        trial = self._trials.get(event.run)
        if trial is None or event.run in self._dropped or not isinstance(event, EpochReport):
            return
        if trial.should_prune():
            _say_pruned(trial)
            self._dropped.add(event.run)
            self._fleet.drop(event.run)

    def _ended(self, trial: Trial, *, pruned: bool) -> None:
        if pruned:
            self._study.prune(trial)
        else:
            self._study.complete(trial)
        if trial.best is None:
            self._limits.failed("no epoch had a finite score")
        else:
            self._limits.failures = 0

    def _failed(self, trial: Trial, reason: str, *, transient: bool) -> None:
        again = self._study.fail(trial, reason, transient=transient)
        log.error(
            "trial %d failed%s: %s", trial.number, ", is tried again" if again else "", reason
        )
        self._limits.failed(reason)


class Batches:
    """Trials through one of Hydra's own launchers, which return when a whole batch has ended.

    The jobs report to the study themselves and stop where they are to be pruned.
    """

    def __init__(self, study: Study, jobs: Jobs, launcher: Any, limits: Limits) -> None:
        self._study, self._jobs, self._launcher, self._limits = study, jobs, launcher, limits

    def run(self) -> None:
        """Go on until the study has enough trials, or a limit is reached."""
        while not self._limits.reached and (trials := self._batch()):
            for part in _consecutive(trials):
                self._launch(part)

    def _batch(self) -> list[Trial]:
        trials: list[Trial] = []
        while len(trials) < self._study.settings.batch_size:
            trial = self._study.next()
            if trial is None:
                break
            log.info("trial %d: %s", trial.number, " ".join(trial.overrides))
            trial.plan(self._jobs.epochs)
            trials.append(trial)
        return trials

    def _launch(self, trials: Sequence[Trial]) -> None:
        overrides = [self._jobs.overrides(trial, reports=True) for trial in trials]
        try:
            returns = self._launcher.launch(overrides, initial_job_idx=trials[0].number)
        except Exception as error:  # a launcher raises when a worker dies; which one, it can't say
            log.exception("the launcher failed")
            returns = [error] * len(trials)
        for trial, returned in zip(trials, returns, strict=True):
            self._settle(trial, returned)

    def _settle(self, trial: Trial, returned: JobReturn | Exception) -> None:
        reason = _reason(returned)
        if reason is None:
            self._study.settle(trial.number, self._jobs.tracked)
            self._limits.failures = 0
            return
        again = self._study.fail(trial, reason, transient=isinstance(returned, Exception))
        log.error(
            "trial %d failed%s: %s", trial.number, ", is tried again" if again else "", reason
        )
        self._limits.failed(reason)


class Jobs:
    """Hydra jobs of a sweep's trials."""

    def __init__(self, config: DictConfig, config_loader: Any, found: Search) -> None:
        self._config, self._loader, self._search = config, config_loader, found
        self._folder = Path(config.hydra.sweep.dir).absolute()
        self.epochs = 0
        self._checked: Run | None = None

    def check(self) -> Run:
        """Compose the sweep's first run and one of each value; SettingsError for what is wrong."""
        probes = [self._composed(self._search.space.overrides(p), 0) for p in self._probes()]
        for settings in dict.fromkeys(job.run.dataset for job in probes):
            dataset.find(settings)
        for job in probes:
            job.run.check()
        self.epochs = max(job.run.trainer.max_train_epochs for job in probes)
        self._checked = probes[0].run
        return self._checked

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

    def tracked(self, number: int) -> list[Any]:
        """The candidates of a trial's run that MLflow knows."""
        from lorasweep import tracking

        assert self._checked is not None
        run = self._checked
        name = f"{run.name.rpartition('-')[0]}-{number}"
        uri = run.tracking.resolve(run.output_root)
        return tracking.candidates(uri, run.tracking.experiment, sweep_name(self._folder), name)

    def _composed(self, params: Sequence[str], number: int) -> Job:
        return compose_job(self._config, self._loader, [*self._search.fixed, *params], number)

    def _probes(self) -> list[Mapping[str, Any]]:
        return list(self._search.space.probes())


def train_trial(run: Run, trial: Trial) -> None:
    """Train a trial's run in this process, and stop it where it is to be pruned.

    For Hydra's own launchers, whose jobs report to the study themselves. Raises RunError if it
    fails.
    """
    with Session(run) as session:
        for reports in session.train([run]):
            for report in reports:
                if isinstance(report, Failure):
                    raise RunError(report.reason)
                if isinstance(report, EpochReport):
                    _report(trial, report)
                    if trial.should_prune():
                        _say_pruned(trial)
                        session.drop(run.name)
                        trial.mark_pruned()


def trial_of(cfg: DictConfig, hydra_cfg: DictConfig) -> Trial:
    """The trial that a Hydra job is, which a sweep started."""
    from lorasweep.study.study import join_study

    settings = study_settings(cfg)
    epochs = int(cfg.trainer.max_train_epochs)
    return join_study(
        settings, Path(hydra_cfg.sweeper.folder), int(hydra_cfg.job.num), max_epochs=epochs
    )


def _report(trial: Trial, report: EpochReport) -> None:
    checkpoint = report.checkpoint
    trial.report(checkpoint.epoch, checkpoint.path, report.scores, report.terms)


def open_study(config: DictConfig, found: Search, folder: Path, run: Run) -> Study:
    """The study of a sweep, begun or gone on with, and warmed up if that is wanted."""
    from lorasweep.study.study import Study

    settings = study_settings(config)
    study = Study(
        settings,
        found.space,
        sweep_name(folder),
        folder,
        max_epochs=run.trainer.max_train_epochs,
        guesses=found.guesses,
        basis={"overrides": _basis(found.fixed)},
    )
    if settings.warm_start is not None:
        _warm_start(study, settings.warm_start, run.output_root)
    if settings.pareto and settings.pruner != "none":
        log.info(
            "several objectives: runs are pruned by the first of them, %s", settings.objectives[0]
        )
    return study


def study_settings(config: DictConfig) -> Any:
    """The typed settings of `study`. Raises SettingsError."""
    values = OmegaConf.to_container(config.study, resolve=True)
    assert isinstance(values, dict)
    given = {str(key): value for key, value in values.items()}
    empty: dict[str, Any] = {key: {} for key in _MAPS if given.get(key) is None}
    return build({**given, **empty}, "study")


def _basis(fixed: Sequence[str]) -> list[str]:
    """The overrides that make another sweep of it; how and where it runs may change."""
    free = ("study.", "launcher.", "tracking.", "trainer.device", "cache_dir", "output_root")
    return sorted(one for one in fixed if not one.lstrip("+").startswith(free))


def _warm_start(study: Study, other: str, output_root: Path) -> None:
    from lorasweep.study.study import known_trials

    found = known_trials(other, study.settings.storage, output_root)
    taken = study.learn(found, other)
    log.info("warm start: %d of %d trials of %s fit this search space", taken, len(found), other)


def _consecutive(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Parts whose numbers follow each other, as Hydra numbers the jobs of a batch."""
    parts: list[list[Trial]] = []
    for trial in trials:
        if parts and parts[-1][-1].number + 1 == trial.number:
            parts[-1].append(trial)
        else:
            parts.append([trial])
    return parts


def _reason(returned: JobReturn | Exception) -> str | None:
    """Why a job failed; None if it didn't."""
    from hydra.core.utils import JobStatus

    if isinstance(returned, Exception):
        error: Any = returned
    elif returned.status == JobStatus.COMPLETED:
        return None
    else:
        error = returned._return_value
    known = configs.one_line(error) if isinstance(error, Exception) else None
    return known or f"{type(error).__name__}: {error}"


def _say_pruned(trial: Trial) -> None:
    best = f"{trial.values[0]:.4f} at epoch {trial.best.epoch}" if trial.best else "none"
    log.info("trial %d is pruned after epoch %d; its best: %s", trial.number, trial.epochs, best)


def _show(study: Study) -> None:
    from rich.console import Console

    from lorasweep.study.summary import lines, summarise, table

    summary, console = summarise(study), Console()
    console.print(table(summary))
    for line in lines(summary):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"Choose: lorasweep pick {study.name}", highlight=False)
