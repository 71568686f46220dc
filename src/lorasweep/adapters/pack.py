"""K adapters attached to one frozen base model.

Rows of a batch are laid out (K, rows): each run's rows are consecutive, the base computes them all
at once, and every site adds each run's delta to that run's own rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from lorasweep import rng
from lorasweep.adapters import Adapter, Dropout, Site, Stack
from lorasweep.adapters.keys import by_site, every_site, sites
from lorasweep.adapters.lora import LoRAStack
from lorasweep.checkpoint import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Parts = Mapping[str, tuple[str, "torch.nn.Module"]]
"""text_encoder and unet: the prefix of their names in files, and the module."""


@dataclass(frozen=True)
class Group:
    """Consecutive runs `start` to `stop` that adapt the same sites in the same way."""

    start: int
    stop: int
    sites: Sequence[Site]
    stacks: Sequence[Stack]


class Pack:
    """The adapters of K runs on one base. `attached` makes the base compute with them."""

    def __init__(self, groups: Sequence[Group], seeds: Sequence[int]) -> None:
        self.groups = list(groups)
        self.seeds = list(seeds)

    @classmethod
    def new(cls, parts: Parts, runs: Sequence[tuple[Adapter, int, frozenset[str]]]) -> Pack:
        """Fresh adapters for runs given as (adapter, seed, parts to train).

        Runs of the same kind must be neighbours. Each site's tensors are drawn from the run's seed
        and the site's name, so they are the same whatever else is in the pack.
        """
        groups, start = [], 0
        for kind, members in groupby(runs, key=lambda run: (type(run[0]), run[0].targets, run[2])):
            group_sites = [site for site in sites(parts, kind[1]) if site.part in kind[2]]
            adapters = list(members)
            stacks = [
                adapters[0][0].stack(
                    site,
                    [
                        (adapter, adapter.initial(site, rng.generator(seed, "init", site.key)))
                        for adapter, seed, _ in adapters
                    ],
                )
                for site in group_sites
            ]
            groups.append(Group(start, start + len(adapters), group_sites, stacks))
            start += len(adapters)
        return cls(groups, [seed for _, seed, _ in runs])

    @classmethod
    def from_files(cls, parts: Parts, files: Sequence[Mapping[str, Tensor]]) -> Pack:
        """Adapters as files hold them, in the given order.

        Raises CheckpointError for tensors of another type than ours or names that match no module.
        """
        known = every_site(parts)
        loaded = [_checked(by_site(file), known) for file in files]
        groups, start = [], 0
        for keys, members in groupby(loaded, key=frozenset):
            group_files = list(members)
            group_sites = [site for key, site in known.items() if key in keys]
            stacks = [
                LoRAStack.of(site, [(None, file[site.key]) for file in group_files])
                for site in group_sites
            ]
            groups.append(Group(start, start + len(group_files), group_sites, stacks))
            start += len(group_files)
        return cls(groups, [0] * len(loaded))

    def __len__(self) -> int:
        return len(self.seeds)

    def leaves(self) -> list[Tensor]:
        """Every stacked tensor of the pack."""
        return [leaf for g in self.groups for stack in g.stacks for leaf in stack.leaves()]

    def prepare_gradients(self) -> None:
        """Let every stacked tensor collect a gradient, zero for now."""
        import torch

        for leaf in self.leaves():
            leaf.requires_grad_(True)
            leaf.grad = torch.zeros_like(leaf)

    def zero_gradients(self) -> None:
        """Start a new sum of gradients, in the same memory."""
        import torch

        torch._foreach_zero_([leaf.grad for leaf in self.leaves() if leaf.grad is not None])

    def adapts(self, part: str) -> bool:
        """Does any run adapt `part`?"""
        return any(site.part == part for group in self.groups for site in group.sites)

    def views(self, index: int) -> dict[str, list[Tensor]]:
        """Run `index`'s own tensors by part, sharing the stacks' memory."""
        group = self._group(index)
        views: dict[str, list[Tensor]] = {}
        for site, stack in zip(group.sites, group.stacks, strict=True):
            views.setdefault(site.part, []).extend(stack.views(index - group.start))
        return views

    def gradients(self, index: int) -> dict[str, list[Tensor]]:
        """The gradients of `views(index)`, likewise."""
        group = self._group(index)
        gradients: dict[str, list[Tensor]] = {}
        for site, stack in zip(group.sites, group.stacks, strict=True):
            gradients.setdefault(site.part, []).extend(stack.gradients(index - group.start))
        return gradients

    def file_tensors(self, index: int) -> dict[str, Tensor]:
        """Run `index`'s tensors under the names that files have."""
        group = self._group(index)
        return {
            f"{site.key}.{name}": tensor
            for site, stack in zip(group.sites, group.stacks, strict=True)
            for name, tensor in stack.file_tensors(index - group.start).items()
        }

    def delta_weights(self, index: int) -> Iterator[tuple[Site, Tensor]]:
        """Run `index`'s change of each site's weight, one at a time."""
        group = self._group(index)
        for site, stack in zip(group.sites, group.stacks, strict=True):
            yield site, stack.delta_weight(index - group.start)

    def limit_norm(self, index: int, maximum: float) -> None:
        """Keep the norm of each of run `index`'s deltas at most `maximum`."""
        group = self._group(index)
        for stack in group.stacks:
            stack.limit_norm(index - group.start, maximum)

    def select(self, indices: Sequence[int]) -> Pack:
        """A pack of these runs alone (ascending), with copies of their tensors."""
        groups: list[Group] = []
        start = 0
        for group in self.groups:
            kept = [index - group.start for index in indices if group.start <= index < group.stop]
            if kept:
                stacks = [stack.select(kept) for stack in group.stacks]
                groups.append(Group(start, start + len(kept), group.sites, stacks))
                start += len(kept)
        return Pack(groups, [self.seeds[index] for index in indices])

    @contextmanager
    def attached(self, dropout_steps: Sequence[int] | None = None) -> Iterator[None]:
        """Within, the base's modules compute with the adapters; rows must be (K, rows).

        `dropout_steps`, each run's micro step, key the dropouts; without them nothing is dropped.
        The backward pass belongs inside too, for gradient checkpointing computes forward again.
        """
        by_module: dict[torch.nn.Module, list[tuple[Group, Stack, Dropout | None]]] = {}
        for group in self.groups:
            for number, (site, stack) in enumerate(zip(group.sites, group.stacks, strict=True)):
                dropout = None
                if dropout_steps is not None and stack.drops:
                    rows = slice(group.start, group.stop)
                    dropout = Dropout(self.seeds[rows], dropout_steps[rows], number)
                by_module.setdefault(site.module, []).append((group, stack, dropout))
        with ExitStack() as hooks:
            for module, members in by_module.items():
                handle = module.register_forward_hook(partial(_add_deltas, members, len(self)))
                hooks.callback(handle.remove)
            yield

    def _group(self, index: int) -> Group:
        return next(group for group in self.groups if group.start <= index < group.stop)


def _add_deltas(
    members: Sequence[tuple[Group, Stack, Dropout | None]],
    num_runs: int,
    module: torch.nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    import torch

    x = args[0]
    rows = x.shape[0] // num_runs
    assert rows * num_runs == x.shape[0], "the batch must hold the same rows for every run"
    if len(members) == 1 and members[0][0].stop - members[0][0].start == num_runs:
        _, stack, dropout = members[0]
        return stack.forward(x, output, dropout)
    pieces, done = [], 0
    for group, stack, dropout in members:
        start, stop = group.start * rows, group.stop * rows
        pieces += [output[done:start], stack.forward(x[start:stop], output[start:stop], dropout)]
        done = stop
    return torch.cat([*pieces, output[done:]])


def _checked(
    file: dict[str, dict[str, Tensor]], known: Mapping[str, Site]
) -> dict[str, dict[str, Tensor]]:
    for key, tensors in file.items():
        if key not in known:
            raise CheckpointError(f"{key}: the base model has no such module")
        if set(tensors) != {"lora_down.weight", "lora_up.weight", "alpha"}:
            raise CheckpointError(f"{key}: {', '.join(sorted(tensors))} is not a standard LoRA's")
        _check_shapes(key, tensors, known[key].weight)
    return file


def _check_shapes(key: str, tensors: Mapping[str, Tensor], weight: Tensor) -> None:
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    fits = down[0].numel() == weight[0].numel() and up.shape[0] == weight.shape[0]
    if not fits or down.shape[0] != up[0].numel() or weight[0, 0].numel() > 1:
        raise CheckpointError(
            f"{key}: factors {tuple(up.shape)} x {tuple(down.shape)} don't fit the base model's"
            f" {tuple(weight.shape)}"
        )
