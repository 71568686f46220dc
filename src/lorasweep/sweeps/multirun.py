"""Jobs of a multirun, trained in packs: those that can share a base model train together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import NonNegativeInt, PositiveInt

from lorasweep.config.foreign_settings import check_job
from lorasweep.config.run import Run
from lorasweep.config.settings_digest import sweep_digest
from lorasweep.core.failures import FailureKind, RunError
from lorasweep.core.settings import Settings, SettingsError
from lorasweep.models.devices import choose_devices
from lorasweep.runs import run_folder
from lorasweep.runs.prepare import check_inputs, check_server
from lorasweep.runs.session import Failure
from lorasweep.sweeps.compose_jobs import Job, compose_job, own_config, save_hydra_files
from lorasweep.sweeps.read_yaml_once import read_yaml_once
from lorasweep.sweeps.slurm_ray_joblib import Engine, train_by_jobs
from lorasweep.sweeps.trial_job import JobsStudy
from lorasweep.sweeps.worker_pool import WorkerPool
from lorasweep.tracking.sync import publish_left

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LauncherSettings(Settings):
    """Settings of the launcher; conf/config.yaml says what each does."""

    devices: str | tuple[str, ...]
    max_pack: PositiveInt
    retries: NonNegativeInt
    pack_via: Engine | None
    engine: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        if self.engine and self.pack_via is None:
            raise SettingsError(
                f"launcher.engine.{next(iter(self.engine))} has no effect without launcher.pack_via"
            )
        if self.pack_via is not None and self.devices != "auto":
            raise SettingsError(
                "launcher.devices has no effect with launcher.pack_via, whose jobs have a device"
                " each: give trainer.device"
            )


def launch(
    config: DictConfig,
    config_loader: Any,
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
    settings: LauncherSettings,
) -> list[JobReturn]:
    """Train all jobs and return Hydra's result of each, in their order.

    Every job's config is checked before the first trains. A job that fails is returned as failed,
    with its reason; the others stand.
    """
    folder, output_root = Path(config.hydra.sweep.dir), Path(str(config.output_root))
    with ExitStack() as workers:
        with run_folder.nothing_left_if_refused(folder, output_root):
            check_job(config, config.hydra)
            if not job_overrides:
                swept = [word for word in config.hydra.overrides.task if "range(" in word]
                raise SettingsError(f"{' '.join(swept)}: the range is empty")
            log.info("%d runs go to %s", len(job_overrides), run_folder.as_typed(folder))
            read_yaml_once(config_loader)
            pool = open_pool(settings, config.trainer.device)
            if pool:
                workers.enter_context(pool.ready(len(job_overrides)))
            jobs = [
                compose_job(config, config_loader, overrides, number)
                for number, overrides in enumerate(job_overrides, start=initial_job_idx)
            ]
            study = JobsStudy.of(jobs[0].config, jobs[0].config.hydra)
            if study is None:  # whose driver has looked through them once
                check_inputs(job.run for job in jobs)
                check_server(jobs[0].run)
            for job in jobs:
                job.run.check()
        failures = _launch(config, jobs, settings, pool, study)
    failed = {failure.run: failure for failure in failures}
    return [_returned(job, failed.get(job.run.name)) for job in jobs]


def open_pool(settings: LauncherSettings, device: str) -> WorkerPool | None:
    """The workers, of which none runs yet; None where packs are jobs of an engine.

    Raises SettingsError for a device that is not there.
    """
    if settings.pack_via is not None:
        return None
    return WorkerPool(choose_devices(settings.devices, device), settings.max_pack)


def _launch(
    config: DictConfig,
    jobs: Sequence[Job],
    settings: LauncherSettings,
    pool: WorkerPool | None,
    study: JobsStudy | None,
) -> list[Failure]:
    """Train the jobs that haven't ended yet; those that failed."""
    folder = Path(config.hydra.sweep.dir).absolute()
    digest = sweep_digest(config)
    ended = {job.run.name: run_folder.ended(job.run) for job in jobs}
    before = [name for name, status in ended.items() if status == "failed"]
    failed = [Failure(run=name, reason="it failed before") for name in before]
    todo = [job for job in jobs if ended[job.run.name] is None]
    if done := [name for name, status in ended.items() if status is not None]:
        log.info("%s have ended before and stay as they are", ", ".join(done))
        first = jobs[0].run
        publish_left(
            first.tracking,
            first.output_root,
            [job.run.output_dir for job in jobs if job.run.name in done],
        )
    # a study can be stopped, and tries again, itself
    stoppable = nullcontext() if study else run_folder.stoppable(folder)
    with run_folder.taken(folder), stoppable:
        run_folder.write_sweep(folder, digest, "unfinished")
        for job in todo:
            save_hydra_files(job)
            run_folder.forget_drop(job.run.output_dir)
        if todo:
            runs = [job.run for job in todo]
            failed += (
                _train_here(pool, runs, settings) if pool else _train_by_jobs(runs, settings, study)
            )
        if not any(run_folder.is_unfinished(job.run.output_dir) for job in jobs):
            run_folder.write_sweep(folder, digest, "finished")
    for failure in [] if study else failed:  # a study says it of its trials
        log.error("%s failed: %s", failure.run, failure.reason)
    return failed


def _train_here(pool: WorkerPool, runs: Sequence[Run], settings: LauncherSettings) -> list[Failure]:
    """Train runs in worker processes to their ends; those that failed."""
    chosen = {
        tuple(choose_devices(settings.devices, device)): device
        for device in dict.fromkeys(run.trainer.device for run in runs)
    }
    devices, *others = chosen
    if others:
        raise SettingsError(
            f"trainer.device={chosen[others[0]]}: a sweep's runs share their devices, and others"
            f" have {chosen[devices]}; use launcher.devices"
        )
    if devices != pool.devices:  # all jobs have another than the sweep itself
        pool = WorkerPool(devices, settings.max_pack)
    with pool:
        return _with_retries(partial(_train, pool), runs, settings.retries)


def _train_by_jobs(
    runs: Sequence[Run], settings: LauncherSettings, study: JobsStudy | None
) -> list[Failure]:
    """Train runs in packs that are jobs of an engine; those that failed.

    Trials of a study report to it, and it tries again itself.
    """
    engine, folder = settings.pack_via, runs[0].output_dir.parent / ".jobs"
    assert engine is not None

    def train(some: Sequence[Run]) -> list[Failure]:
        packs = group(some, settings.max_pack)
        return train_by_jobs(packs, engine, settings.engine or {}, folder, study)

    return _with_retries(train, runs, 0 if study else settings.retries)


def _with_retries(
    train: Callable[[Sequence[Run]], list[Failure]], runs: Sequence[Run], retries: int
) -> list[Failure]:
    """Train runs, and again those whose failure is worth a retry; those that failed in the end."""
    failures = train(runs)
    again = {one.run for one in failures if one.kind == FailureKind.RETRY and retries > 0}
    if not again:
        return failures
    for one in failures:
        if one.run in again:
            log.warning("%s is tried again: %s", one.run, one.reason)
    left = [run for run in runs if run.name in again]
    rest = [one for one in failures if one.run not in again]
    return [*rest, *_with_retries(train, left, retries - 1)]


def _train(pool: WorkerPool, runs: Sequence[Run]) -> list[Failure]:
    """Train runs as there is room for them; those that failed."""
    failures: list[Failure] = []
    queue = list(runs)
    while True:
        queue = [run for run in queue if not pool.submit(run)]
        events = pool.events()
        if not events:
            return failures
        failures += [event for event in events if isinstance(event, Failure)]


def group(runs: Sequence[Run], max_pack: int) -> list[list[Run]]:
    """Sort runs into packs of at most `max_pack` that can share a base, in order of appearance."""
    packs: list[list[Run]] = []
    for run in runs:
        fitting = (p for p in packs if len(p) < max_pack and p[0].can_share_pack(run))
        pack = next(fitting, None)
        if pack is None:
            packs.append([run])
        else:
            pack.append(run)
    return packs


def _returned(job: Job, failure: Failure | None) -> JobReturn:
    from hydra.core.utils import JobReturn, JobStatus

    returned = JobReturn(
        overrides=job.overrides,
        cfg=own_config(job.config),
        hydra_cfg=OmegaConf.masked_copy(job.config, ["hydra"]),
        working_dir=str(job.run.output_dir),
        task_name=str(job.config.hydra.job.name),
        status=JobStatus.COMPLETED if failure is None else JobStatus.FAILED,
    )
    returned.return_value = failure and RunError(failure.reason, failure.kind)
    return returned
