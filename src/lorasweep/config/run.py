"""A configured run: every component, typed and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasweep.adapters.adapter import Adapter
    from lorasweep.data.captions.caption_images import Captioner
    from lorasweep.data.dataset import Dataset
    from lorasweep.judging.metrics.metric import Metric
    from lorasweep.judging.sampling import Sampling
    from lorasweep.models.base_model import Model
    from lorasweep.tracking import Tracking
    from lorasweep.training.native_trainer import NativeTrainer
    from lorasweep.training.optimizers import LRScheduler, Optimizer


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
class Run:
    """One configured training: every component, typed and checked."""

    name: str
    seed: int
    sweep: str | None
    output_root: Path
    output_dir: Path
    cache_dir: Path
    model: Model
    dataset: Dataset
    captions: Mapping[str, Captioner]
    adapter: Adapter
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    trainer: NativeTrainer
    sampling: Sampling
    metrics: Mapping[str, Metric]
    tracking: Tracking
    config_yaml: str
    params: Mapping[str, Any]
    overrides: Sequence[str]
    number: int | None = None
    """In its sweep: of its job, and of its trial if there is a study."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Further tags in MLflow."""

    def check(self) -> None:
        """Raise SettingsError for what can be known to be wrong before any work."""
        self.optimizer.check()
        self.sampling.check()

    def can_share_pack(self, other: Run) -> bool:
        """Can both train together? Base, data, batches and what is scored must be the same."""
        return self._shared() == other._shared()

    def _shared(self) -> tuple[object, ...]:
        own = {"max_train_epochs": 1, "noise_offset": 0.0, "min_snr_gamma": None}
        return (
            self.model,
            self.dataset,
            self.captions,
            replace(self.trainer, **own),  # type: ignore[arg-type]
            self.sampling,
            self.metrics,
            self.tracking,
            self.output_root,
        )
