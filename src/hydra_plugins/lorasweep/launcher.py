"""`hydra/launcher=packs`: see lorasweep.sweeps.multirun."""

# Hydra's scanner runs this file outside sys.modules: keep dataclasses and real code out of it.
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class PacksLauncher(Launcher):
    """Trains the jobs of a multirun in packs; lorasweep.sweeps.multirun has its settings."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context: Any = hydra_context
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from lorasweep.sweeps.multirun import launch

        settings = self._settings()
        self.begin()
        loader = self.hydra_context.config_loader
        return launch(self.config, loader, job_overrides, initial_job_idx, settings)

    def worker_pool(self) -> Any:
        """The workers, for a sweeper that gives them runs one by one; None where packs are jobs of
        a cluster."""
        from lorasweep.sweeps.multirun import open_pool

        return open_pool(self._settings(), self.config.trainer.device)

    def begin(self) -> None:
        """From here on, one log file for the sweep."""
        setup_globals()
        sweep_dir = Path(self.config.hydra.sweep.dir)
        sweep_dir.mkdir(parents=True, exist_ok=True)
        with open_dict(self.config):
            self.config.hydra.runtime.output_dir = str(sweep_dir.absolute())
        configure_log(self.config.hydra.job_logging, self.config.hydra.verbose)

    def _settings(self) -> Any:
        from lorasweep.core.settings import build_class
        from lorasweep.sweeps.multirun import LauncherSettings

        values = OmegaConf.to_container(OmegaConf.create(self.settings))
        return build_class(LauncherSettings, values, "launcher")  # type: ignore[arg-type]
