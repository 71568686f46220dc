"""A configured run: every component, typed and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.training.training_run import NativeTrainer, SdScriptsTrainer, TrainingRun

if TYPE_CHECKING:
    from lorasweep.data.captions.caption_images import Captioner
    from lorasweep.data.dataset import Dataset
    from lorasweep.judging.metrics.metric import Metric
    from lorasweep.judging.sampling import Sampling
    from lorasweep.models.load_model import Model
    from lorasweep.tracking import Tracking


COMPONENTS = (
    "model",
    "dataset",
    "adapter",
    "optimizer",
    "lr_scheduler",
    "trainer",
    "sampling",
    "tracking",
)
"""Keys of which one component each is built; captions and metrics have several by name."""
NEEDED = {*COMPONENTS, "name", "seed", "output_root", "cache_dir"}
KEYS = {*NEEDED, "captions", "metrics", "pick", "launcher"}
"""The keys of a config."""


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """What all runs of a pack share: base, data, batches and what is scored."""

    output_root: Path
    model: Model
    dataset: Dataset
    captions: Mapping[str, Captioner]
    trainer: NativeTrainer | SdScriptsTrainer
    sampling: Sampling
    metrics: Mapping[str, Metric]
    tracking: Tracking


@dataclass(frozen=True, kw_only=True)
class Run(PackSettings, TrainingRun):
    """One configured run, typed and checked: a pack's settings and the run's own."""

    sweep: str | None
    cache_dir: Path
    config_yaml: str
    params: Mapping[str, Any]
    """The settings by their dotted keys, as they were given."""
    overrides: Sequence[str]
    number: int | None = None
    """In its sweep: of its job, and of its trial if there is a study."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Further tags in MLflow."""

    def check(self) -> None:
        """Raise SettingsError or ModelError for what the libraries refuse, before any work."""
        self.model.check()
        self.check_optimizer()
        self.sampling.check()

    def check_optimizer(self) -> None:
        """Raise SettingsError for an optimiser, or a schedule of it, that can't be made."""
        self.lr_scheduler.create(self.optimizer.check(), num_steps=10**9)  # more than any has

    def can_share_pack(self, other: Run) -> bool:
        """Can both train together?"""
        shared = [one.name for one in fields(PackSettings)]
        return all(getattr(self, name) == getattr(other, name) for name in shared)
