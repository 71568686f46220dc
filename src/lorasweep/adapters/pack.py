"""K adapters attached to one frozen base model.

Rows of a batch are laid out (K, rows): each run's rows are consecutive, the base computes them all
at once, and every site adds each run's delta to that run's own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from lorasweep.adapters.adapter import Adapter, Site
from lorasweep.adapters.differences import BiasStack, NormStack, without_bias
from lorasweep.adapters.dora import DoRAStack, direction
from lorasweep.adapters.dropout import Dropout
from lorasweep.adapters.kohya_names import Parts, by_site, every_norm, every_site, sites
from lorasweep.adapters.locon import LoConStack, TuckerStack
from lorasweep.adapters.loha import LoHaStack
from lorasweep.adapters.lokr import LoKrStack
from lorasweep.adapters.lora import LoRAStack
from lorasweep.adapters.lycoris import LyCORIS, LycorisStack
from lorasweep.adapters.stack import FileStack, Members, Stack
from lorasweep.adapters.weight_deltas import Tensors, algorithm, has_magnitude, low_rank_delta
from lorasweep.core import rng
from lorasweep.core.safetensors_header import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BY_LYCORIS = ("full", "oft", "glora", "ia3", "tlora")
_FORM_BY_LYCORIS = "hada_t1"
"""LoHa in Tucker form, which other programs make."""


Grouping = Callable[[Site, bool], str]
"""The group of a site's tensor, which may be another for the second factor of a LoRA."""


def _part(site: Site, is_up: bool) -> str:
    return site.part


@dataclass(frozen=True)
class Member:
    """One run's adapter: what it is of, and its tensors by site key and name below it."""

    adapter: Adapter | None  # None: read from a file, not to be trained
    seed: int
    tensors: Mapping[str, Tensors]


@dataclass(frozen=True)
class Entry:
    """Neighbouring runs `start` to `stop` whose adapters on one site are computed together."""

    start: int
    stop: int
    site: Site
    stack: Stack


class Pack:
    """The adapters of K runs on one base. `attached` makes the base compute with them."""

    def __init__(self, known: Mapping[str, Site], members: Sequence[Member]) -> None:
        """Stack the members' tensors, copied; `known` are the base's sites by key.

        Raises CheckpointError for tensors of no known type.
        """
        self.known = known
        self.adapters = [member.adapter for member in members]
        self.seeds = [member.seed for member in members]
        self.entries = [entry for site in known.values() for entry in _stacked(site, members)]

    @classmethod
    def new(
        cls,
        parts: Parts,
        runs: Sequence[tuple[Adapter, int, frozenset[str]]],
        trains: Sequence[Callable[[Site], bool]] | None = None,
    ) -> Pack:
        """Fresh adapters for runs given as (adapter, seed, parts to train).

        `trains` says of a site of those parts whether a run trains it. Each site's tensors are
        drawn from the run's seed and the site's name, so they are the same whatever else is in the
        pack. Raises SettingsError for targets that match nothing.
        """
        members = [
            Member(
                adapter,
                seed,
                {
                    site.key: adapter.initial(site, rng.generator(seed, "init", site.key))
                    for site in sites(parts, adapter.targets, adapter.carries)
                    if site.part in trained and wanted(site) and adapter.wants(site)
                },
            )
            for (adapter, seed, trained), wanted in zip(
                runs, trains or [lambda site: True] * len(runs), strict=True
            )
        ]
        return cls(every_site(parts), members)

    @classmethod
    def from_files(cls, parts: Parts, files: Sequence[Mapping[str, Tensor]]) -> Pack:
        """Adapters as files hold them, in the given order, of whatever types.

        Raises CheckpointError for tensors of no known type, or that fit no module.
        """
        known = every_site(parts) | every_norm(parts)
        members = [Member(None, 0, by_site(file)) for file in files]
        for member in members:
            for key, tensors in member.tensors.items():
                if key not in known:
                    raise CheckpointError(f"{key}: the base model has no such module")
                check_fit(known[key], tensors)
        return cls(known, members)

    def __len__(self) -> int:
        return len(self.seeds)

    def leaves(self) -> list[Tensor]:
        """Every stacked tensor of the pack."""
        return [leaf for entry in self.entries for leaf in entry.stack.leaves()]

    def prepare_gradients(self) -> None:
        """Let every stacked tensor collect a gradient, zero for now."""
        import torch

        for leaf in self.leaves():
            leaf.requires_grad_(True)
            leaf.grad = torch.zeros_like(leaf)

    def zero_gradients(self) -> None:
        """Start a new sum of gradients, in the same memory."""
        for leaf in self.leaves():
            if leaf.grad is not None:
                leaf.grad.zero_()

    def adapts(self, part: str) -> bool:
        """Does any run adapt `part`?"""
        return any(entry.site.part == part for entry in self.entries)

    def views(self, index: int, group: Grouping = _part) -> dict[str, list[Tensor]]:
        """Run `index`'s own tensors by their group, sharing the stacks' memory."""
        return self._grouped(index, group, lambda stack, row: stack.views(row))

    def gradients(self, index: int, group: Grouping = _part) -> dict[str, list[Tensor]]:
        """The gradients of `views(index, group)`, likewise."""
        return self._grouped(index, group, lambda stack, row: stack.gradients(row))

    def _grouped(
        self, index: int, group: Grouping, tensors: Callable[[Stack, int], list[Tensor]]
    ) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        for site, stack, row in self._of(index):
            for tensor, is_up in zip(tensors(stack, row), stack.are_ups(), strict=True):
                found.setdefault(group(site, is_up), []).append(tensor)
        return found

    def file_tensors(self, index: int) -> dict[str, Tensor]:
        """Run `index`'s tensors under the names that files have."""
        return {
            f"{site.key}.{name}": tensor
            for site, stack, row in self._of(index)
            for name, tensor in stack.file_tensors(row).items()
        }

    def delta_weights(self, index: int) -> Iterator[tuple[Site, Tensor]]:
        """Run `index`'s change of each site's weight, one at a time."""
        for site, stack, row in self._of(index):
            yield site, stack.delta_weight(row)

    def limit_norm(self, index: int, maximum: float) -> None:
        """Keep the norm of each of run `index`'s deltas at most `maximum`."""
        for _, stack, row in self._of(index):
            stack.limit_norm(row, maximum)

    def member(self, index: int) -> Member:
        """Run `index` as what a pack is made of; its tensors may share the stacks' memory."""
        tensors = {site.key: stack.file_tensors(row) for site, stack, row in self._of(index)}
        return Member(self.adapters[index], self.seeds[index], tensors)

    def select(self, indices: Sequence[int]) -> Pack:
        """A pack of these runs alone, with copies of their tensors."""
        return Pack(self.known, [self.member(index) for index in indices])

    @contextmanager
    def attached(self, dropout_steps: Sequence[int] | None = None) -> Iterator[None]:
        """Within, the base's modules compute with the adapters; rows must be (K, rows).

        `dropout_steps`, each run's micro step, key the dropouts; without them nothing is dropped.
        The backward pass belongs inside too, for gradient checkpointing computes forward again.
        """
        by_module: dict[torch.nn.Module, list[tuple[Entry, Dropout | None]]] = {}
        for entry in self.entries:
            dropout = None
            if dropout_steps is not None and entry.stack.drops:
                rows = slice(entry.start, entry.stop)
                dropout = Dropout(self.seeds[rows], dropout_steps[rows], entry.site.key)
            by_module.setdefault(entry.site.module, []).append((entry, dropout))
        with ExitStack() as hooks:
            for module, entries in by_module.items():
                handle = module.register_forward_hook(partial(_add_deltas, entries, len(self)))
                hooks.callback(handle.remove)
            yield

    def _of(self, index: int) -> Iterator[tuple[Site, Stack, int]]:
        """Run `index`'s sites, with the stack that holds it and its row there."""
        for entry in self.entries:
            if entry.start <= index < entry.stop:
                yield entry.site, entry.stack, index - entry.start


def make_stack(site: Site, members: Members) -> Stack:
    """The stack that computes the members' tensors on a site; they are of one type and layout."""
    if "diff_b" in members[0][1]:
        others = [(adapter, without_bias(tensors)) for adapter, tensors in members]
        inner = make_stack(site, others) if algorithm(others[0][1]) else None
        return BiasStack.around(inner, site, members)
    kind, is_dora = _stack_type(site, *members[0])
    if not is_dora:
        return kind.of(site, members)
    directions = [(adapter, direction(tensors)) for adapter, tensors in members]
    return DoRAStack.around(kind.of(site, directions), members)


def file_delta(site: Site, tensors: Tensors) -> Tensor:
    """What a file's tensors add to the site's weight, in fp32 and the weight's shape.

    What they add to its bias is `differences.bias_delta`.
    """
    tensors = without_bias(tensors)
    if not algorithm(tensors):
        import torch

        return torch.zeros_like(site.weight, dtype=torch.float32)
    kind, is_dora = _stack_type(site, None, tensors)
    if is_dora or kind in (LycorisStack, NormStack):  # only low-rank types have the formula
        return make_stack(site, [(None, tensors)]).delta_weight(0)
    return low_rank_delta(tensors, site.weight.shape)


def check_fit(site: Site, tensors: Tensors) -> None:
    """Raise CheckpointError unless a file's tensors are of a known type, whole, and fit a site."""
    if "diff_b" in tensors:
        BiasStack.check(site, tensors)
        tensors = without_bias(tensors)
        if not algorithm(tensors):
            return
    kind, is_dora = _stack_type(site, None, tensors)
    kind.check(site, direction(tensors) if is_dora else tensors)
    if is_dora:
        DoRAStack.check_magnitude(site, tensors)


def _stack_type(
    site: Site, adapter: Adapter | None, tensors: Tensors
) -> tuple[type[FileStack], bool]:
    """The type by the names of a site's tensors, and whether DoRA's is put around it."""
    name = algorithm(tensors)
    if isinstance(adapter, LyCORIS) or name in _BY_LYCORIS or _FORM_BY_LYCORIS in tensors:
        return LycorisStack, False  # it knows magnitudes itself
    plain = LoRAStack if site.is_pointwise else LoConStack
    kinds: dict[str, type[FileStack]] = {
        "lora": TuckerStack if "lora_mid.weight" in tensors else plain,
        "loha": LoHaStack,
        "lokr": LoKrStack,
        "norm": NormStack,
    }
    if name not in kinds:
        names = ", ".join(sorted(tensors))
        raise CheckpointError(f"{site.key}: {names} is of no type that can be computed here")
    return kinds[name], has_magnitude(tensors)


def _stacked(site: Site, members: Sequence[Member]) -> Iterator[Entry]:
    """Stack the neighbours that adapt a site with the same layout."""
    having = [
        (index, member.adapter, member.tensors[site.key])
        for index, member in enumerate(members)
        if site.key in member.tensors
    ]

    def layout(place: int) -> Hashable:
        index, adapter, tensors = having[place]
        has_bias, tensors = "diff_b" in tensors, without_bias(tensors)
        if has_bias and not algorithm(tensors):
            return index - place, BiasStack
        kind, is_dora = _stack_type(site, adapter, tensors)
        own = DoRAStack.layout(tensors) if is_dora else kind.layout(tensors)
        # neighbours have consecutive indices: their distance to the place is the same
        return index - place, kind, is_dora, own, has_bias

    for _, places in groupby(range(len(having)), layout):
        neighbours = [having[place] for place in places]
        start, stop = neighbours[0][0], neighbours[-1][0] + 1
        stack = make_stack(site, [(adapter, tensors) for _, adapter, tensors in neighbours])
        yield Entry(start, stop, site, stack)


def _add_deltas(
    entries: Sequence[tuple[Entry, Dropout | None]],
    num_runs: int,
    module: torch.nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    import torch

    x = args[0]
    rows = x.shape[0] // num_runs
    assert rows * num_runs == x.shape[0], "the batch must hold the same rows for every run"
    first, dropout = entries[0]
    if first.stop - first.start == num_runs:
        return first.stack.forward(x, output, dropout)
    pieces, done = [], 0
    for entry, dropout in entries:
        start, stop = entry.start * rows, entry.stop * rows
        delta = entry.stack.forward(x[start:stop], output[start:stop], dropout)
        pieces += [output[done:start], delta]
        done = stop
    return torch.cat([*pieces, output[done:]])


def computing_with(pack: Pack | None) -> AbstractContextManager[None]:
    """Within, the base model computes with the pack's adapters; bare without a pack."""
    return nullcontext() if pack is None else pack.attached()
