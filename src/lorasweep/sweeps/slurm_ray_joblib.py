"""Whole packs as jobs of engines that reach other machines: SLURM (by submitit), Ray, joblib.

Each job trains one pack in a process of its own; nobody joins it later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lorasweep.config.run import Run
from lorasweep.core.failures import FailureKind
from lorasweep.core.settings import SettingsError
from lorasweep.runs.session import Failure, run_pack
from lorasweep.sweeps.trial_job import JobsStudy, train_trials

log = logging.getLogger(__name__)

Engine = Literal["submitit_slurm", "submitit_local", "joblib", "ray"]
_Result = Callable[[], list[Failure]]
"""Waits for one job, and gives the failures of its pack's runs."""


def train_by_jobs(
    packs: Sequence[Sequence[Run]],
    engine: Engine,
    options: Mapping[str, Any],
    folder: Path,
    study: JobsStudy | None = None,
) -> list[Failure]:
    """Train each pack as one job of the engine; `options` are the engine's own, `folder` its logs.

    With a study the runs are its trials: they report to it, and stop where they are to be pruned. A
    job that is lost fails its pack's runs with what the engine says; they are worth a retry. Raises
    SettingsError where the engine isn't installed or doesn't know an option.
    """
    if engine == "ray":
        results = _by_ray(packs, study, options)
    elif engine == "joblib":
        results = _by_joblib(packs, study, options)
    else:
        cluster = engine.removeprefix("submitit_")
        results = _by_submitit(packs, study, cluster, options, folder)
    failures: list[Failure] = []
    for pack, result in zip(packs, results, strict=True):
        try:
            failures += result()
        except Exception as error:  # whatever became of this job, the others stand
            reason = f"its {engine} job failed: {str(error).strip() or type(error).__name__}"
            lost = [Failure(run=run.name, reason=reason, kind=FailureKind.RETRY) for run in pack]
            failures += lost
    return failures


def train_pack(runs: Sequence[Run], study: JobsStudy | None = None) -> list[Failure]:
    """One job: train a pack to its end."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        if study is not None:
            return train_trials(runs, study)
        return [report for report in run_pack(runs) if isinstance(report, Failure)]
    except Exception as error:
        return Failure.of_pack([run.name for run in runs], error)


def _by_submitit(
    packs: Sequence[Sequence[Run]],
    study: JobsStudy | None,
    cluster: str,
    options: Mapping[str, Any],
    folder: Path,
) -> Iterator[_Result]:
    try:
        import submitit
    except ImportError:
        raise _missing(f"submitit_{cluster}", "submitit") from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**{"name": "lorasweep", **options})
    except (NameError, TypeError, RuntimeError) as error:
        raise SettingsError(f"launcher.pack_via=submitit_{cluster}: {_first(error)}") from None
    jobs = [executor.submit(train_pack, pack, study) for pack in packs]
    for job, pack in zip(jobs, packs, strict=True):
        log.info("job %s: %s; log %s", job.job_id, _names(pack), job.paths.stderr)
    return iter([job.result for job in jobs])


def _by_ray(
    packs: Sequence[Sequence[Run]], study: JobsStudy | None, options: Mapping[str, Any]
) -> Iterator[_Result]:
    try:
        import ray
    except ImportError:
        raise _missing("ray", "ray") from None
    resources = dict(options)
    address = resources.pop("address", None)
    try:
        # a task of its own process each: a pack leaves no memory behind
        remote = ray.remote(**{"max_calls": 1, "num_cpus": 1, **resources})(train_pack)
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=True)
    except (ConnectionError, TypeError, ValueError) as error:
        raise SettingsError(f"launcher.pack_via=ray: {_first(error)}") from None
    tasks = [remote.remote(pack, study) for pack in packs]
    return iter([lambda task=task: ray.get(task) for task in tasks])


def _by_joblib(
    packs: Sequence[Sequence[Run]], study: JobsStudy | None, options: Mapping[str, Any]
) -> Iterator[_Result]:
    try:
        from joblib import Parallel, delayed
    except ImportError:
        raise _missing("joblib", "joblib") from None
    given = {"n_jobs": 1, "return_as": "generator", **options}
    try:
        Parallel(**given)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"launcher.pack_via=joblib: {_first(error)}") from None
    job = delayed(train_pack)
    return _side_by_side(packs, lambda some: Parallel(**given)(job(pack, study) for pack in some))


def _side_by_side(
    packs: Sequence[Sequence[Run]],
    train: Callable[[Sequence[Sequence[Run]]], Iterable[list[Failure]]],
) -> Iterator[_Result]:
    """Results in order. A worker's death ends all that train, and joblib can't say whose it was:
    what is left goes on pack by pack, so that it is known from then on."""
    done = 0
    try:
        for failures in train(packs):
            done += 1
            yield partial(list, failures)
    except Exception as error:
        log.warning("what is left goes on pack by pack: %s", _first(error) or type(error).__name__)
    for pack in packs[done:]:
        yield partial(_alone, train, pack)


def _alone(
    train: Callable[[Sequence[Sequence[Run]]], Iterable[list[Failure]]], pack: Sequence[Run]
) -> list[Failure]:
    (failures,) = train([pack])
    return failures


def _names(pack: Sequence[Run]) -> str:
    return ", ".join(run.name for run in pack)


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _missing(engine: str, package: str) -> SettingsError:
    return SettingsError(
        f"launcher.pack_via={engine}: {package} is not installed; pip install 'lorasweep[cluster]'"
    )
