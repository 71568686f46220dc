"""Random streams by key: every draw can be made again from (seed, what it is for, when).

So training keeps no generator state: resuming, packing and sampling can't disturb each other.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def key_seed(seed: int, *key: str | int) -> int:
    """A 63-bit seed that depends on every part of the key and on their order."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *key: str | int, device: str = "cpu") -> torch.Generator:
    """torch's generator of the stream `key`, at its start."""
    import torch

    return torch.Generator(device).manual_seed(key_seed(seed, *key))


def python_random(seed: int, *key: str | int) -> random.Random:
    """Python's generator of the stream `key`, at its start."""
    return random.Random(key_seed(seed, *key))
