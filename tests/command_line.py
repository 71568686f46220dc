"""The command line, in a process of its own or in this one."""

import os
import subprocess
import sys

from lorasweep.cli import main


def lorasweep(*arguments, cwd, check=True):
    """Run `lorasweep ARGUMENTS`; the finished process. `check`: it must succeed."""
    result = subprocess.run(
        [sys.executable, "-m", "lorasweep", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "250"},
    )
    assert result.returncode == 0 or not check, result.stderr
    return result


def exit_code(*arguments):
    """Run `lorasweep ARGUMENTS` in this process, which has its libraries loaded."""
    try:
        main.main(list(arguments))
    except SystemExit as ended:
        return ended.code or 0
    return 0
