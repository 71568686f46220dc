"""Trainers: what turns folders of captioned images into checkpoints, an epoch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from lorasweep.adapters.adapter import Adapter
from lorasweep.core.progress import Show
from lorasweep.core.settings import Settings
from lorasweep.data.dataset import Dataset
from lorasweep.data.latents import Item
from lorasweep.lora_files.checkpoint import Checkpoint
from lorasweep.models.base_model import BaseModel
from lorasweep.training.optimizers import LRScheduler, Optimizer

if TYPE_CHECKING:
    from lorasweep.training.state_files import State


class TrainerError(RuntimeError):
    """Training can't go on; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class RunTraining(Settings):
    """Settings under `trainer` that are a run's own: runs that differ in them can share a pack."""

    max_train_epochs: PositiveInt
    noise_offset: NonNegativeFloat
    min_snr_gamma: PositiveFloat | None


@dataclass(frozen=True, kw_only=True)
class TrainingRun(RunTraining):
    """What a trainer knows of one run: all that is the run's own."""

    name: str
    seed: int
    output_dir: Path
    adapter: Adapter
    optimizer: Optimizer
    lr_scheduler: LRScheduler


@dataclass(frozen=True)
class TrainingData:
    """What the runs of a pack train on."""

    items: Sequence[Item]
    settings: Dataset


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What an epoch of a pack brought."""

    checkpoints: Sequence[Checkpoint]
    """The file of every run that finished the epoch, in the pack's order."""
    steps: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]]
    """Run -> (optimizer step, train/loss, train/lr_unet, …) of the epoch."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Run -> why it stopped in this epoch; its earlier checkpoints stand."""


class Stopped(KeyboardInterrupt):
    """The training was asked to stop, and has written its states."""


class Training(Protocol):
    """A training under way: iterate for its epochs; between two of them, join and drop runs."""

    max_runs: int | None
    """Runs that fitted into memory when more did not."""
    steps_per_epoch: int
    """Optimizer steps of an epoch."""

    def __iter__(self) -> Iterator[Epoch]:
        """Train, yielding each epoch once its checkpoints and states are written."""

    def join(self, run: TrainingRun, state: State | None = None) -> None:
        """Train `run` too, from the next epoch on; with a state, go on with it.

        Raises ValueError if it can't be trained.
        """

    def drop(self, run: str) -> None:
        """Stop training `run`; the others go on. Its checkpoints stand."""

    def disk_needs(self, run: str) -> int:
        """About the bytes that a run's checkpoints to come and its states will take."""

    def stop(self) -> None:
        """Let the epoch under way end after its present step: states are written, Stopped raised.

        May be called from a signal's handler.
        """


class Trainer(Protocol):
    """Settings of a trainer, and the way to start it."""

    def start(
        self,
        base: BaseModel,
        runs: Sequence[TrainingRun],
        data: TrainingData,
        show: Show | None = None,
    ) -> Training:
        """Prepare to train the runs as one pack; `show` takes what a progress bar is to say."""
