"""`lorasweep sweep NAME …` is `lorasweep train -m +sweeps=NAME …`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorasweep.cli.command_line import Commands, add_command
from lorasweep.cli.train_command import train_by_hydra

_HELP = """\
usage: lorasweep sweep NAME [--cfg job] [--config-dir DIR] [GROUP=OPTION | KEY=VALUE ...]

Run the sweep of sweeps/NAME.yaml, or go on with it: the same command continues what was broken off.

  lorasweep sweep rank_lr dataset.image_dir=photos
  lorasweep sweep rank_lr experiment=demo study.n_trials=30 study.pruner=wilcoxon
  lorasweep sweep rank_lr experiment=demo 'adapter.rank=choice(4,8)' optimizer.text_encoder_lr=0

  A plain value on the command line is held fixed, a range is searched, whatever the file says.
  study.KEY=VALUE changes how it searches; docs/sweeps.md has every KEY.

Sweeps that ship: {sweeps}
"""


def add_parser(commands: Commands) -> None:
    """For the list of commands: the words after `sweep` are read by `sweep`."""
    text = "search with Optuna: run a sweep of sweeps/, or go on with it"
    add_command(commands, "sweep", None, text, "NAME")


def sweep(argv: Sequence[str]) -> None:
    """Run the sweep that the words after `lorasweep sweep` name, or print its help."""
    from lorasweep.config.conf_folder import groups
    from lorasweep.core.settings import SettingsError

    if {"-h", "--help"} & set(argv) or not argv:
        print(_HELP.format(sweeps=", ".join(groups()["sweeps"])))
        return
    name = argv[0]
    if not re.fullmatch(r"\w[\w-]*", name):
        raise SettingsError(
            f"{name}: a sweep's name comes first; there are {', '.join(groups()['sweeps'])}"
        )
    train_by_hydra(["-m", f"+sweeps={name}", *argv[1:]])
