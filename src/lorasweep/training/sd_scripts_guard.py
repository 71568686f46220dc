"""Runs a command in a group of processes of its own, and ends the group when its parent is gone.

    python sd_scripts_guard.py COMMAND…

The parent writes lines to stdin: pause, go. The end of stdin is the parent's end, however it came
about (kill -9 too), and ends the group at once. A file without lorasweep, for it must start fast.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    """Start the command and follow it to its end, whose exit status becomes ours."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: _send(child.pid, signal.SIGKILL))
    threading.Thread(target=_obey, args=(child.pid,), daemon=True).start()
    status = child.wait()
    _send(child.pid, signal.SIGKILL)  # what it has left behind
    os._exit(status if status >= 0 else 128 - status)


def _obey(group: int) -> None:
    for line in sys.stdin:
        _send(group, signal.SIGSTOP if line.strip() == "pause" else signal.SIGCONT)
    _send(group, signal.SIGKILL)


def _send(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    main()
