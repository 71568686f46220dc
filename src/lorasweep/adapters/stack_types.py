"""Which stack computes which tensors: the one list of the types there are."""

from __future__ import annotations

from collections.abc import Mapping

from lorasweep.adapters.adapter import Adapter, Site, Stack, Tensors
from lorasweep.adapters.deltas import algorithm, has_magnitude
from lorasweep.adapters.dora import DoRAStack
from lorasweep.adapters.locon import lora_stack
from lorasweep.adapters.loha import LoHaStack
from lorasweep.adapters.lokr import LoKrStack
from lorasweep.adapters.lycoris import LyCORIS, LycorisStack
from lorasweep.core.safetensors_header import CheckpointError

_STACKS: Mapping[str, type[Stack]] = {"loha": LoHaStack, "lokr": LoKrStack}
_BY_LYCORIS = ("full", "oft", "glora", "ia3", "tlora")
_FORMS_BY_LYCORIS = {"hada_t1", "lokr_t2"}
"""LoHa and LoKr in Tucker form, which other programs make."""


def stack_class(adapter: Adapter | None, site: Site, tensors: Tensors) -> type[Stack]:
    """The class that computes a site's tensors. Raises CheckpointError for those of no type."""
    name = algorithm(tensors)
    has_form = name in ("loha", "lokr") and not _FORMS_BY_LYCORIS.isdisjoint(tensors)
    # LyCORIS first: its stacks are of one run, so that no other may be put around them
    if isinstance(adapter, LyCORIS) or name in _BY_LYCORIS or has_form:
        return LycorisStack
    if has_magnitude(tensors):
        return DoRAStack
    if name == "lora":
        return lora_stack(site, tensors)
    found = _STACKS.get(name or "")
    if found is None:
        names = ", ".join(sorted(tensors))
        raise CheckpointError(f"{site.key}: {names} is of no type that can be computed here")
    return found
