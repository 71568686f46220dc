"""`hydra/launcher=packs`: see lorasweep.launcher."""

# Hydra's scanner runs this file outside sys.modules: keep dataclasses and real code out of it.
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


class PacksLauncher(Launcher):
    """Trains the jobs of a multirun in packs of at most `max_pack`."""

    def __init__(self, max_pack: int) -> None:
        self.max_pack = max_pack

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context: Any = hydra_context
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from lorasweep.launcher import launch

        setup_globals()
        sweep_dir = Path(self.config.hydra.sweep.dir)
        sweep_dir.mkdir(parents=True, exist_ok=True)
        with open_dict(self.config):  # one log file for the sweep
            self.config.hydra.runtime.output_dir = str(sweep_dir.absolute())
        configure_log(self.config.hydra.job_logging, self.config.hydra.verbose)
        loader = self.hydra_context.config_loader
        return launch(self.config, loader, job_overrides, initial_job_idx, self.max_pack)
