"""What the folders of a data set may each have of their own: kohya's settings of a subset."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from lorasweep.core.settings import Probability, Settings


@dataclass(frozen=True, kw_only=True)
class SubsetSettings(Settings):
    """How the images and captions of a folder are read; conf/dataset/folder.yaml says each."""

    flip_aug: bool
    shuffle_caption: bool
    keep_tokens: NonNegativeInt
    caption_dropout_rate: Probability
    caption_dropout_every_n_epochs: NonNegativeInt
    caption_tag_dropout_rate: Probability
    caption_prefix: str | None = None  # runs of older versions have none of these
    caption_suffix: str | None = None
    caption_separator: Annotated[str, Field(min_length=1)] = ","
    keep_tokens_separator: str | None = None
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    token_warmup_min: NonNegativeInt = 1
    token_warmup_step: NonNegativeFloat = 0
    alpha_mask: bool = False

    def own(self) -> dict[str, Any]:
        """These settings alone, also of a data set, which has more."""
        return {name: getattr(self, name) for name in SUBSET_KEYS}

    def of_sentences(self) -> SubsetSettings:
        """The same for captions whose parts between commas are neither shuffled nor dropped."""
        whole = {
            "shuffle_caption": False,
            "keep_tokens": 0,
            "caption_tag_dropout_rate": 0.0,
            "token_warmup_step": 0,
        }
        return SubsetSettings(**{**self.own(), **whole})

    @property
    def moves_tags(self) -> bool:
        """Is a caption taken apart?"""
        drops = self.caption_tag_dropout_rate > 0 or self.token_warmup_step > 0
        return self.shuffle_caption or drops

    @property
    def captions_vary(self) -> bool:
        """Does a caption change from step to step, so that its embedding can't be kept?"""
        return self.moves_tags or self.enable_wildcard


SUBSET_KEYS = tuple(field.name for field in fields(SubsetSettings))
