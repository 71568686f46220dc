"""The command line in a process of its own."""

import os
import subprocess
import sys


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
