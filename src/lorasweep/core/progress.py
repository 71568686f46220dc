"""The terminal while something trains: log lines, and below them a progress bar for each pack."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class PrintHandler(logging.Handler):
    """Prints log lines to the current stdout, which a progress bar redirects to above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(self.format(record))
        except Exception:  # as logging asks of a handler: a log line must not end a training
            self.handleError(record)


class SaidOnce(logging.Filter):
    """Lets a line of the loggers below `name` through once: each pack of a sweep says it anew."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not super().filter(record):
            return True
        is_new = record.getMessage() not in self._said
        self._said.add(record.getMessage())
        return is_new


def say(text: str) -> None:
    """Print a line. Once stdout is closed, as by `| head`, printing does nothing.

    The training goes on, and the log file has every line.
    """
    try:
        print(text, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@dataclass(frozen=True)
class Tick:
    """How far a pack has come; plain data, so that a worker process can send it."""

    description: str
    completed: int
    total: int
    loss: float
    num_runs: int


Show = Callable[[Tick], None]
"""Shows a tick to the user."""


class Screen:
    """A progress bar for each pack: epoch, step, loss, speed, time left. Only on a terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            disable=not Console().is_terminal,
            refresh_per_second=2,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, tick: Tick, label: str = "") -> None:
        """Update the bar of the pack that trains on the device `label`."""
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task("", total=None, loss="", speed="")
        task = self._tasks[label]
        speed = self._progress.tasks[self._progress.task_ids.index(task)].speed
        self._progress.update(
            task,
            description=f"{label} {tick.description}".strip(),
            completed=tick.completed,
            total=tick.total,
            loss=f"loss {tick.loss:.4f}",
            speed=f"{speed:.1f} it/s x {tick.num_runs}" if speed else "",
        )


class Bar:
    """Counts the steps of one pack and shows its tick, at most twice a second."""

    def __init__(self, show: Show | None) -> None:
        self._show = show
        self._tick = Tick("", 0, 0, 0.0, 0)
        self._shown = 0.0

    def epoch(self, number: int, num_epochs: int, steps_per_epoch: int, steps_done: int) -> None:
        """Begin or resume an epoch; the bar spans all, so its time left is the pack's."""
        completed = (number - 1) * steps_per_epoch + steps_done
        total = num_epochs * steps_per_epoch
        self._tick = Tick(f"epoch {number}/{num_epochs}", completed, total, 0.0, 0)

    def step(self, losses: Sequence[float]) -> None:
        """One step of every run is done."""
        loss, completed = sum(losses) / len(losses), self._tick.completed + 1
        self._tick = replace(self._tick, completed=completed, loss=loss, num_runs=len(losses))
        now = time.monotonic()
        if self._show is not None and (now - self._shown > 0.5 or completed == self._tick.total):
            self._show(self._tick)
            self._shown = now
