"""Ranks and learning rates by block of the UNet, numbered as kohya's networks/lora.py does.

25 blocks: 0 is conv_in, 1 to 11 go down, 12 is the middle, 13 to 24 go up. A resnet or attention
number j of diffusers' block i is 3 * i + j of its way, a down- or upsampler 3 * i + 2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

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
"""Blocks of the way down, conv_in among them, and of the way up."""

_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)")


def block_index(site: Site) -> int | None:
    """kohya's number of the block that holds a site; None outside of the blocks."""
    if site.part != "unet":
        return None
    if site.path.startswith("mid_block."):
        return WAY
    found = _BLOCK.match(site.path)
    if found is None:
        return None
    way, level, kind, number = found.groups()
    within = 2 if kind.endswith("samplers") else int(number)
    return 3 * int(level) + within + (1 if way == "down" else WAY + 1)


def _twelve(value: Any) -> Any:
    return (value,) * WAY if isinstance(value, int | float) else value


RankOrNone = Annotated[int, Field(ge=0, le=MAX_RANK)]
_Way = Field(min_length=WAY, max_length=WAY)
Ranks = Annotated[tuple[RankOrNone, ...], BeforeValidator(_twelve), _Way]
"""12 ranks, or one for all 12."""
Weights = Annotated[tuple[NonNegativeFloat, ...], BeforeValidator(_twelve), _Way]
"""12 factors, or one for all 12."""


@dataclass(frozen=True, kw_only=True)
class BlockRanks(Settings):
    """A rank for each block; 0 leaves the block without adapters."""

    down: Ranks
    mid: RankOrNone
    up: Ranks

    @property
    def all(self) -> tuple[int, ...]:
        """The 25 ranks, by kohya's number."""
        return (*self.down, self.mid, *self.up)


@dataclass(frozen=True, kw_only=True)
class BlockWeights(Settings):
    """What each block's learning rate is multiplied by; 0 leaves the block without adapters."""

    down: Weights
    mid: NonNegativeFloat
    up: Weights

    @property
    def all(self) -> tuple[float, ...]:
        """The 25 factors, by kohya's number."""
        return (*self.down, self.mid, *self.up)


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
        index = block_index(site)
        if self.block_ranks is None or index is None:
            return self.rank
        return self.block_ranks.all[index]

    def scale_at(self, site: Site) -> float:
        """What the product of the factors is multiplied by: the same in every block."""
        return self.alpha / self.rank

    def alpha_at(self, site: Site) -> float:
        """The alpha that a file holds for a site, where it is divided by the rank there."""
        return self.scale_at(site) * self.rank_at(site)

    @property
    def all_ranks(self) -> set[int]:
        """Every rank that a site may have, 0 left out."""
        blocks = self.block_ranks.all if self.block_ranks is not None else ()
        return {rank for rank in (self.rank, *blocks) if rank > 0}

    def block_args(self, times: int = 1) -> dict[str, str]:
        """kohya's network_args of the ranks by block, of files with `times` the rank."""
        if self.block_ranks is None:
            return {}
        ranks = [times * rank for rank in self.block_ranks.all]
        alphas = [self.alpha * rank / self.rank for rank in ranks]
        return {"block_dims": joined(ranks), "block_alphas": joined(alphas)}


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

    def block_args(self, times: int = 1) -> dict[str, str]:
        """kohya's network_args of the ranks by block, of files with `times` the rank."""
        if self.block_ranks is None or not self.conv_rank:
            return super().block_args(times)
        ranks = [times * self.conv_rank if rank else 0 for rank in self.block_ranks.all]
        return {
            **super().block_args(times),
            "conv_block_dims": joined(ranks),
            "conv_block_alphas": joined([times * (self.conv_alpha or 0.0)] * len(ranks)),
        }


def joined(values: Sequence[float]) -> str:
    """Numbers as network_args hold them: 0,4,4."""
    return ",".join(f"{value:g}" for value in values)
