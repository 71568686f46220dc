"""A process of sd-scripts: started by `accelerate launch`, paused, watched and ended."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.text import harmless
from lorasweep.training import sd_scripts_guard
from lorasweep.training.sd_scripts_checkout import SCRIPT, interpreter
from lorasweep.training.training_run import SdScriptsTrainer

_TAIL_BYTES = 20_000
_LAST_LINES = 3
_END_SECONDS = 10.0
_PROGRESS = re.compile(r"(steps|validation steps|epoch validation steps)?:? *\d+%\|")
_NO_MEMORY = ("out of memory", "OutOfMemoryError", "can't allocate memory", "not enough memory")
_KILLED = re.compile(r"SIGKILL|exit status -9\b|exit status 137\b")


class SdScriptsProcess:
    """train_network.py at work on a TOML; in a `with` block, whose end ends it and its children.

    It writes what it prints to `log`. It also ends when this process is gone, whatever ended it.
    """

    def __init__(self, trainer: SdScriptsTrainer, device: str, toml: Path, log: Path) -> None:
        folder = toml.parent / toml.stem
        accelerate = folder / "accelerate.json"  # else a user's own default might say otherwise
        write_atomically(accelerate, json.dumps(_accelerate_config(device), indent=1).encode())
        command = [
            *(str(interpreter(trainer)), "-m", "accelerate.commands.launch"),
            *("--config_file", str(accelerate), str(trainer.path.expanduser().absolute() / SCRIPT)),
            *("--config_file", str(toml)),
        ]
        self.log = log
        with log.open("ab") as output:
            output.write(f"\n# {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
            output.flush()
            self._guard = subprocess.Popen(
                [sys.executable, "-I", sd_scripts_guard.__file__, *command],
                cwd=trainer.path.expanduser(),
                env=_environment(device),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone
            )

    def __enter__(self) -> SdScriptsProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    @property
    def exit_code(self) -> int | None:
        """None as long as it works."""
        return self._guard.poll()

    def pause(self) -> None:
        """Let it wait where it is, its memory held."""
        self._tell("pause")

    def go_on(self) -> None:
        """Let it work again."""
        self._tell("go")

    def end(self) -> None:
        """End it and its children at once; it writes nothing on its way out."""
        assert self._guard.stdin is not None
        with suppress(BrokenPipeError):
            self._guard.stdin.close()
        try:
            self._guard.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:  # a process in the kernel's hands, as on a hanging disk
            self._guard.kill()

    def _tell(self, word: str) -> None:
        assert self._guard.stdin is not None
        with suppress(BrokenPipeError):  # it has ended
            self._guard.stdin.write(f"{word}\n".encode())
            self._guard.stdin.flush()

    @property
    def ran_out_of_memory(self) -> bool:
        """Does the end of its log say so?"""
        return any(text in self._tail() for text in _NO_MEMORY)

    def last_words(self) -> str:
        """How it ended, by its log's last lines, on one line."""
        text = self._tail()
        killed = ", killed as by the system when memory is full" if _KILLED.search(text) else ""
        # accelerate adds a traceback of its own, which says that there was another
        if "CalledProcessError" in text.rpartition("Traceback (most recent call last)")[2]:
            text = text.rpartition("Traceback (most recent call last)")[0]
        # the line under a traceback's code only points at it
        lines = [line.strip(" \t^~") for line in re.split(r"[\r\n]+", text)]
        said = [line for line in lines if line and not _PROGRESS.match(line) and line[0] != "#"]
        return f"exit code {self.exit_code}{killed}: {harmless(' | '.join(said[-_LAST_LINES:]))}"

    def _tail(self) -> str:
        with self.log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
        return text.rpartition("\n# 20")[2]  # of this process alone


def _accelerate_config(device: str) -> dict[str, object]:
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO",
        "num_machines": 1,
        "num_processes": 1,
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "no",  # the TOML says which
        "use_cpu": device == "cpu",
        "debug": False,
        "same_network": True,
        "downcast_bf16": "no",
    }


def _environment(device: str) -> dict[str, str]:
    """Ours, with one device to be seen, and output that comes at once and can be of any script."""
    kind, _, index = device.partition(":")
    seen = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    if kind == "cpu":
        visible = {"CUDA_VISIBLE_DEVICES": ""}
    else:
        number = int(index or 0)
        visible = {"CUDA_VISIBLE_DEVICES": seen[number] if number < len(seen) else str(number)}
    return {**os.environ, **visible, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
