"""What a trainer is told of its settings, a run and the data, and what it says of an epoch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from lorasweep.adapters.adapter import Adapter
from lorasweep.core.settings import Count, Settings, SettingsError, Texts
from lorasweep.data.dataset import Dataset
from lorasweep.data.latents import Item
from lorasweep.lora_files.checkpoint import Checkpoint
from lorasweep.models.base_model import Precision
from lorasweep.models.model_settings import check_weights_file
from lorasweep.training.lr_schedulers import LRScheduler
from lorasweep.training.optimizers import Optimizer
from lorasweep.training.training_loss import TrainingLoss
from lorasweep.training.training_noise import TrainingNoise


class TrainerError(RuntimeError):
    """Training can't go on; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class TrainerSettings(Settings):
    """Settings of every trainer that the runs of a pack share.

    Those under `trainer` that are a run's own are `RunTraining`.
    """

    batch_size: Count
    gradient_accumulation_steps: Count
    precision: Precision
    save_dtype: Precision
    gradient_checkpointing: bool
    device: str
    keep_states: NonNegativeInt

    max_runs: ClassVar[int | None] = None
    """Runs that it trains at once at most; None: as many as memory allows."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise SettingsError(f"trainer.device={self.device}: give auto, cpu, cuda or cuda:1")


@dataclass(frozen=True, kw_only=True)
class NativeTrainer(TrainerSettings):
    """lorasweep's own trainer; conf/trainer/native.yaml says what each setting does."""

    save_every_n_steps: PositiveInt | None
    deterministic: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_every_n_steps is not None and self.keep_states == 0:
            raise SettingsError(
                "trainer.save_every_n_steps has no effect with trainer.keep_states=0"
            )


@dataclass(frozen=True, kw_only=True)
class SdScriptsTrainer(TrainerSettings):
    """kohya's sd-scripts as trainer; conf/trainer/sd_scripts.yaml says what each setting does."""

    path: Path
    python: Path | None
    attention: Literal["plain", "sdpa", "xformers", "mem_eff_attn"]
    sample_every_n_epochs: NonNegativeInt
    sample_prompts: Texts

    max_runs: ClassVar[int | None] = 1


@dataclass(frozen=True, kw_only=True)
class RunTraining(TrainingNoise, TrainingLoss):
    """Settings under `trainer` that are a run's own: runs that differ in them can share a pack."""

    max_train_epochs: Count
    max_train_steps: PositiveInt | None = None  # runs of older versions have none
    network_weights: str | None = None  # nor these
    dim_from_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network_weights is not None:
            check_weights_file("trainer.network_weights", self.network_weights)
        elif self.dim_from_weights:
            raise SettingsError(
                "trainer.dim_from_weights takes the ranks of trainer.network_weights, which names"
                " no file; give it too"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingRun(RunTraining):
    """What a trainer knows of one run: all that is the run's own."""

    name: str
    seed: int
    output_dir: Path
    adapter: Adapter
    optimizer: Optimizer
    lr_scheduler: LRScheduler

    def check_parts(self, *, is_sdxl: bool) -> None:
        """Raise SettingsError for settings of parts that the base model doesn't have."""
        rates = self.optimizer.text_encoder_lr
        if isinstance(rates, tuple) and not is_sdxl:
            raise SettingsError(
                f"optimizer.text_encoder_lr={list(rates)}: only SDXL has two text encoders; give"
                " one number"
            )
        ranks = getattr(self.adapter, "block_ranks", None)
        for by_block in (ranks, self.optimizer.block_lr_weights):
            if by_block is not None:
                by_block.check(is_sdxl=is_sdxl)

    def num_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps that it trains in all: as many as the first of the two limits allows."""
        by_epochs = self.max_train_epochs * steps_per_epoch
        return min(by_epochs, self.max_train_steps or by_epochs)

    def num_epochs(self, steps_per_epoch: int) -> int:
        """Epochs that it trains in all, the last of which may be cut short."""
        return -(-self.num_steps(steps_per_epoch) // steps_per_epoch)


@dataclass(frozen=True)
class TrainingData:
    """What the runs of a pack train on."""

    items: Sequence[Item]
    settings: Dataset


OnStep = Callable[[str, int, Mapping[str, float]], None]
"""Is told of each optimizer step of a run as it is done: run, step, train/loss, train/lr_unet, …"""


@dataclass(frozen=True, kw_only=True)
class TrainedEpoch:
    """What an epoch of a pack brought."""

    checkpoints: Sequence[Checkpoint]
    """The file of every run that finished the epoch, in the pack's order."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Run -> why it stopped in this epoch; its earlier checkpoints stand."""


class Stopped(KeyboardInterrupt):
    """The training was asked to stop, and has written its states."""
