"""What a person sees while it works: log lines, and above them the bar of a pack."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class PrintHandler(logging.Handler):
    """Prints log lines to the stdout of the moment, which a bar redirects to above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


class Bar:
    """The training of one pack: epoch, step, loss, speed, time left. Only on a terminal."""

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
        self._task = self._progress.add_task("", total=None, loss="", speed="")
        self._steps_per_epoch = 1

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def epoch(self, number: int, num_epochs: int, steps_per_epoch: int) -> None:
        """Begin an epoch; the bar spans all of them, so its time left is the pack's."""
        self._steps_per_epoch = steps_per_epoch
        self._progress.update(
            self._task,
            description=f"epoch {number}/{num_epochs}",
            completed=(number - 1) * steps_per_epoch,
            total=num_epochs * steps_per_epoch,
        )

    def step(self, losses: Sequence[float]) -> None:
        """One step of every run is done."""
        task = self._progress.tasks[0]
        speed = f"{task.speed:.1f} it/s x {len(losses)}" if task.speed else ""
        loss = f"loss {sum(losses) / len(losses):.4f}"
        self._progress.update(self._task, advance=1, loss=loss, speed=speed)
