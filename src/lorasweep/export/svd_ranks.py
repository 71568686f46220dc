"""Which rank each module of a LoRA gets that is made by SVD, and how kohya's metadata says it."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lorasweep.adapters.unet_blocks import MAX_RANK
from lorasweep.export.exported import ExportError
from lorasweep.export.svd import Spectrum


@dataclass(frozen=True)
class SvdRanks:
    """One rank for all, or with `energy` each module's least that keeps this share, up to `rank`.

    Raises ExportError for what no LoRA can have.
    """

    rank: int | None = None
    conv_rank: int | None = None
    """Of convolutions larger than 1x1; None: as `rank`."""
    energy: float | None = None
    """Of a change's squared norm."""

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise ExportError("say to what: --rank N or --energy 0.95")
        for name, value in (("--rank", self.rank), ("--conv-rank", self.conv_rank)):
            if value is not None and not 1 <= value <= MAX_RANK:
                raise ExportError(f"{name} {value}: give 1 to {MAX_RANK}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ExportError(f"--energy {self.energy}: give a share above 0, at most 1")

    @property
    def is_fixed(self) -> bool:
        """Is the rank the same for every module, whatever its change?"""
        return self.energy is None

    def of(self, found: Spectrum, shape: Sequence[int]) -> int:
        """The rank of a module whose weight has this shape."""
        limit = (self.conv_rank if has_kernel(shape) else None) or self.rank
        if self.energy is None:
            assert limit is not None, "checked when it was made"
            return limit
        own = found.rank_for(self.energy)
        return own if limit is None else min(own, limit)


def metadata(ranks: Collection[tuple[int, bool]], are_fixed: bool) -> dict[str, str]:
    """kohya's keys for modules of these ranks, each with whether it `has_kernel`.

    sd-scripts writes Dynamic where each module has its own, and else convolutions' rank in the
    arguments of the network.
    """
    plain, kernels = ({rank for rank, kernel in ranks if kernel == it} for it in (False, True))
    found = {"ss_network_module": "networks.lora"}
    if len(plain) > 1 or len(kernels) > 1 or (not are_fixed and len(plain | kernels) > 1):
        return {**found, "ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
    (rank,) = plain or kernels
    found |= {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    if kernels:
        (conv_rank,) = kernels
        arguments = {"conv_dim": str(conv_rank), "conv_alpha": str(float(conv_rank))}
        found["ss_network_args"] = json.dumps(arguments)
    return found


def has_kernel(shape: Sequence[int]) -> bool:
    """Is it the weight of a convolution larger than 1x1?"""
    return len(shape) == 4 and tuple(shape[2:]) != (1, 1)
