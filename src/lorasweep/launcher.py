"""Jobs of a multirun, trained in packs: those that can share a base model train together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from lorasweep import config as configs
from lorasweep import dataset
from lorasweep.config import Run, build_run, job_identity
from lorasweep.run import Failure, RunError, run_pack

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One job of a multirun: what Hydra composed and what we made of it."""

    overrides: Sequence[str]
    config: DictConfig
    run: Run


def launch(
    config: DictConfig,
    config_loader: Any,
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
    max_pack: int,
) -> list[JobReturn]:
    """Train all jobs and return Hydra's result of each, in their order.

    Every job's config is checked before the first trains. A job that fails is returned as failed,
    with its reason; the others stand.
    """
    jobs = [
        _job(config, config_loader, list(overrides), initial_job_idx + index)
        for index, overrides in enumerate(job_overrides)
    ]
    for settings in dict.fromkeys(job.run.dataset for job in jobs):
        dataset.find(settings)
    for job in jobs:
        job.run.check()
        _save_hydra_files(job)
    reasons: dict[str, str] = {}
    packs = group([job.run for job in jobs], max_pack)
    for number, pack in enumerate(packs, start=1):
        names = ", ".join(run.name for run in pack)
        log.info("pack %d of %d: %s", number, len(packs), names)
        reasons.update(_train(pack))
    for name, reason in reasons.items():
        log.error("%s failed: %s", name, reason)
    return [_returned(job, reasons.get(job.run.name)) for job in jobs]


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


def _job(config: DictConfig, loader: Any, overrides: list[str], number: int) -> Job:
    composed = loader.load_sweep_config(config, overrides)
    with open_dict(composed):
        composed.hydra.job.id = str(number)
        composed.hydra.job.num = number
        output_dir = Path(composed.hydra.sweep.dir) / str(composed.hydra.sweep.subdir)
        composed.hydra.runtime.output_dir = str(output_dir.absolute())
    run = build_run(_own(composed), **job_identity(composed.hydra))
    return Job(overrides, composed, run)


def _own(config: DictConfig) -> DictConfig:
    """The config without Hydra's own part."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _save_hydra_files(job: Job) -> None:
    """What Hydra's own launchers leave in a job's folder."""
    folder = job.run.output_dir / str(job.config.hydra.output_subdir or ".hydra")
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(_own(job.config), folder / "config.yaml")
    OmegaConf.save(OmegaConf.masked_copy(job.config, ["hydra"]), folder / "hydra.yaml")
    OmegaConf.save(job.config.hydra.overrides.task, folder / "overrides.yaml")


def _train(pack: Sequence[Run]) -> dict[str, str]:
    """Train a pack to its end; run -> why it failed."""
    try:
        reports = [report for report in run_pack(pack) if isinstance(report, Failure)]
    except Exception as error:  # whatever broke this pack, the other packs must still train
        reason = configs.one_line(error)
        if reason is None:
            log.exception("a pack failed")
            reason = f"{type(error).__name__}: {error}"
        return {run.name: reason for run in pack}
    return {failure.run: failure.reason for failure in reports}


def _returned(job: Job, reason: str | None) -> JobReturn:
    from hydra.core.utils import JobReturn, JobStatus

    returned = JobReturn(
        overrides=job.overrides,
        cfg=_own(job.config),
        hydra_cfg=OmegaConf.masked_copy(job.config, ["hydra"]),
        working_dir=str(job.run.output_dir),
        task_name=str(job.config.hydra.job.name),
        status=JobStatus.COMPLETED if reason is None else JobStatus.FAILED,
    )
    returned.return_value = None if reason is None else RunError(reason)
    return returned
