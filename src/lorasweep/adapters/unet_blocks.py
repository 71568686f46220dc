"""Ranks and learning rates by block of the UNet, numbered as kohya's networks/lora.py does.

Stable Diffusion 1.x has 12 blocks down, conv_in's among them, one in the middle, and 12 up; SDXL 9,
3 and 9. A resnet or attention number j of diffusers' block i is 3 * i + j of its way, a down- or
upsampler 3 * i + 2; on the way down conv_in comes before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
)

from lorasweep.adapters.adapter import Site
from lorasweep.adapters.kohya_names import WITH_KERNELS
from lorasweep.core.settings import Settings, SettingsError

MAX_RANK = 4096  # as of the files that are read; the widest layer of SDXL has 10,240 channels
Rank = Annotated[int, Field(gt=0, le=MAX_RANK)]
WAY = 12
"""Blocks of Stable Diffusion 1.x's way down, conv_in among them, and of the way up."""
Way = Literal["down", "mid", "up"]
WAYS: tuple[Way, ...] = get_args(Way)
_SIZES: dict[Way, dict[bool, int]] = {
    "down": {False: WAY, True: 9},
    "mid": {False: 1, True: 3},
    "up": {False: WAY, True: 9},
}
"""Blocks by way: of Stable Diffusion 1.x, and of SDXL."""

Block = tuple[Way, int]
"""A way and a number on it."""
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)")


def block_of(site: Site) -> Block | None:
    """The block that holds a site; None outside of the blocks."""
    if site.part != "unet":
        return None
    if found := _MIDDLE.match(site.path):  # a residual block, attention, a residual block
        return "mid", 2 * int(found[2]) if found[1] == "resnets" else 1
    found = _BLOCK.match(site.path)
    if found is None:
        return None
    way, level, kind, number = found.groups()
    within = 3 * int(level) + (2 if kind.endswith("samplers") else int(number))
    return ("down", within + 1) if way == "down" else ("up", within)


def block_index(site: Site) -> int | None:
    """kohya's number of a block of Stable Diffusion 1.x, of 25; None outside of the blocks."""
    block = block_of(site)
    if block is None:
        return None
    way, number = block
    return {"down": number, "mid": WAY, "up": WAY + 1 + number}[way]


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) else value


RankOrNone = Annotated[int, Field(ge=0, le=MAX_RANK)]
Ranks = Annotated[tuple[RankOrNone, ...], BeforeValidator(_one_or_more)]
"""A rank for each block of a way, or one for all."""
Weights = Annotated[tuple[NonNegativeFloat, ...], BeforeValidator(_one_or_more)]
"""Factors, likewise."""


class ByBlock(Settings):
    """A number for each block, or for all of a way; to be inherited from."""

    down: tuple[Any, ...]
    mid: tuple[Any, ...]
    up: tuple[Any, ...]

    key: ClassVar[str]
    """The setting."""

    def __post_init__(self) -> None:
        for way, sizes in _SIZES.items():
            given = getattr(self, way)
            if len(given) not in (1, *sizes.values()):
                raise SettingsError(
                    f"{self.key}.{way}={list(given)}: give one number or {sizes[False]}; with SDXL"
                    f" {sizes[True]}"
                )

    def check(self, *, is_sdxl: bool) -> None:
        """Raise SettingsError where a base model has not as many blocks as are given."""
        for way, sizes in _SIZES.items():
            if len(getattr(self, way)) not in (1, sizes[is_sdxl]):
                raise SettingsError(
                    f"{self.key}.{way}: give one number or {sizes[is_sdxl]}, as many blocks as"
                    f" {'SDXL' if is_sdxl else 'Stable Diffusion 1.x'} has there"
                )

    def at(self, block: Block) -> Any:
        """The number of a block."""
        way, number = block
        given = getattr(self, way)
        return given[number] if len(given) > 1 else given[0]

    def of_way(self, way: Way, *, is_sdxl: bool = False) -> list[Any]:
        """The numbers of all blocks of a way; of SDXL's, too, where another way has as many."""
        given = getattr(self, way)
        is_sdxl = is_sdxl or any(
            len(getattr(self, one)) == sizes[True] for one, sizes in _SIZES.items()
        )
        return list(given) if len(given) > 1 else list(given) * _SIZES[way][is_sdxl]

    @property
    def given(self) -> set[Any]:
        """Every number that a block may have."""
        return {*self.down, *self.mid, *self.up}


@dataclass(frozen=True, kw_only=True)
class BlockRanks(ByBlock):
    """A rank for each block; 0 leaves the block without adapters."""

    down: Ranks
    mid: Ranks
    up: Ranks

    key: ClassVar[str] = "adapter.block_ranks"


@dataclass(frozen=True, kw_only=True)
class BlockWeights(ByBlock):
    """What each block's learning rate is multiplied by; 0 leaves the block without adapters."""

    down: Weights
    mid: Weights
    up: Weights

    key: ClassVar[str] = "optimizer.block_lr_weights"


@dataclass(frozen=True, kw_only=True)
class Ranked(Settings):
    """What types with a rank have in common; to be inherited from beside Adapter."""

    rank: Rank
    alpha: PositiveFloat
    block_ranks: BlockRanks | None

    def wants(self, site: Site) -> bool:
        """Is the site's block to have adapters?"""
        return self.rank_at(site) > 0

    def rank_at(self, site: Site) -> int:
        """The rank on a site: its block's, or the common one where it is in no block."""
        block = block_of(site)
        if self.block_ranks is None or block is None:
            return self.rank
        rank: int = self.block_ranks.at(block)
        return rank

    def scale_at(self, site: Site) -> float:
        """What the product of the factors is multiplied by: the same in every block."""
        return self.alpha / self.rank

    def alpha_at(self, site: Site) -> float:
        """The alpha that a file holds for a site, where it is divided by the rank there."""
        return self.scale_at(site) * self.rank_at(site)

    @property
    def all_ranks(self) -> set[int]:
        """Every rank that a site may have, 0 left out."""
        blocks = self.block_ranks.given if self.block_ranks is not None else set()
        return {rank for rank in (self.rank, *blocks) if rank > 0}

    def block_args(self, times: int = 1, *, is_sdxl: bool = False) -> dict[str, str]:
        """kohya's network_args of the ranks by block, of files with `times` the rank."""
        if self.block_ranks is None:
            return {}
        ranks = [times * rank for rank in self._every_rank(is_sdxl)]
        alphas = [self.alpha * rank / self.rank for rank in ranks]
        return {"block_dims": joined(ranks), "block_alphas": joined(alphas)}

    def _every_rank(self, is_sdxl: bool) -> list[int]:
        """By kohya's number: 25, or SDXL's 23, the first and last of which are of no block."""
        assert self.block_ranks is not None
        ways = [self.block_ranks.of_way(way, is_sdxl=is_sdxl) for way in WAYS]
        ranks = [rank for way in ways for rank in way]
        return ranks if len(ranks) == 2 * WAY + 1 else [self.rank, *ranks, self.rank]


@dataclass(frozen=True, kw_only=True)
class ConvRanked(Ranked):
    """Ranked, with a rank of their own for kernels larger than 1x1, as kohya's conv_dim."""

    targets: str | tuple[str, ...]
    conv_rank: Rank | None
    conv_alpha: PositiveFloat | None

    def check_kernels(self) -> None:
        """Raise SettingsError for one of the pair alone, or for targets that need the pair."""
        if (self.conv_rank is None) != (self.conv_alpha is None):
            raise SettingsError(
                "adapter.conv_rank and adapter.conv_alpha belong together: give both, or null for"
                " both to leave larger kernels than 1x1 without adapters"
            )
        if self.targets in WITH_KERNELS and self.conv_rank is None:
            raise SettingsError(
                f"adapter.targets={self.targets} names convolutions larger than 1x1:"
                " adapter.conv_rank and adapter.conv_alpha must be given, or"
                " adapter.targets=attn-mlp"
            )

    def carries(self, site: Site) -> bool:
        """Larger kernels only with a rank for them."""
        return self.conv_rank is not None or not site.has_kernel

    def rank_at(self, site: Site) -> int:
        """As Ranked; larger kernels have conv_rank, but in a block without adapters none."""
        rank = super().rank_at(site)
        return self.conv_rank or 0 if site.has_kernel and rank > 0 else rank

    def scale_at(self, site: Site) -> float:
        """As Ranked, from conv_alpha and conv_rank for larger kernels."""
        if not site.has_kernel or self.conv_rank is None or self.conv_alpha is None:
            return super().scale_at(site)
        return self.conv_alpha / self.conv_rank

    @property
    def all_ranks(self) -> set[int]:
        """Every rank that a site may have, 0 left out."""
        return super().all_ranks | ({self.conv_rank} if self.conv_rank else set())

    def block_args(self, times: int = 1, *, is_sdxl: bool = False) -> dict[str, str]:
        """kohya's network_args of the ranks by block, of files with `times` the rank."""
        if self.block_ranks is None or not self.conv_rank:
            return super().block_args(times, is_sdxl=is_sdxl)
        ranks = [times * self.conv_rank if rank else 0 for rank in self._every_rank(is_sdxl)]
        return {
            **super().block_args(times, is_sdxl=is_sdxl),
            "conv_block_dims": joined(ranks),
            "conv_block_alphas": joined([times * (self.conv_alpha or 0.0)] * len(ranks)),
        }


def joined(values: Sequence[float]) -> str:
    """Numbers as network_args hold them: 0,4,4."""
    return ",".join(f"{value:g}" for value in values)
