"""What LyCORIS's types share: its metadata, and the dropouts of output channels of LoHa and LoKr.

LyCORIS (arXiv 2309.14859) drops rows of their deltas where LoRA drops channels of the rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import PositiveFloat

from lorasweep.adapters.adapter import Adapter
from lorasweep.adapters.dropout import Dropout, module_survives, survivors
from lorasweep.adapters.kohya_names import check_targets, lycoris_preset
from lorasweep.adapters.unet_blocks import ConvRanked
from lorasweep.core.settings import Probability

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LycorisNetwork(ConvRanked, Adapter):
    """Settings that all types have whose files say that LyCORIS made their network."""

    scale_weight_norms: PositiveFloat | None

    def __post_init__(self) -> None:
        check_targets(self.targets)
        self.check_kernels()

    def lycoris_metadata(self, algo: str, own: Mapping[str, object]) -> dict[str, str]:
        """kohya's ss_network_* entries; the arguments, `own` among them, are JSON of texts."""
        arguments = {
            "algo": algo,
            "preset": lycoris_preset(self.targets),
            "conv_dim": self.conv_rank or 0,
            "conv_alpha": self.conv_alpha or 0.0,
            **self.block_args(),
            **own,
        }
        return {
            "ss_network_module": "lycoris.kohya",
            "ss_network_dim": str(self.rank),
            "ss_network_alpha": str(float(self.alpha)),
            "ss_network_dropout": "None",
            "ss_network_args": json.dumps({name: str(value) for name, value in arguments.items()}),
            "ss_scale_weight_norms": str(self.scale_weight_norms),
        }


@dataclass(frozen=True, kw_only=True)
class ByWeight(LycorisNetwork):
    """Settings that LoHa and LoKr have in common; names and meanings are LyCORIS's."""

    rank_dropout: Probability
    module_dropout: Probability

    @property
    def drops(self) -> bool:
        """Is anything dropped in training?"""
        return self.rank_dropout > 0 or self.module_dropout > 0

    def kohya_metadata(self, algo: str, **own: object) -> dict[str, str]:
        """kohya's ss_network_* entries of a network of `algo`, whose own arguments are `own`."""
        dropouts = {"rank_dropout": self.rank_dropout, "module_dropout": self.module_dropout}
        return self.lycoris_metadata(algo, {**dropouts, **own})


def kept_channels(
    adapters: Sequence[Adapter | None], out_features: int, dropout: Dropout, device: torch.device
) -> Tensor:
    """What each run's output channels are multiplied by in a step, (K, out)."""
    import torch

    kept = torch.ones(len(adapters), out_features, device=device)
    for index, adapter in enumerate(adapters):
        assert isinstance(adapter, ByWeight)
        if not adapter.drops:
            continue
        draw = dropout.generator(index, device)
        if adapter.module_dropout > 0:
            kept[index] *= module_survives(adapter.module_dropout, draw)
        if adapter.rank_dropout > 0:
            kept[index] *= survivors((out_features,), adapter.rank_dropout, draw)
    return kept
