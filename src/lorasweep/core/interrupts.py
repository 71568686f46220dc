"""Ctrl-C and SIGTERM: the first lets the step end and its state be saved, a second ends at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any


class Interrupts:
    """In a `with` block, the first of these signals raises KeyboardInterrupt, or within
    `calling(stop)` calls `stop`. `asked` is true from then on.

    A second signal ends the process at once, as kill -9 would; no saved state is lost by that.
    With `second_ends=False` it does nothing.
    """

    def __init__(self, *signals: signal.Signals, second_ends: bool = True) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        self._signals = signals if in_main else ()  # other threads may not set handlers
        self._second_ends = second_ends
        self._before: dict[signal.Signals, Any] = {}
        self._stop: Callable[[], None] | None = None
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
    def calling(self, stop: Callable[[], None]) -> Iterator[None]:
        """In this block, the signal calls `stop`, which asks the work to end and returns."""
        self._stop = stop
        try:
            yield
        finally:
            self._stop = None

    def _handle(self, number: int, _frame: object) -> None:
        if self.asked:
            if self._second_ends:
                os._exit(128 + number)
            return
        self.asked = True
        if self._stop is None:
            raise KeyboardInterrupt
        if self._second_ends:
            # not by print or logging: the signal may have interrupted one of them
            os.write(2, b"\nstopping at the end of this step; once more stops at once\n")
        self._stop()
