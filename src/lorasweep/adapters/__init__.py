"""Adapters: the trainable parts of K runs, computed at once over one frozen base model.

Settings of a type (`LoRA`, `DoRA`, …) and a base's modules come in; a `Pack` goes out, which
attaches K adapters to the base and gives their tensors as files hold them. Each type has a file:
its settings, its start, and the stack that computes it. Open pack.py first, then stack.py.
"""

from lorasweep.adapters.adapter import Adapter, Site
from lorasweep.adapters.pack import Pack, computing_with
from lorasweep.adapters.stack import Stack
from lorasweep.adapters.weight_deltas import low_rank_delta

__all__ = ["Adapter", "Pack", "Site", "Stack", "computing_with", "low_rank_delta"]
