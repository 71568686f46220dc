"""Runs that train together: their adapters, stacked in one pack, and the state of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorasweep.adapters.pack import Pack
from lorasweep.training.training_run import TrainingRun
from lorasweep.training.training_state import TrainingState


@dataclass(frozen=True)
class TrainingPack:
    """A pack of adapters and its runs' states, in the same order: runs of one kind together."""

    adapters: Pack
    states: Sequence[TrainingState]

    def bind(self) -> None:
        """Point each run's parameters and gradients at its part of the stacks."""
        self.adapters.prepare_gradients()
        for index, state in enumerate(self.states):
            group = state.run.optimizer.group_of
            state.bind(self.adapters.views(index, group), self.adapters.gradients(index, group))

    @classmethod
    def joined(cls, packs: Sequence[TrainingPack]) -> TrainingPack:
        """All runs of some packs in one, with copies of their tensors; to be bound."""
        members = [
            (state, pack.adapters.member(index))
            for pack in packs
            for index, state in enumerate(pack.states)
        ]
        members.sort(key=lambda member: _kind(member[0].run))  # neighbours share a stack
        adapters = Pack(packs[0].adapters.known, [member for _, member in members])
        return cls(adapters, [state for state, _ in members])

    def select(self, indices: Sequence[int]) -> TrainingPack:
        """These runs alone, with copies of their tensors; to be bound."""
        return TrainingPack(self.adapters.select(indices), [self.states[i] for i in indices])

    def only(self, wanted: Callable[[TrainingState], bool]) -> TrainingPack:
        """The runs that are wanted; this very pack if that is all."""
        kept = [index for index, state in enumerate(self.states) if wanted(state)]
        return self if len(kept) == len(self.states) else self.select(kept)


def _kind(run: TrainingRun) -> tuple[str, ...]:
    """What runs must share to be stacked together."""
    parts = sorted(run.optimizer.trained_parts)
    return (type(run.adapter).__name__, str(run.adapter.targets), *parts)
