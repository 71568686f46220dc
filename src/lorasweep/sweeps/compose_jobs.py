"""A multirun's jobs, as Hydra composes them and leaves them in their folders."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lorasweep.config.build_run import build_run, job_identity
from lorasweep.config.error_messages import explain
from lorasweep.config.run import Run
from lorasweep.core.settings import SettingsError


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
        raise SettingsError(explain(error)) from error


def _was_interrupted(error: BaseException | None) -> bool:
    """OmegaConf, interrupted, raises errors of its own in its cleaning up."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _composed(config: DictConfig, loader: Any, overrides: Sequence[str], number: int) -> Job:
    composed = loader.load_sweep_config(config, list(overrides))
    with open_dict(composed):
        composed.hydra.job.id = str(number)
        composed.hydra.job.num = number
        output_dir = Path(composed.hydra.sweep.dir) / str(composed.hydra.sweep.subdir)
        composed.hydra.runtime.output_dir = str(output_dir.absolute())
    run = build_run(own_config(composed), **job_identity(composed.hydra))
    return Job(overrides, composed, run)


def read_once(loader: Any) -> None:
    """Let Hydra's loader read every YAML file once from now on, for all jobs of a multirun.

    That is half of the time of composing a job, and a file that is edited while a sweep runs would
    change the trials that come after. Hydra's own launchers send the loader along with each job.
    """
    if not isinstance(loader.repository, _ReadOnce):
        loader.repository = _ReadOnce(loader.repository)


class _ReadOnce:
    """A config repository of Hydra's, with what it has read.

    Hydra copies its repository for each job, as the job's searchpath may change where it looks:
    copies share what was read as long as they look in the same places.
    """

    def __init__(self, repository: Any, read: dict[Any, Any] | None = None) -> None:
        self._repository, self._read = repository, {} if read is None else read

    def __deepcopy__(self, memo: dict[int, Any]) -> _ReadOnce:
        return _ReadOnce(copy.deepcopy(self._repository, memo), self._read)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of this class, when it is unpickled
            raise AttributeError(name)
        return getattr(self._repository, name)

    def load_config(self, config_path: str) -> Any:
        """The file's content, for the caller to change."""
        key = (config_path, *((source.scheme(), source.path) for source in self.get_sources()))
        if key not in self._read:
            self._read[key] = self._repository.load_config(config_path)
        return copy.deepcopy(self._read[key])


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
