"""`hydra/sweeper=optuna`: see lorasweep.sweeps.run_sweep."""

# Hydra's scanner runs this file outside sys.modules: keep dataclasses and real code out of it.
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """Searches with Optuna; its settings are the config's node `study`."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context: Any = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from lorasweep.sweeps.run_sweep import sweep

        sweep(self.config, self.hydra_context.config_loader, self.launcher, arguments)
