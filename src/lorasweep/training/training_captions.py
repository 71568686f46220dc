"""Which caption a run sees of an image at each step: kohya's shuffle and dropouts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lorasweep.core import rng
from lorasweep.core.text import shown
from lorasweep.data.caption_variants import varied_caption
from lorasweep.data.latents import Item
from lorasweep.models.base_model import BaseModel

log = logging.getLogger(__name__)


def caption_of(
    item: Item,
    *,
    seed: int,
    epoch: int,
    place: tuple[int, int],
    step: int = 0,
    max_train_steps: int = 0,
) -> str:
    """The item's caption as seen at `place` (micro step, row), after kohya's shuffle and dropouts.

    `step` counts the optimizer's, of `max_train_steps` in all.
    """
    settings = item.settings
    every = settings.caption_dropout_every_n_epochs
    if every and epoch % every == 0:
        return ""
    draw = rng.python_random(seed, "caption", *place)
    if draw.random() < settings.caption_dropout_rate:
        return ""
    if not settings.captions_vary:
        return item.prompt
    return varied_caption(item.caption, settings, draw, step=step, max_train_steps=max_train_steps)


def warn_of_cut_captions(base: BaseModel, items: Sequence[Item]) -> None:
    """One warning for each arm with captions of which the text encoder doesn't read the end."""
    for arm in dict.fromkeys(item.arm for item in items):
        of_arm = [item for item in items if item.arm == arm]
        too_long = set(base.too_long([item.prompt for item in of_arm]))
        names = [item.path.name for item in of_arm if item.prompt in too_long]
        if names:
            log.warning(
                "captions.%s: %d of %d captions are longer than the %d tokens that the text encoder"
                " reads, such as that of %s; what comes after them has no effect",
                *(arm, len(names), len(of_arm), base.max_tokens, shown(names[0])),
            )
