"""What kind of failure ended a run: one word for it from the trainer to a sweep's driver."""

from __future__ import annotations

from enum import Enum


class FailureKind(Enum):
    """Why a run failed, which decides what becomes of it in a sweep."""

    OWN = "own"
    """The run's own: its loss is NaN, it doesn't fit into memory alone, an error was raised."""
    RETRY = "retry"
    """Worth another try: its worker was killed, others took the memory, a folder is still in use
    by a process that is about to end."""
    ENVIRONMENT = "environment"
    """A full disk, or a tracking store that can't be written: the sweep pauses until somebody has
    mended it."""
    SETUP = "setup"
    """Images, captions or the base model, which its whole pack shares, could not be made ready."""


class RunError(RuntimeError):
    """A run failed; the message is its reason. Hydra's launchers return it of a job."""

    def __init__(self, reason: str, kind: FailureKind = FailureKind.OWN) -> None:
        super().__init__(reason)
        self.kind = kind
