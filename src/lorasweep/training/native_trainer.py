"""The native trainer: K runs in one process over one frozen base model.

Every loss, gradient norm, schedule, optimiser and random stream is a run's own, so a run gives the
same result in a pack as alone, to float rounding. Options with kohya's names mean what kohya means.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lorasweep.adapters.pack import Pack
from lorasweep.core.progress import Bar, Show
from lorasweep.lora_files import checkpoint
from lorasweep.lora_files.checkpoint import Checkpoint
from lorasweep.lora_files.kohya_form import with_kohya_names
from lorasweep.models.base_model import BaseModel, torch_dtype
from lorasweep.models.gpu_memory import halved, is_out_of_memory
from lorasweep.training import saved_states
from lorasweep.training.kohya_metadata import pack_metadata, run_metadata
from lorasweep.training.network_weights import first_adapters
from lorasweep.training.optimizers import evaluated
from lorasweep.training.pack_loss import PackLoss
from lorasweep.training.saved_states import SavedState
from lorasweep.training.training_batches import Batch, epoch_batches, steps_per_epoch
from lorasweep.training.training_pack import TrainingPack
from lorasweep.training.training_run import (
    NativeTrainer,
    OnStep,
    Stopped,
    TrainedEpoch,
    TrainerError,
    TrainingData,
    TrainingRun,
)
from lorasweep.training.training_state import TrainingState

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_LEFT = (
    "the checkpoints of the epochs before it stand. Try a lower learning rate, or precision bf16"
    " or fp32"
)


class NativeTraining:
    """A training under way: iterate for its epochs; between two of them runs `join` and `drop`.

    `show` takes what the progress bar is to say, `on_step` what is to be logged of a step. Steps
    may come again, after a want of memory within an epoch.
    """

    def __init__(
        self,
        settings: NativeTrainer,
        base: BaseModel,
        runs: Sequence[TrainingRun],
        data: TrainingData,
        show: Show | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self._on_step = on_step or (lambda _run, _step, _values: None)
        self.settings, self.base, self.data = settings, base, data
        self.max_runs: int | None = None
        """Runs that fitted into memory when more did not."""
        self.steps_per_epoch = steps_per_epoch(
            data.items, settings.batch_size, settings.gradient_accumulation_steps
        )
        """Optimizer steps of an epoch."""
        self.pack = TrainingPack(Pack.new(base.parts, []), [])
        """The runs that train now."""
        self._waiting: list[TrainingPack] = []
        self._bar = Bar(show)
        self._loss = PackLoss(base, data)
        self._stopping = False
        if settings.gradient_checkpointing:
            base.checkpoint_gradients()
        if base.device.startswith("cuda"):
            import torch

            torch.use_deterministic_algorithms(settings.deterministic)
        for run in runs:
            self.join(run)
        self._gather()

    def __iter__(self) -> Iterator[TrainedEpoch]:
        """Train, yielding each epoch once its checkpoints and states are written."""
        while self._gather():
            epoch = self._epoch_or_halve()
            if self._stopping:
                raise Stopped("stopped at the end of an epoch")
            if epoch is not None:
                yield epoch
                self._keep(lambda state: state.num_epochs < state.max_train_epochs)

    def join(self, run: TrainingRun, saved: SavedState | None = None) -> None:
        """Let `run` train with the others from the next epoch on, from its own first one.

        With a saved state it goes on where that was written. Raises ValueError where its settings
        can't be trained on this base; the others go on.
        """
        run.check_schedule(self.base.noise_schedule)
        run.output_dir.mkdir(parents=True, exist_ok=True)
        run.check_parts(is_sdxl="text_encoder_2" in self.base.parts)
        self.base.wake_text_encoders()
        adapters, network = first_adapters(self.base, run)
        views = adapters.views(0, run.optimizer.group_of)
        state = TrainingState(run, views, self.steps_per_epoch, self.base, network)
        if (run.max_train_steps or 0) > state.max_train_steps:
            log.warning(
                "trainer.max_train_steps=%d has no effect on %s: trainer.max_train_epochs=%d end"
                " after %d steps",
                *(run.max_train_steps, run.name, run.max_train_epochs, state.max_train_steps),
            )
        warmup = run.lr_scheduler.warmup_steps(state.max_train_steps)
        if warmup >= state.max_train_steps:
            log.warning(
                "lr_scheduler.warmup=%d steps, and %s trains %d in all: the learning rate rises to"
                " its full value only at the end or never; try lr_scheduler.warmup=0.1",
                *(warmup, run.name, state.max_train_steps),
            )
        if saved is not None:
            state.restore(saved.snapshot)
            state.started = saved.started
        self._waiting.append(TrainingPack(adapters, [state]))

    def drop(self, run: str) -> None:
        """Stop training `run`; the others go on. Its checkpoints stand."""
        self._keep(lambda state: state.run.name != run)

    def stop(self) -> None:
        """Let the present step end; then states are written and Stopped is raised.

        May be called from a signal's handler.
        """
        self._stopping = True

    def disk_needs(self, run: str) -> int:
        """About the bytes that a run's checkpoints to come and its states will take."""
        for pack in (self.pack, *self._waiting):
            for index, state in enumerate(pack.states):
                if state.run.name == run:
                    views = pack.adapters.views(index).values()
                    numbers = sum(view.numel() for tensors in views for view in tensors)
                    return numbers * self._bytes_a_number(state)
        return 0

    def _bytes_a_number(self, state: TrainingState) -> int:
        """On disk, of a trained number: in checkpoints and, with Adam's two moments, in states."""
        epochs = state.max_train_epochs - state.num_epochs
        num_states = self.settings.keep_states + 1  # the next is written before the oldest goes
        checkpoints = epochs * torch_dtype(self.settings.save_dtype).itemsize
        return checkpoints + (num_states * 3 * 4 if self.settings.keep_states else 0)

    def probe(self) -> None:
        """Compute the largest batch once, forward and backward: what a step needs of memory."""
        items, states = self.data.items, self.pack.states
        batches = [self.batches(state) for state in states]
        sizes = [sum(items[index].latents.numel() for index in batch) for batch in batches[0]]
        largest = sizes.index(max(sizes))
        self._loss.backward(self.pack.adapters, states, [cut[largest] for cut in batches], 1)

    def _gather(self) -> bool:
        """Let those who wait into the pack, as far as they fit; is there anyone to train?"""
        if not self._waiting:
            return bool(self.pack.states)
        joining: list[TrainingPack] = [self.pack]
        staying: list[TrainingPack] = []
        for pack in self._waiting:
            num_runs = sum(len(one.states) for one in joining)
            fits = self.max_runs is None or num_runs + len(pack.states) <= self.max_runs
            (joining if fits or num_runs == 0 else staying).append(pack)
        everyone = TrainingPack.joined(joining)
        # those who go on within an epoch end it first: all must meet equal batches
        furthest = max((state.num_batches for state in everyone.states), default=0)
        self.pack = everyone.only(lambda state: state.num_batches == furthest)
        behind = everyone.only(lambda state: state.num_batches < furthest)
        self._waiting = [pack for pack in (behind, *staying) if pack.states]
        self.pack.bind()
        return bool(self.pack.states)

    def _keep(self, wanted: Callable[[TrainingState], bool]) -> None:
        """Go on with these runs alone."""
        kept = self.pack.only(wanted)
        if kept is not self.pack:
            self.pack = kept
            kept.bind()
        waiting = [pack.only(wanted) for pack in self._waiting]
        self._waiting = [pack for pack in waiting if pack.states]

    def _epoch_or_halve(self) -> TrainedEpoch | None:
        """One epoch; when memory runs out None, with the pack halved and back at its start."""
        pack, states = self.pack, self.pack.states
        can_halve = len(states) > 1
        snapshots = [state.snapshot() for state in states if can_halve]
        try:
            return self._epoch()
        except RuntimeError as error:
            if is_out_of_memory(error) and not can_halve:
                return self._too_large_alone(states[0].run)
            first, second = halved(range(len(states)), error)
        log.warning("out of memory with %d runs: they go on as two packs", len(states))
        pack.bind()
        for state, snapshot in zip(states, snapshots, strict=True):
            state.restore(snapshot)
        self.max_runs = len(second)
        self._waiting.insert(0, pack.select(second))
        self.pack = pack.select(first)
        self.pack.bind()
        return None

    def _too_large_alone(self, run: TrainingRun) -> TrainedEpoch:
        """What becomes of a run that doesn't fit alone; if there are others, they go on."""
        reason = (
            f"{run.name}: out of memory even alone; try trainer.batch_size below"
            f" {self.settings.batch_size}, trainer.gradient_checkpointing=true,"
            " trainer.precision=bf16 or a smaller dataset.resolution"
        )
        if not self._waiting:
            raise TrainerError(reason)
        self.drop(run.name)
        return TrainedEpoch(checkpoints=[], failures={run.name: reason})

    def _epoch(self) -> TrainedEpoch:
        begun = self.pack.states
        batches = {state.run.name: self.batches(state) for state in begun}
        failures: dict[str, str] = {}
        done, num_batches = begun[0].num_batches, len(batches[begun[0].run.name])
        size = self.settings.gradient_accumulation_steps
        self._begin_epoch(begun, done // size)
        for first in range(done, num_batches, size):
            states = self.pack.states
            if all(state.is_done for state in states):
                break
            micro_steps = range(first, min(first + size, num_batches))
            group = [[batches[state.run.name][i] for state in states] for i in micro_steps]
            records = self.step(group)
            for state in states:
                state.num_batches = micro_steps.stop
                if (record := records.get(state.run.name)) is None:
                    continue
                state.records.append((state.num_steps, record))
                self._on_step(state.run.name, state.num_steps, record)
                if not state.is_finite:
                    seen = [batches[state.run.name][i] for i in micro_steps]
                    failures[state.run.name] = self._not_finite(state, record, seen)
            self._bar.step([record["train/loss"] for record in records.values()])
            if failures:
                self._keep(lambda state: state.is_finite)
            if not self.pack.states:
                break
            if micro_steps.stop < num_batches:
                self._save_within(micro_steps.stop // size)
        for state in self.pack.states:
            state.num_epochs, state.num_batches = state.num_epochs + 1, 0
        checkpoints, overflown = self._write_checkpoints()
        self._keep(lambda state: state.is_finite)
        self._save()
        return TrainedEpoch(checkpoints=checkpoints, failures={**failures, **overflown})

    def _begin_epoch(self, states: Sequence[TrainingState], steps_done: int) -> None:
        for state in states:
            if state.num_batches == 0:
                state.records = []
        longest = max(states, key=lambda state: state.max_train_epochs)
        self._bar.epoch(
            longest.num_epochs + 1, longest.max_train_epochs, self.steps_per_epoch, steps_done
        )

    def batches(self, state: TrainingState) -> list[Batch]:
        """The batches of the epoch that a run is in."""
        return epoch_batches(
            self.data.items,
            self.settings.batch_size,
            run_seed=state.run.seed,
            data_seed=self.data.settings.seed,
            epoch=state.num_epochs + 1,
        )

    def step(self, micro_batches: Sequence[Sequence[Batch]]) -> dict[str, dict[str, float]]:
        """One optimizer step of every run from its batches; by run what is to be logged.

        Runs that have made their last step wait for the others, to the end of the epoch.
        """
        begun = time.perf_counter()
        adapters, states = self.pack.adapters, self.pack.states
        losses = [0.0] * len(states)
        for batches in micro_batches:
            values = self._loss.backward(adapters, states, batches, len(micro_batches))
            shares = [value / len(micro_batches) for value in values]
            losses = [total + share for total, share in zip(losses, shares, strict=True)]
        records = {}
        for index, state in enumerate(states):
            if state.is_done:
                continue
            records[state.run.name] = {"train/loss": losses[index], **state.step(losses[index])}
            if state.is_finite and state.run.adapter.scale_weight_norms is not None:
                adapters.limit_norm(index, state.run.adapter.scale_weight_norms)
        adapters.zero_gradients()
        speed = 1 / (time.perf_counter() - begun)
        return {run: {**record, "train/it_per_s": speed} for run, record in records.items()}

    def _not_finite(
        self, state: TrainingState, record: Mapping[str, float], seen: Sequence[Batch]
    ) -> str:
        images = sorted({self.data.items[index].path.name for batch in seen for index in batch})
        return (
            f"{state.run.name}: loss {record['train/loss']:g} with gradient norm"
            f" {record['train/grad_norm']:g} in epoch {state.num_epochs + 1}, step"
            f" {state.num_steps}, on {', '.join(images)}; {_LEFT}"
        )

    def _write_checkpoints(self) -> tuple[list[Checkpoint], dict[str, str]]:
        """The file of each run; and, by run, why there is none where no file holds its weights."""
        written: list[Checkpoint] = []
        overflown: dict[str, str] = {}
        shared = pack_metadata(self.settings, self.base, self.data)
        for index, state in enumerate(self.pack.states):
            run, epoch = state.run, state.num_epochs
            with evaluated(state.optimizer):
                tensors = self._file_tensors(index)
            state.is_finite = all(bool(tensor.isfinite().all()) for tensor in tensors.values())
            if not state.is_finite:
                overflown[run.name] = (
                    f"{run.name}: weights beyond {self.settings.save_dtype} after epoch {epoch};"
                    f" {_LEFT}"
                )
                continue
            path = checkpoint.checkpoint_path(run.output_dir, run.name, epoch)
            checkpoint.write(path, tensors, {**shared, **run_metadata(state, self.base)})
            written.append(Checkpoint(path=path, run=run.name, epoch=epoch, step=state.num_steps))
        return written, overflown

    def _file_tensors(self, index: int) -> dict[str, Tensor]:
        """A copy in the computer's memory, as the file has it.

        DoRA's magnitudes stay fp32: as large as the base's norms, they'd round the change.
        """
        dtype = torch_dtype(self.settings.save_dtype)
        tensors = with_kohya_names(self.pack.adapters.file_tensors(index), self.base)
        return {
            name: tensor.to("cpu", None if name.endswith(".dora_scale") else dtype, copy=True)
            for name, tensor in tensors.items()
        }

    def _save_within(self, steps_done: int) -> None:
        """Write states between two steps of an epoch, where that is due or we are to stop."""
        every = self.settings.save_every_n_steps
        if self._stopping or (every is not None and steps_done % every == 0):
            self._save()
        if self._stopping:
            raise Stopped(f"stopped after step {steps_done} of an epoch")

    def _save(self) -> None:
        """Write the states of this moment; only then are the oldest deleted."""
        states, number = self.pack.states, self.settings.keep_states
        if number == 0:
            return
        pack = tuple((one.run.name, one.num_epochs, one.num_steps) for one in states)
        for one in states:
            saved = SavedState(
                run=one.run.name, pack=pack, started=one.started, snapshot=one.snapshot()
            )
            saved_states.write(one.run.output_dir, saved)
        for one in states:
            saved_states.keep_last(one.run.output_dir, number)
