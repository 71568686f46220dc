"""The same command goes on in the folder in which it was broken off (conf/config.yaml names this).

Hydra gives every command a new folder. Between composing the config and using that folder it calls
`on_run_start` or `on_multirun_start`, which take the place of the folder's name by an override, as
if it had been given on the command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException


class ContinueBrokenOff(Callback):
    """Chooses the folder of a command. An error here would be no more than a warning to Hydra."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Choose the folder of a single run."""
        from lorasweep.config.settings_digest import run_digest
        from lorasweep.runs.resume import find_run

        if (parent := _parent(config, "hydra.run.dir")) is not None:
            _go_on_in(config, "hydra.run.dir", find_run(parent, run_digest(config)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Choose the folder of a multirun."""
        from lorasweep.config.settings_digest import sweep_digest
        from lorasweep.runs.resume import find_sweep

        if (parent := _parent(config, "hydra.sweep.dir")) is not None:
            _go_on_in(config, "hydra.sweep.dir", find_sweep(parent, sweep_digest(config)))


def _parent(config: DictConfig, key: str) -> Path | None:
    """Where the command's folders are; None if it names its folder itself, or has no good name."""
    given = [str(one).lstrip("+") for one in config.hydra.overrides.hydra]
    if any(one.startswith(f"{key}=") for one in given):
        return None
    try:
        return Path(str(OmegaConf.select(config, key))).parent
    except OmegaConfBaseException:  # Hydra meets it too, when it makes the folder
        return None


def _go_on_in(config: DictConfig, key: str, folder: Path | None) -> None:
    from lorasweep.config.compose import quoted

    if folder is None:
        return
    with open_dict(config):
        OmegaConf.update(config, key, str(folder))
        config.hydra.overrides.hydra.append(f"{key}={quoted(str(folder))}")  # jobs compose anew
