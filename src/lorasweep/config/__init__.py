"""From the command line's overrides and conf/ to a Run whose every value has been checked.

In come `KEY=VALUE` words; `compose` makes a config of them, `build_run` a typed `Run`. Those of a
run that was begun before come from its folder (begun_command.py).
Checks of several components are listed in checks.py; error_messages.py says in one line what is
wrong. Open build_run.py first.
"""

from lorasweep.config.build_run import build_run
from lorasweep.config.compose import compose, compose_without_images
from lorasweep.config.error_messages import one_line
from lorasweep.config.run import PackSettings, Run

__all__ = [
    "PackSettings",
    "Run",
    "build_run",
    "compose",
    "compose_without_images",
    "one_line",
]
