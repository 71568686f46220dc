"""Held-out loss beside the base model's own on the same noise, and what captions are worth in it.

The loss on fixed (image, timestep, noise) tuples shows convergence where the training loss doesn't
(DVAR, arXiv 2302.04841); timesteps are stratified, for a few hard-coded ones are not enough.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from lorasweep.adapters.pack import Pack
from lorasweep.core import rng
from lorasweep.core.settings import Count, Settings
from lorasweep.data.latents import Item
from lorasweep.judging.metrics.caption_gain import Swaps, swaps
from lorasweep.judging.metrics.metric import Images, Scored, Scorer, Scores, Terms
from lorasweep.judging.metrics.tuple_losses import LossTuple, tuple_losses
from lorasweep.judging.pick_rule import FEW_IMAGES, GAIN, LOSS, SCORE
from lorasweep.models.base_model import BaseModel

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Validation(Settings):
    """val/score, its parts val/loss_rel and val/caption_gain, also by arm, val/gap and val/loss.

    The score, val/loss_rel - val/caption_gain, is small where the images are learned and captions
    still matter; where there is no gain it is the loss alone. With half to four times the gain's
    weight it chooses nearly alike (benchmarks/README.md). All three have intervals.

    The gain is by how much other images' captions raise the loss, relative to it: 0 = the caption
    makes no difference. It is measured where there is more noise than in `swap_from` of the
    schedule, for there the caption decides what becomes of the image (Choi et al., arXiv
    2204.00227), and what a model knows by heart weighs less.
    """

    num_timesteps: Annotated[int, Field(gt=0, le=1000)]
    num_noises: Count
    max_tuples: PositiveInt | None
    num_probe_images: PositiveInt
    num_bootstrap: Count
    seed: int
    batch_size: PositiveInt
    num_swaps: NonNegativeInt = 0  # runs of older versions have none
    swap_from: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def names(self, arms: Collection[str], num_holdout: int) -> Mapping[str, bool]:
        """Those of all held-out images, and of each arm."""
        if num_holdout == 0:
            return {}
        parts = ["loss", "loss_rel_lo", "loss_rel_hi", "gap", *(f"loss_rel_{arm}" for arm in arms)]
        found = {
            SCORE: True,
            LOSS: True,
            **{f"val/{part}": False for part in ("score_lo", "score_hi", *parts)},
        }
        if self.num_swaps == 0 or num_holdout == 1:
            return found
        of_gain = ["_lo", "_hi", *(f"_{arm}" for arm in arms)]
        return {**found, GAIN: True, **{f"{GAIN}{part}": False for part in of_gain}}

    def prepare(self, base: BaseModel, images: Images) -> Scorer | None:
        """Choose the tuples and compute the base's loss on them."""
        if not images.holdout:
            log.warning("no held-out images: val/* is left out (dataset.num_holdout is 0)")
            return None
        number = len({item.path.name for item in images.holdout})
        if number < FEW_IMAGES:
            log.warning(
                "held-out images: only %d, so which checkpoint scores best is partly luck; give"
                " dataset.num_holdout=%d or more",
                number,
                FEW_IMAGES,
            )
        return _Validator(self, base, images)


def tuples(
    settings: Validation,
    items: Sequence[Item],
    num_train_timesteps: int,
    split: str,
    start: float = 0,
) -> list[LossTuple]:
    """All (image, arm, timestep, noise) tuples, or an even choice of `max_tuples` of them.

    Those of timesteps before `start`, a share of the schedule, are left out.

    Every arm gets the same images, timesteps and noises, so that arms compare. Of the crossing, a
    choice takes each image, timestep and noise as evenly as it can.
    """
    arms = sorted({item.arm for item in items})
    by_arm = [[item for item in items if item.arm == arm] for arm in arms]
    num_images = min(len(of_arm) for of_arm in by_arm)
    width = num_train_timesteps / settings.num_timesteps
    timesteps = [int((part + 0.5) * width) for part in range(settings.num_timesteps)]
    timesteps = [one for one in timesteps if one >= start * num_train_timesteps] or timesteps[-1:]
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


@dataclass(frozen=True)
class _Losses:
    """Of one checkpoint or the bare base."""

    holdout: Tensor
    probe: Tensor
    own: Tensor
    """Of the tuples whose captions are swapped."""
    excess: Tensor
    """By how much other images' captions raise them."""


class _Validator:
    def __init__(self, settings: Validation, base: BaseModel, images: Images) -> None:
        self.settings, self.base = settings, base
        length = base.noise_schedule.num_train_timesteps
        self.holdout = tuples(settings, images.holdout, length, "holdout")
        self.probe = tuples(settings, _probe(settings, images.train), length, "train")
        self.swaps = _swaps(settings, images.holdout, length)
        self.of_base = self._losses(None)[0]

    def baseline(self) -> Scores:
        return self._scored(self.of_base).scores

    def score(self, pack: Pack) -> list[Scored]:
        return [self._scored(losses) for losses in self._losses(pack)]

    def _scored(self, losses: _Losses) -> Scored:
        """The losses, the gain, and the score that both make."""
        scores, of_loss = self._scores(losses), self._terms(losses)
        gains, terms = self._gains(losses)
        both = [a - b for a, b in zip(of_loss, terms.get(GAIN, [0.0] * len(of_loss)), strict=True)]
        whole = scores[LOSS] - gains.get(GAIN, 0.0)
        low, high = scores[f"{LOSS}_lo"], scores[f"{LOSS}_hi"]
        if GAIN in terms:
            low, high = self._interval_of_score(losses, scores[LOSS], terms[GAIN])
        of_score = {SCORE: whole, f"{SCORE}_lo": low, f"{SCORE}_hi": high}
        return Scored({**of_score, **scores, **gains}, {SCORE: both, LOSS: of_loss, **terms})

    def _losses(self, pack: Pack | None) -> list[_Losses]:
        import torch

        settings = self.settings
        of = partial(tuple_losses, self.base, pack, batch_size=settings.batch_size)
        holdout, probe = (of(some, seed=settings.seed) for some in (self.holdout, self.probe))
        known = {t.cell: n for n, t in enumerate(self.holdout)}
        more = [t for t in self.swaps.own if t.cell not in known]
        known |= {t.cell: len(self.holdout) + n for n, t in enumerate(more)}
        every = torch.cat([holdout, of(more, seed=settings.seed)], dim=1)
        own = every[:, [known[t.cell] for t in self.swaps.own]]
        excess = of(self.swaps.swapped, seed=settings.seed)
        excess = self.swaps.mean(excess) - own
        return [_Losses(*each) for each in zip(holdout, probe, own, excess, strict=True)]

    def _scores(self, losses: _Losses) -> Scores:
        holdout, base_holdout = losses.holdout, self.of_base.holdout
        relative = float(holdout.sum() / base_holdout.sum())
        low, high = self._interval(
            _by_image(holdout, self.holdout), _by_image(base_holdout, self.holdout)
        )
        scores = {
            "val/loss": float(holdout.mean()),
            LOSS: relative,
            f"{LOSS}_lo": low,
            f"{LOSS}_hi": high,
            "val/gap": relative - float(losses.probe.sum() / self.of_base.probe.sum()),
        }
        for arm, of_arm in _by_arm(self.holdout).items():
            ratio = float(holdout[of_arm].sum() / base_holdout[of_arm].sum())
            scores[f"{LOSS}_{arm}"] = ratio
        return scores

    def _gains(self, losses: _Losses) -> tuple[Scores, Terms]:
        """The caption gain, by arm too, and its terms; none where captions tell nothing."""
        if not self.swaps.own:
            return {}, {}
        own, excess = losses.own, losses.excess
        gain = float(excess.sum() / own.sum())
        own_by_image, by_image = (_by_image(x, self.swaps.own) for x in (own, excess))
        low, high = self._interval(by_image, own_by_image)
        scores = {GAIN: gain, f"{GAIN}_lo": low, f"{GAIN}_hi": high}
        for arm, of_arm in _by_arm(self.swaps.own).items():
            scores[f"{GAIN}_{arm}"] = float(excess[of_arm].sum() / own[of_arm].sum())
        # linear in what varies, so that the mean of a draw is nearly the draw's own ratio
        terms = gain + (by_image - gain * own_by_image) / own_by_image.mean()
        return scores, {GAIN: terms.tolist()}

    def _interval(self, above: Tensor, below: Tensor) -> tuple[float, float]:
        """95 % bootstrap interval of the ratio of two sums over images.

        Whole images are drawn, as their tuples depend on each other, and both on one draw are
        paired.
        """
        import torch

        draw = rng.generator(self.settings.seed, "bootstrap")
        shape = (self.settings.num_bootstrap, len(above))
        chosen = torch.randint(len(above), shape, generator=draw)
        ratios = above[chosen].sum(1) / below[chosen].sum(1)
        if not bool(ratios.isfinite().all()):
            return float("nan"), float("nan")
        low, high = ratios.quantile(torch.tensor([0.025, 0.975])).tolist()
        return low, high

    def _interval_of_score(
        self, losses: _Losses, loss: float, gains: Sequence[float]
    ) -> tuple[float, float]:
        """Of the ratio `loss` less the mean of `gains`, with images drawn for both together."""
        import torch

        ours, bases = (_by_image(one.holdout, self.holdout) for one in (losses, self.of_base))
        # linear in what varies, as the gains are
        of_loss = loss + (ours - loss * bases) / bases.mean()
        return self._interval(of_loss - torch.tensor(gains), torch.ones(len(gains)))

    def _terms(self, losses: _Losses) -> list[float]:
        """Each image's part in val/loss_rel, which is their mean."""
        ours, bases = (_by_image(one.holdout, self.holdout) for one in (losses, self.of_base))
        terms: list[float] = (ours * len(ours) / bases.sum()).tolist()
        return terms


def _by_image(losses: Tensor, chosen: Sequence[LossTuple]) -> Tensor:
    """Losses summed over the tuples of each image that there is, in the images' order."""
    import torch

    numbers = {image: n for n, image in enumerate(sorted({t.image for t in chosen}))}
    of = torch.tensor([numbers[t.image] for t in chosen])
    return torch.zeros(len(numbers)).index_add(0, of, losses)


def _by_arm(chosen: Sequence[LossTuple]) -> dict[str, list[int]]:
    """Which of the tuples are of each arm."""
    found: dict[str, list[int]] = {arm: [] for arm in sorted({t.item.arm for t in chosen})}
    for number, t in enumerate(chosen):
        found[t.item.arm].append(number)
    return found


def _swaps(settings: Validation, holdout: Sequence[Item], length: int) -> Swaps:
    """The tuples of the caption gain; none, and a warning, where captions tell nothing."""
    if settings.num_swaps == 0:
        return Swaps([], [], [])
    noisy = tuples(settings, holdout, length, "holdout", settings.swap_from)
    found = swaps(noisy, settings.num_swaps, settings.seed)
    if not found.own:
        log.warning(
            "the captions of the held-out images don't tell them apart: %s, which says whether a"
            " checkpoint listens to its prompt, is left out",
            GAIN,
        )
    return found


def _probe(settings: Validation, items: Sequence[Item]) -> list[Item]:
    """Every arm's item of the first `num_probe_images` training images."""
    names = sorted({item.path.name for item in items})[: settings.num_probe_images]
    return [item for item in items if item.path.name in names]
