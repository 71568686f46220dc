"""Wall time by what it was spent on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds of wall time by what they were spent on."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - begun

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """Seconds since the clock showed `before`."""
        return {what: spent - before.get(what, 0.0) for what, spent in self.seconds.items()}
