"""The command line, in a process of its own or in this one."""

import os
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO

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


def done_here(*arguments, cwd):
    """The same in a folder; as a finished process, with what it has said."""
    with chdir(cwd), redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = exit_code(*arguments)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
