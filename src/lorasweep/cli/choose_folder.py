"""The same command goes on in the folder in which it was broken off (conf/config.yaml names this).

Hydra gives every command a new folder. Between composing the config and using that folder it calls
`on_run_start` or `on_multirun_start`, which take the place of the folder's name by an override, as
if it had been given on the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
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
        from lorasweep.runs.run_folder import RECORD

        _choose(config, "hydra.run.dir", RECORD, run_digest)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Choose the folder of a multirun."""
        from lorasweep.config.settings_digest import sweep_digest
        from lorasweep.runs.run_folder import SWEEP_RECORD

        _choose(config, "hydra.sweep.dir", SWEEP_RECORD, sweep_digest)


def _choose(config: DictConfig, key: str, record: str, digest: Callable[[DictConfig], str]) -> None:
    """Put the folder in which the command was broken off at `key`, unless it names one itself."""
    from lorasweep.config.compose import quoted
    from lorasweep.runs.resume import find_broken_off

    given = [str(one).lstrip("+") for one in config.hydra.overrides.hydra]
    if any(one.startswith(f"{key}=") for one in given):
        return
    try:
        parent = Path(str(OmegaConf.select(config, key))).parent
    except OmegaConfBaseException:  # no good name: Hydra meets it too, when it makes the folder
        return
    folder = find_broken_off(parent, record, digest(config))
    if folder is None and not OmegaConf.select(config, "study.name"):
        folder = _new(Path(str(OmegaConf.select(config, key))))
    if folder is not None:
        with open_dict(config):
            OmegaConf.update(config, key, str(folder))
            config.hydra.overrides.hydra.append(f"{key}={quoted(str(folder))}")  # for the jobs


def _new(folder: Path) -> Path | None:
    """Make the folder, which is named by the second; another command may have made one in it."""
    path = folder
    for number in count(2):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            path = folder.with_name(f"{folder.name}-{number}")
        except OSError:  # Hydra meets it too
            return None
        else:
            return path
    return None
