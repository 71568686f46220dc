"""Which images a run sees at each step, counted and mixed as kohya does.

An epoch holds every image `repeats` times, sorted into buckets and cut into batches; the last batch
of a bucket may be short. The order of the buckets follows the data set's seed alone, in every epoch
the same, and the order within one the run's: so all runs of a pack meet batches of one shape at
each step, those too that joined it later and are in another epoch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from random import Random

from lorasweep.core import rng
from lorasweep.data.buckets import Size
from lorasweep.data.latents import Item

Batch = list[int]
"""Indices of items."""


def epoch_batches(
    items: Sequence[Item], batch_size: int, *, run_seed: int, data_seed: int, epoch: int
) -> list[Batch]:
    """The batches of one epoch of one run."""
    batches = {
        bucket: _cut(indices, batch_size, rng.python_random(run_seed, "order", epoch, str(bucket)))
        for bucket, indices in _by_bucket(items).items()
    }
    sequence = [bucket for bucket, cut in batches.items() for _ in cut]
    rng.python_random(data_seed, "buckets").shuffle(sequence)
    return [batches[bucket].pop() for bucket in sequence]


def steps_per_epoch(items: Sequence[Item], batch_size: int, accumulation: int = 1) -> int:
    """Optimizer steps of an epoch: batches of every bucket, rounded up, over the accumulation."""
    batches = sum(-(-len(indices) // batch_size) for indices in _by_bucket(items).values())
    return -(-batches // accumulation)


def _by_bucket(items: Sequence[Item]) -> dict[Size, list[int]]:
    by_bucket: dict[Size, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        by_bucket[item.bucket] += [index] * item.repeats
    return dict(sorted(by_bucket.items()))


def _cut(indices: list[int], batch_size: int, draw: Random) -> list[Batch]:
    shuffled = list(indices)
    draw.shuffle(shuffled)
    cut = [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
    return cut[::-1]  # taken from the end: the short batch comes last
