"""How strongly a LoRA counts: one number, or numbers by part and by block of the UNet."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorasweep.adapters.unet_blocks import WAY, block_index
from lorasweep.export.exported import ExportError

if TYPE_CHECKING:
    from lorasweep.adapters.adapter import Site

_BLOCK = re.compile(r"(down|up)(\d+)")
_FORM = (
    "give a number, or numbers by part (unet, te), way (down, mid, up) or block (down0 to down11,"
    " up0 to up11): unet:0.8,te:0,down4:0.5"
)


@dataclass(frozen=True)
class PartWeights:
    """A weight for each part, and for blocks that differ from their part; 1 is as trained."""

    unet: float = 1.0
    te: float = 1.0
    blocks: dict[int, float] = field(default_factory=dict)
    """By kohya's number of 25 (`block_index`)."""

    def at(self, site: Site) -> float:
        """The weight of a site's change: of its block, or else of its part."""
        if site.part != "unet":
            return self.te
        index = block_index(site)
        return self.unet if index is None else self.blocks.get(index, self.unet)


Weight = float | PartWeights


def weight_at(weight: Weight, site: Site) -> float:
    """The weight of a site's change."""
    return weight.at(site) if isinstance(weight, PartWeights) else weight


def parsed(text: str, given: str) -> Weight:
    """`0.8` or `unet:0.8,te:0,down4:0.5`; messages say the words that were `given`.

    Raises ExportError.
    """
    if ":" not in text:
        return _number(text, given)
    weights = PartWeights()
    for entry in text.split(","):
        name, _, value = entry.strip().partition(":")
        number = _number(value, given)
        if name == "te":
            weights = replace(weights, te=number)
        elif name == "unet":
            weights = replace(weights, unet=number)
        else:
            new = dict.fromkeys(_blocks(name, given), number)
            weights = replace(weights, blocks={**weights.blocks, **new})
    return weights


def unet_alone(weight: Weight) -> PartWeights:
    """The same, with nothing of the text encoder."""
    own = weight if isinstance(weight, PartWeights) else PartWeights(unet=weight)
    return replace(own, te=0.0)


def _blocks(name: str, given: str) -> list[int]:
    ways = {
        "down": list(range(WAY)),
        "mid": [WAY],
        "up": list(range(WAY + 1, 2 * WAY + 1)),
    }
    if name in ways:
        return ways[name]
    found = _BLOCK.fullmatch(name)
    if found is None or int(found[2]) >= WAY:
        raise ExportError(f"{given}: {name!r} is no part or block; {_FORM}")
    return [ways[found[1]][int(found[2])]]


def _number(value: str, given: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ExportError(f"{given}: {_FORM}")
    return number
