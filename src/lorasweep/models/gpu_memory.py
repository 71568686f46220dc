"""What fits into a device's memory, and what to do when it runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def memory_for(device: str, step: Callable[[], None]) -> int | None:
    """How many runs fit on a CUDA device, if `step` is what one takes; None: not known (CPU).

    A tenth of what is free is left to the optimisers and to fragments.
    """
    import torch

    if torch.device(device).type != "cuda":
        return None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    free, _ = torch.cuda.mem_get_info(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        step()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return 1
    needed = torch.cuda.max_memory_allocated(device) - before
    return max(1, int(free * 0.9 / max(needed, 1)))


def halved(items: Sequence[T], error: RuntimeError) -> tuple[Sequence[T], Sequence[T]]:
    """The halves to go on with, one after the other, after memory ran out for all `items`.

    Raises `error` again if it says something else, or if there is only one item.
    """
    if not is_out_of_memory(error) or len(items) < 2:
        raise error
    middle = len(items) // 2
    return items[:middle], items[middle:]


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch has a class for it; the CPU's allocator, cuBLAS and cuDNN only say so."""
    import torch

    texts = ("can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(t in str(error) for t in texts)
