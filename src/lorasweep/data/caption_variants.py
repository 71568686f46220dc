"""What is read of a caption at a step: what is chosen, moved and dropped, in kohya's order.

That order is of sd-scripts' `BaseDataset.process_caption` (February 2026), but for the emptying of
whole captions, which comes before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from random import Random

from lorasweep.data.subset_settings import SubsetSettings

_Choose = Callable[[list[str]], str]


def varied_caption(
    text: str, settings: SubsetSettings, draw: Random, *, step: int, max_train_steps: int
) -> str:
    """The caption as it is read at a step, of so many in all."""
    caption = _chosen(text, settings, draw.choice)
    if settings.moves_tags:
        fixed, rest, end = _tags(caption, settings)
        rest = rest[: _warmed_up(len(rest), settings, step, max_train_steps)]
        if settings.shuffle_caption:
            draw.shuffle(rest)
        rest = [tag for tag in rest if draw.random() >= settings.caption_tag_dropout_rate]
        caption = ", ".join(fixed + rest + end)
    return _with_second_separator(caption, settings)


def settled_caption(text: str, settings: SubsetSettings) -> str:
    """The caption as it is scored: of what is chosen the first, and all tags in their own order."""
    caption = _chosen(text, settings, lambda options: options[0])
    separator = settings.keep_tokens_separator
    if settings.moves_tags and separator and separator in caption:
        caption = ", ".join(tag for tags in _tags(caption, settings) for tag in tags)
    return _with_second_separator(caption, settings)


def _chosen(text: str, settings: SubsetSettings, choose: _Choose) -> str:
    """One line and one of each `{a|b}`, between prefix and suffix."""
    prefix, suffix = settings.caption_prefix, settings.caption_suffix
    caption = (f"{prefix} " if prefix else "") + text + (f" {suffix}" if suffix else "")
    lines = caption.split("\n")
    if not settings.enable_wildcard:
        return lines[0]
    caption = choose(lines) if len(lines) > 1 else caption
    # {{ and }} stand for braces; what takes their places must not be in the caption
    left, right = "\ue000", "\ue001"
    while left in caption or right in caption:
        left, right = left + "\ue000", right + "\ue001"
    caption = caption.replace("{{", left).replace("}}", right)
    caption = re.sub(r"\{([^}]+)\}", lambda found: choose(found[1].split("|")), caption)
    return caption.replace(left, "{").replace(right, "}")


def _tags(caption: str, settings: SubsetSettings) -> tuple[list[str], list[str], list[str]]:
    """The parts that stay in front, those that may move or go, and those that stay at the end."""
    separator, keep = settings.caption_separator, settings.keep_tokens_separator
    if keep and keep in caption:
        front, _, rest = caption.partition(keep)
        rest, _, end = rest.partition(keep)
        parts = [
            [tag for one in part.split(separator) if (tag := one.strip())]
            for part in (front, rest, end)
        ]
        return parts[0], parts[1], parts[2]
    tags = [tag.strip() for tag in caption.strip().split(separator)]
    return tags[: settings.keep_tokens], tags[settings.keep_tokens :], []


def _warmed_up(number: int, settings: SubsetSettings, step: int, max_train_steps: int) -> int:
    """How many of the tags are read already: all from step `token_warmup_step` on."""
    end = settings.token_warmup_step
    steps = math.floor(end * max_train_steps) if end < 1 else end
    if step >= steps:
        return number
    least = settings.token_warmup_min
    return math.floor(step * ((number - least) / steps)) + least


def _with_second_separator(caption: str, settings: SubsetSettings) -> str:
    second = settings.secondary_separator
    return caption.replace(second, settings.caption_separator) if second else caption
