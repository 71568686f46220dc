"""Held-out loss beside the base model's own on the same noise.

The loss on fixed (image, timestep, noise) tuples shows convergence where the training loss doesn't
(DVAR, arXiv 2302.04841); timesteps are stratified, for a few hard-coded ones are not enough.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveInt

from lorasweep.adapters.pack import Pack, computing_with
from lorasweep.core import rng
from lorasweep.core.settings import Count, Settings
from lorasweep.data.latents import Item
from lorasweep.judging.metrics.metric import Images, Scored, Scorer, Scores
from lorasweep.judging.sampling import equal_batches
from lorasweep.models.base_model import BaseModel
from lorasweep.models.diffusion_loss import squared_errors

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Validation(Settings):
    """val/loss, val/loss_rel with its interval and by arm, and val/gap."""

    num_timesteps: Annotated[int, Field(gt=0, le=1000)]
    num_noises: Count
    max_tuples: PositiveInt | None
    num_probe_images: PositiveInt
    num_bootstrap: Count
    seed: int
    batch_size: PositiveInt

    def names(self, arms: Collection[str], num_holdout: int) -> Mapping[str, bool]:
        """Those of all held-out images, and of each arm."""
        if num_holdout == 0:
            return {}
        parts = ["loss", "loss_rel_lo", "loss_rel_hi", "gap", *(f"loss_rel_{arm}" for arm in arms)]
        return {"val/loss_rel": True, **{f"val/{part}": False for part in parts}}

    def prepare(self, base: BaseModel, images: Images) -> Scorer | None:
        """Choose the tuples and compute the base's loss on them."""
        if not images.holdout:
            log.warning("no held-out images: val/* is left out (dataset.num_holdout is 0)")
            return None
        return _Validator(self, base, images)


@dataclass(frozen=True)
class LossTuple:
    """One noised image whose noise is to be predicted."""

    item: Item
    image: int
    timestep: int
    noise: int


def tuples(
    settings: Validation, items: Sequence[Item], num_train_timesteps: int, split: str
) -> list[LossTuple]:
    """All (image, arm, timestep, noise) tuples, or an even choice of `max_tuples` of them.

    Every arm gets the same images, timesteps and noises, so that arms compare. Of the crossing, a
    choice takes each image, timestep and noise as evenly as it can.
    """
    arms = sorted({item.arm for item in items})
    by_arm = [[item for item in items if item.arm == arm] for arm in arms]
    num_images = min(len(of_arm) for of_arm in by_arm)
    width = num_train_timesteps / settings.num_timesteps
    timesteps = [int((part + 0.5) * width) for part in range(settings.num_timesteps)]
    cells = list(product(range(settings.num_noises), range(num_images), timesteps))
    if settings.max_tuples is not None and len(cells) * len(arms) > settings.max_tuples:
        keep = max(1, settings.max_tuples // len(arms))
        cells = _even_choice(settings, num_images, timesteps, keep, split)
    return [
        LossTuple(item=of_arm[image], image=image, timestep=timestep, noise=noise)
        for of_arm in by_arm
        for noise, image, timestep in cells
    ]


def _even_choice(
    settings: Validation, num_images: int, timesteps: list[int], count: int, split: str
) -> list[tuple[int, int, int]]:
    """`count` cells in which images, timesteps and noises each appear equally often (+-1)."""
    offset = rng.python_random(settings.seed, "tuples", split).randrange(len(timesteps))
    cells = []
    for number in range(count):
        turn, image = divmod(number, num_images)
        # each turn over the images moves every image on to another timestep
        timestep = timesteps[(image + turn + offset) % len(timesteps)]
        cells.append((turn // len(timesteps) % settings.num_noises, image, timestep))
    return cells


class _Validator:
    def __init__(self, settings: Validation, base: BaseModel, images: Images) -> None:
        self.settings, self.base = settings, base
        length = base.noise_schedule.num_train_timesteps
        self.holdout = tuples(settings, images.holdout, length, "holdout")
        self.probe = tuples(settings, _probe(settings, images.train), length, "train")
        self.base_holdout = self._losses(None, self.holdout)[0]
        self.base_probe = self._losses(None, self.probe)[0]

    def baseline(self) -> Scores:
        return self._scores(self.base_holdout, self.base_probe)

    def score(self, pack: Pack) -> list[Scored]:
        holdout = self._losses(pack, self.holdout)
        probe = self._losses(pack, self.probe)
        return [
            Scored(self._scores(h, p), {"val/loss_rel": self._terms(h)})
            for h, p in zip(holdout, probe, strict=True)
        ]

    def _scores(self, holdout: Tensor, probe: Tensor) -> Scores:
        relative = float(holdout.sum() / self.base_holdout.sum())
        low, high = self._interval(holdout)
        scores = {
            "val/loss": float(holdout.mean()),
            "val/loss_rel": relative,
            "val/loss_rel_lo": low,
            "val/loss_rel_hi": high,
            "val/gap": relative - float(probe.sum() / self.base_probe.sum()),
        }
        for arm in sorted({t.item.arm for t in self.holdout}):
            of_arm = [i for i, t in enumerate(self.holdout) if t.item.arm == arm]
            ratio = float(holdout[of_arm].sum() / self.base_holdout[of_arm].sum())
            scores[f"val/loss_rel_{arm}"] = ratio
        return scores

    def _interval(self, losses: Tensor) -> tuple[float, float]:
        """95 % bootstrap interval of the ratio; whole images are drawn, as their tuples depend
        on each other, and both models' losses on one draw are paired."""
        import torch

        ours, bases = self._by_image(losses), self._by_image(self.base_holdout)
        draw = rng.generator(self.settings.seed, "bootstrap")
        shape = (self.settings.num_bootstrap, len(ours))
        chosen = torch.randint(len(ours), shape, generator=draw)
        ratios = ours[chosen].sum(1) / bases[chosen].sum(1)
        if not bool(ratios.isfinite().all()):
            return float("nan"), float("nan")
        low, high = ratios.quantile(torch.tensor([0.025, 0.975])).tolist()
        return low, high

    def _terms(self, losses: Tensor) -> list[float]:
        """Each image's part in val/loss_rel, which is their mean."""
        ours, bases = self._by_image(losses), self._by_image(self.base_holdout)
        terms: list[float] = (ours * len(ours) / bases.sum()).tolist()
        return terms

    def _by_image(self, losses: Tensor) -> Tensor:
        """Losses summed over each image's tuples."""
        import torch

        image = torch.tensor([t.image for t in self.holdout])
        return torch.zeros(int(image.max()) + 1).index_add(0, image, losses)

    def _losses(self, pack: Pack | None, chosen: Sequence[LossTuple]) -> Tensor:
        """Losses (K, N) of each checkpoint, or of the bare base, on the tuples."""
        import torch

        num_runs = 1 if pack is None else len(pack)
        rows = max(1, self.settings.batch_size // num_runs)
        losses = torch.zeros(num_runs, len(chosen))
        with torch.no_grad(), computing_with(pack), self.base.autocast():
            embeds = self._embeds(num_runs, sorted({t.item.caption for t in chosen}))
            for numbers in equal_batches([t.item.bucket for t in chosen], rows):
                losses[:, numbers] = self._batch(num_runs, [chosen[i] for i in numbers], embeds)
        return losses

    def _embeds(self, num_runs: int, captions: Sequence[str]) -> dict[str, Tensor]:
        """Each caption's embeddings by all runs: (K, L, D)."""
        size, embeds = max(1, self.settings.batch_size // num_runs), {}
        for start in range(0, len(captions), size):
            part = captions[start : start + size]
            by_run = self.base.encode_prompt(list(part) * num_runs).unflatten(0, (num_runs, -1))
            embeds.update({caption: by_run[:, number] for number, caption in enumerate(part)})
        return embeds

    def _batch(
        self, num_runs: int, batch: Sequence[LossTuple], embeds: dict[str, Tensor]
    ) -> Tensor:
        import torch

        latents = torch.stack([t.item.latents for t in batch]).repeat(num_runs, 1, 1, 1)
        noise = torch.stack([self._noise(t) for t in batch]).to(latents.device)
        noise = noise.repeat(num_runs, 1, 1, 1)
        timesteps = torch.tensor([t.timestep for t in batch], device=latents.device)
        timesteps = timesteps.repeat(num_runs)
        context = torch.stack([embeds[t.item.caption] for t in batch], dim=1).flatten(0, 1)
        losses = squared_errors(self.base, latents, noise, timesteps, context)
        return losses.view(num_runs, -1).cpu()

    def _noise(self, t: LossTuple) -> Tensor:
        import torch

        draw = rng.generator(self.settings.seed, "validation", t.image, t.timestep, t.noise)
        return torch.randn(t.item.latents.shape, generator=draw)


def _probe(settings: Validation, items: Sequence[Item]) -> list[Item]:
    """Every arm's item of the first `num_probe_images` training images."""
    names = sorted({item.path.name for item in items})[: settings.num_probe_images]
    return [item for item in items if item.path.name in names]
