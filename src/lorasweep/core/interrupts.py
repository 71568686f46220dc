"""Ctrl-C and SIGTERM: the first lets the step end and its state be written, the second doesn't."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any


class Interrupts:
    """Within, the first of these signals raises KeyboardInterrupt, or does what `softly` says.

    A second one ends the process at once, as kill -9 would, which loses nothing either.
    """

    def __init__(self, *signals: signal.Signals, second_ends: bool = True) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        self._signals = signals if in_main else ()  # no other thread may set handlers
        self._second_ends = second_ends
        self._before: dict[signal.Signals, Any] = {}
        self._softly: Callable[[], None] | None = None
        self.asked = False

    def __enter__(self) -> Interrupts:
        self._before = {one: signal.signal(one, self._handle) for one in self._signals}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    @contextmanager
    def softly(self, stop: Callable[[], None]) -> Iterator[None]:
        """Within, the signal calls `stop`, which asks for an end and returns."""
        self._softly = stop
        try:
            yield
        finally:
            self._softly = None

    def _handle(self, number: int, _frame: object) -> None:
        if self.asked:
            if self._second_ends:
                os._exit(128 + number)
            return
        self.asked = True
        if self._softly is None:
            raise KeyboardInterrupt
        if self._second_ends:
            # not by print or logging: the signal may have come in the midst of one
            os.write(2, b"\nstopping at the end of this step; once more stops at once\n")
        self._softly()
