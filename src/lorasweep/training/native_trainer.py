"""The native trainer: K runs in one process over one frozen base model.

Every loss, gradient norm, schedule, optimiser and random stream is a run's own, so a run gives the
same result in a pack as alone, to float rounding. Options with kohya's names mean what kohya means.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lorasweep.adapters.pack import Pack
from lorasweep.core.progress import Bar, Show
from lorasweep.core.settings import Settings, SettingsError
from lorasweep.lora_files import checkpoint
from lorasweep.lora_files.checkpoint import Checkpoint
from lorasweep.models.base_model import BaseModel, Precision, torch_dtype
from lorasweep.models.gpu_memory import is_out_of_memory
from lorasweep.training import state_files as state_files
from lorasweep.training.kohya_metadata import kohya_metadata
from lorasweep.training.loss import PackLoss
from lorasweep.training.run_state import RunState
from lorasweep.training.state_files import State
from lorasweep.training.trainer import Epoch, Stopped, TrainerError, TrainingData, TrainingRun
from lorasweep.training.training_batches import Batch, epoch_batches, steps_per_epoch

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_LEFT = (
    "the checkpoints of the epochs before it stand. Try a lower learning rate, or precision bf16"
    " or fp32"
)


@dataclass(frozen=True, kw_only=True)
class NativeTrainer(Settings):
    """Settings of the native trainer; conf/trainer/native.yaml says what each does."""

    max_train_epochs: PositiveInt
    batch_size: PositiveInt
    gradient_accumulation_steps: PositiveInt
    precision: Precision
    save_dtype: Precision
    gradient_checkpointing: bool
    noise_offset: NonNegativeFloat
    min_snr_gamma: PositiveFloat | None
    device: str
    save_every_n_steps: PositiveInt | None
    keep_states: NonNegativeInt
    deterministic: bool

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise SettingsError(f"trainer.device={self.device}: give auto, cpu, cuda or cuda:1")
        if self.save_every_n_steps is not None and self.keep_states == 0:
            raise SettingsError(
                "trainer.save_every_n_steps has no effect with trainer.keep_states=0"
            )

    def start(
        self,
        base: BaseModel,
        runs: Sequence[TrainingRun],
        data: TrainingData,
        show: Show | None = None,
    ) -> NativeTraining:
        """Prepare to train the runs as one pack; `show` takes what the bar is to say."""
        return NativeTraining(self, base, runs, data, show)


@dataclass
class _Members:
    """Runs that train together."""

    pack: Pack
    states: list[RunState]

    def bind(self) -> None:
        """Point each run's parameters and gradients at its part of the stacks."""
        self.pack.prepare_gradients()
        for index, state in enumerate(self.states):
            group = state.run.optimizer.group_of
            state.bind(self.pack.views(index, group), self.pack.gradients(index, group))

    def select(self, indices: Sequence[int]) -> _Members:
        """These members alone."""
        states = [self.states[index] for index in indices]
        return _Members(self.pack.select(indices), states)

    def joined(self, other: _Members) -> _Members:
        """These and one more; runs of one kind are neighbours and share a stack."""
        kind = _kind(other.states[0].run)
        place = sum(_kind(state.run) <= kind for state in self.states)
        if place == len(self.states):
            return _Members(self.pack.joined(other.pack), self.states + other.states)
        before, after = self.select(range(place)), self.select(range(place, len(self.states)))
        pack = before.pack.joined(other.pack).joined(after.pack)
        return _Members(pack, before.states + other.states + after.states)


class NativeTraining:
    """A training under way: iterate for its epochs; between two of them runs `join` and `drop`."""

    def __init__(
        self,
        settings: NativeTrainer,
        base: BaseModel,
        runs: Sequence[TrainingRun],
        data: TrainingData,
        show: Show | None = None,
    ) -> None:
        self.settings, self.base, self.data = settings, base, data
        self.max_runs: int | None = None
        self._bar = Bar(show)
        self.steps_per_epoch = steps_per_epoch(
            data.items, settings.batch_size, settings.gradient_accumulation_steps
        )
        self._loss = PackLoss(base, data, settings.gradient_accumulation_steps)
        self._members = self._new(sorted(runs, key=_kind))
        self._members.bind()
        self._waiting: list[_Members] = []
        self._joining: list[_Members] = []
        self._aside: list[_Members] = []  # for the others to end their epoch
        self._stopping = False
        if settings.gradient_checkpointing:
            base.checkpoint_gradients()
        if base.device.startswith("cuda"):
            import torch

            torch.use_deterministic_algorithms(settings.deterministic)

    def __iter__(self) -> Iterator[Epoch]:
        while self._gather():
            epoch = self._epoch_or_split()
            if self._stopping:
                raise Stopped("stopped at the end of an epoch")
            if epoch is not None:
                yield epoch
                self._keep(lambda state: state.num_epochs < state.run.max_train_epochs)

    def join(self, run: TrainingRun, state: State | None = None) -> None:
        """Let `run` train with the others from the next epoch on, from its own first one.

        With a state it goes on where that was written. Raises ValueError where its settings can't
        be trained on this base; the others go on.
        """
        new = self._new([run])
        if state is not None:
            new.bind()
            new.states[0].restore(state.snapshot)
            new.states[0].started = state.started
        self._joining.append(new)

    def disk_needs(self, run: str) -> int:
        """About the bytes that a run's checkpoints to come and its states will take."""
        groups = [self._members, *self._waiting, *self._aside, *self._joining]
        for members in groups:
            for index, state in enumerate(members.states):
                if state.run.name == run:
                    views = members.pack.views(index).values()
                    numbers = sum(view.numel() for tensors in views for view in tensors)
                    return numbers * self._bytes_a_number(state)
        return 0

    def _bytes_a_number(self, state: RunState) -> int:
        """On disk, of a trained number: in checkpoints and, with Adam's two moments, in states."""
        epochs = state.run.max_train_epochs - state.num_epochs
        num_states = self.settings.keep_states + 1  # the next is written before the oldest goes
        checkpoints = epochs * torch_dtype(self.settings.save_dtype).itemsize
        return checkpoints + (num_states * 3 * 4 if self.settings.keep_states else 0)

    def stop(self) -> None:
        """Let the present step end; then states are written and Stopped is raised."""
        self._stopping = True

    def _new(self, runs: Sequence[TrainingRun]) -> _Members:
        """Runs before their first step; runs of one kind must be neighbours."""
        pack = Pack.new(
            self.base.parts,
            [(run.adapter, run.seed, run.optimizer.trained_parts) for run in runs],
            [run.optimizer.bare_blocks for run in runs],
        )
        states = [
            RunState(
                run, pack.views(index, run.optimizer.group_of), self.steps_per_epoch, self.base
            )
            for index, run in enumerate(runs)
        ]
        return _Members(pack, states)

    def _gather(self) -> bool:
        """Take in those who join, or the half that waits; is there anyone to train?"""
        if not self._members.states and self._waiting:
            self._members = self._waiting.pop()
            self._members.bind()
        joining = [*self._aside, *self._joining]
        if joining:
            for new in joining:
                self._members = self._members.joined(new) if self._members.states else new
            self._joining = []
            self._set_aside()
            self._members.bind()
        return bool(self._members.states)

    def _set_aside(self) -> None:
        """Let those who go on within an epoch end it first: all must meet equal batches."""
        done = [state.num_batches for state in self._members.states]
        behind = [index for index, number in enumerate(done) if number < max(done)]
        self._aside = [self._members.select([index]) for index in behind]
        if behind:
            ahead = [index for index in range(len(done)) if index not in behind]
            self._members = self._members.select(ahead)

    def probe(self) -> None:
        """Compute the largest batch once, forward and backward: what a step needs of memory."""
        members, items = self._members, self.data.items
        batches = [self._batches(state) for state in members.states]
        sizes = [sum(items[index].latents.numel() for index in batch) for batch in batches[0]]
        largest = sizes.index(max(sizes))
        self._loss.backward(members.pack, members.states, [cut[largest] for cut in batches])

    def drop(self, run: str) -> None:
        """Stop training `run`; the others go on. Its checkpoints stand."""
        self._keep(lambda state: state.run.name != run)
        for place, members in enumerate(self._waiting):
            others = [i for i, state in enumerate(members.states) if state.run.name != run]
            self._waiting[place] = members.select(others)
        self._waiting = [members for members in self._waiting if members.states]
        self._joining = [new for new in self._joining if new.states[0].run.name != run]
        self._aside = [new for new in self._aside if new.states[0].run.name != run]

    def _epoch_or_split(self) -> Epoch | None:
        """One epoch; when memory runs out None, with the pack halved and back at its start."""
        before = self._members
        can_split = len(before.states) > 1
        snapshots = [state.snapshot() for state in before.states if can_split]
        try:
            return self._epoch()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if not can_split:
                return self._no_memory(before.states[0].run)
        log.warning("out of memory with %d runs: they go on as two packs", len(before.states))
        before.bind()
        for state, snapshot in zip(before.states, snapshots, strict=True):
            state.restore(snapshot)
        middle = len(before.states) // 2
        self.max_runs = len(before.states) - middle
        self._waiting.append(before.select(range(middle, len(before.states))))
        self._members = before.select(range(middle))
        self._members.bind()
        return None

    def _no_memory(self, run: TrainingRun) -> Epoch:
        """What becomes of a run that doesn't fit alone; if there are others, they go on."""
        reason = (
            f"{run.name}: out of memory even alone; try trainer.batch_size below"
            f" {self.settings.batch_size}, trainer.gradient_checkpointing=true,"
            " trainer.precision=bf16 or a smaller dataset.resolution"
        )
        if not (self._waiting or self._aside or self._joining):
            raise TrainerError(reason)
        self._keep(lambda _: False)
        return Epoch(checkpoints=[], steps={}, failures={run.name: reason})

    def _epoch(self) -> Epoch:
        begun = self._members.states
        batches = {state.run.name: self._batches(state) for state in begun}
        failures: dict[str, str] = {}
        done, num_batches = begun[0].num_batches, len(batches[begun[0].run.name])
        size = self.settings.gradient_accumulation_steps
        self._begin_epoch(begun, done // size)
        for first in range(done, num_batches, size):
            micro_steps = range(first, min(first + size, num_batches))
            states = self._members.states
            group = [[batches[state.run.name][i] for state in states] for i in micro_steps]
            records = self._step(group)
            for state, record in zip(states, records, strict=True):
                state.num_batches = micro_steps.stop
                state.records.append((state.num_steps, record))
                if not state.is_finite:
                    seen = [batches[state.run.name][i] for i in micro_steps]
                    failures[state.run.name] = self._failure(state, record, seen)
            self._bar.step([record["train/loss"] for record in records])
            if failures:
                self._keep(lambda state: state.is_finite)
            if not self._members.states:
                break
            if micro_steps.stop < num_batches:
                self._save_within(micro_steps.stop // size)
        for state in self._members.states:
            state.num_epochs, state.num_batches = state.num_epochs + 1, 0
        failures.update(self._drop_overflown())
        checkpoints = [self._write(index) for index in range(len(self._members.states))]
        self._save()
        steps = {state.run.name: tuple(state.records) for state in begun}
        return Epoch(checkpoints=checkpoints, steps=steps, failures=failures)

    def _begin_epoch(self, states: Sequence[RunState], steps_done: int) -> None:
        for state in states:
            if state.num_batches == 0:
                state.records = []
        longest = max(states, key=lambda state: state.run.max_train_epochs)
        self._bar.epoch(
            longest.num_epochs + 1, longest.run.max_train_epochs, self.steps_per_epoch, steps_done
        )

    def _save_within(self, steps_done: int) -> None:
        """Write states between two steps of an epoch, where that is due or we are to stop."""
        every = self.settings.save_every_n_steps
        if self._stopping or (every is not None and steps_done % every == 0):
            self._save()
        if self._stopping:
            raise Stopped(f"stopped after step {steps_done} of an epoch")

    def _save(self) -> None:
        """Write the states of this moment; only then are the oldest deleted."""
        members, number = self._members.states, self.settings.keep_states
        if number == 0:
            return
        pack = tuple((one.run.name, one.num_epochs, one.num_steps) for one in members)
        for one in members:
            state = State(run=one.run.name, pack=pack, started=one.started, snapshot=one.snapshot())
            state_files.write(one.run.output_dir, state)
        for one in members:
            state_files.keep_last(one.run.output_dir, number)

    def _step(self, micro_batches: Sequence[Sequence[Batch]]) -> list[dict[str, float]]:
        """One optimiser step of every run from its batches; what is to be logged, by run."""
        begun = time.perf_counter()
        members = self._members
        losses = [0.0] * len(members.states)
        for batches in micro_batches:
            values = self._loss.backward(members.pack, members.states, batches)
            shares = [value / len(micro_batches) for value in values]
            losses = [total + share for total, share in zip(losses, shares, strict=True)]
        records = []
        for index, state in enumerate(members.states):
            rates = state.rates()
            norm = state.step(losses[index])
            records.append({"train/loss": losses[index], "train/grad_norm": norm, **rates})
            if state.is_finite and state.run.adapter.scale_weight_norms is not None:
                members.pack.limit_norm(index, state.run.adapter.scale_weight_norms)
        members.pack.zero_gradients()
        speed = 1 / (time.perf_counter() - begun)
        return [{**record, "train/it_per_s": speed} for record in records]

    def _batches(self, state: RunState) -> list[Batch]:
        return epoch_batches(
            self.data.items,
            self.settings.batch_size,
            run_seed=state.run.seed,
            data_seed=self.data.settings.seed,
            epoch=state.num_epochs + 1,
        )

    def _failure(self, state: RunState, record: dict[str, float], seen: list[Batch]) -> str:
        images = sorted({self.data.items[index].path.name for batch in seen for index in batch})
        return (
            f"{state.run.name}: loss {record['train/loss']:g} with gradient norm"
            f" {record['train/grad_norm']:g} in epoch {state.num_epochs + 1}, step"
            f" {state.num_steps}, on {', '.join(images)}; {_LEFT}"
        )

    def _drop_overflown(self) -> dict[str, str]:
        """Stop the runs whose weights no file could hold: run -> why."""
        failures = {}
        for index, state in enumerate(self._members.states):
            if not all(bool(t.isfinite().all()) for t in self._file_tensors(index).values()):
                state.is_finite = False
                failures[state.run.name] = (
                    f"{state.run.name}: weights beyond {self.settings.save_dtype} after epoch"
                    f" {state.num_epochs}; {_LEFT}"
                )
        self._keep(lambda state: state.is_finite)
        return failures

    def _write(self, index: int) -> Checkpoint:
        state = self._members.states[index]
        run, epoch = state.run, state.num_epochs
        path = checkpoint.checkpoint_path(run.output_dir, run.name, epoch)
        tensors = {name: t.cpu() for name, t in self._file_tensors(index).items()}
        checkpoint.write(path, tensors, kohya_metadata(self, state))
        return Checkpoint(path=path, run=run.name, epoch=epoch, step=state.num_steps)

    def _file_tensors(self, index: int) -> dict[str, Tensor]:
        """DoRA's magnitudes stay fp32: as large as the base's norms, they'd round the change."""
        dtype = torch_dtype(self.settings.save_dtype)
        tensors = self._members.pack.file_tensors(index)
        return {
            name: tensor if name.endswith(".dora_scale") else tensor.to(dtype)
            for name, tensor in tensors.items()
        }

    def _keep(self, wanted: Callable[[RunState], bool]) -> None:
        members = self._members
        kept = [index for index, state in enumerate(members.states) if wanted(state)]
        if len(kept) < len(members.states):
            self._members = members.select(kept)
            self._members.bind()


def _kind(run: TrainingRun) -> tuple[str, ...]:
    """What runs must share to be stacked together."""
    parts = sorted(run.optimizer.trained_parts)
    return (type(run.adapter).__name__, str(run.adapter.targets), *parts)
