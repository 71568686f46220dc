"""Which stack computes which tensors: the one list of the types there are."""

from __future__ import annotations

from collections.abc import Mapping

from lorasweep.adapters import Adapter, Site, Stack, Tensors
from lorasweep.adapters.deltas import algorithm
from lorasweep.adapters.lora import LoRAStack
from lorasweep.checkpoint import CheckpointError

_STACKS: Mapping[str, type[Stack]] = {"lora": LoRAStack}


def stack_class(adapter: Adapter | None, site: Site, tensors: Tensors) -> type[Stack]:
    """The class that computes a site's tensors. Raises CheckpointError for those of no type."""
    found = _STACKS.get(algorithm(tensors) or "")
    if found is None:
        names = ", ".join(sorted(tensors))
        raise CheckpointError(f"{site.key}: {names} is of no type that can be computed here")
    return found
