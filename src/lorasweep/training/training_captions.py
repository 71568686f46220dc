"""Which caption a run sees of an image at each step: kohya's shuffle and dropouts."""

from __future__ import annotations

from lorasweep.core import rng
from lorasweep.data.dataset import Dataset
from lorasweep.data.latents import Item


def caption_of(
    item: Item, settings: Dataset, *, seed: int, epoch: int, place: tuple[int, int]
) -> str:
    """The item's caption as seen at `place` (step, row), after kohya's shuffle and dropouts."""
    every = settings.caption_dropout_every_n_epochs
    if every and epoch % every == 0:
        return ""
    draw = rng.python_random(seed, "caption", *place)
    if draw.random() < settings.caption_dropout_rate:
        return ""
    if not item.tags or not captions_vary(settings):
        return item.caption
    tags = [tag.strip() for tag in item.caption.split(",")]
    fixed, rest = tags[: settings.keep_tokens], tags[settings.keep_tokens :]
    if settings.shuffle_caption:
        draw.shuffle(rest)
    rest = [tag for tag in rest if draw.random() >= settings.caption_tag_dropout_rate]
    return ", ".join(fixed + rest)


def captions_vary(settings: Dataset) -> bool:
    """Does a caption change from step to step, so that its embedding can't be kept?"""
    return settings.shuffle_caption or settings.caption_tag_dropout_rate > 0
