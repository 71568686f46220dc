"""What a run carries from step to step: parameters, optimiser, schedule, counters."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lorasweep.core import rng
from lorasweep.models.base_model import BaseModel
from lorasweep.training.training_run import TrainingRun

if TYPE_CHECKING:
    from torch import Tensor

Views = Mapping[str, Sequence["Tensor"]]
"""Group of the optimiser (`Optimizer.group_of`) -> a run's tensors in it."""

Records = Sequence[tuple[int, Mapping[str, float]]]
"""(optimizer step, what is logged of it)."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of a run's state in the computer's memory; `saved_states` writes it to the disk."""

    parameters: list[Tensor]
    optimizer: dict[str, Any]
    lr_scheduler: dict[str, Any]
    scaler: dict[str, Any]
    num_epochs: int
    """Finished ones."""
    num_batches: int
    """Of the epoch under way, trained on."""
    num_steps: int
    """Optimizer steps since the beginning."""
    num_micro_steps: int
    records: Records
    """Of the epoch under way; at an epoch's end, of that epoch."""


class TrainingState:
    """One run in training. Its parameters live in the pack's stacks, `bind` says where."""

    def __init__(
        self,
        run: TrainingRun,
        views: Views,
        steps_per_epoch: int,
        base: BaseModel,
        network: Mapping[str, str],
    ) -> None:
        """`network` is what its metadata says of the network beside what its settings do."""
        import torch

        self.run, self.network = run, network
        self.started = time.time()
        self.session_id = rng.key_seed(run.seed, "session", run.name) % 2**32
        self.parameters = {
            group: [torch.nn.Parameter(view, requires_grad=False) for view in tensors]
            for group, tensors in views.items()
        }
        self.optimizer = run.optimizer.create(self.parameters)
        self.max_train_steps = run.num_steps(steps_per_epoch)
        self.max_train_epochs = run.num_epochs(steps_per_epoch)
        self.lr_scheduler = run.lr_scheduler.create(self.optimizer, self.max_train_steps)
        self._new_scaler = partial(
            torch.amp.GradScaler, torch.device(base.device).type, enabled=base.precision == "fp16"
        )
        self.scaler = self._new_scaler()
        self.num_epochs = 0  # finished ones
        self.num_batches = 0  # of the epoch under way
        self.num_steps = 0
        self.num_micro_steps = 0
        self.records: list[tuple[int, Mapping[str, float]]] = []  # of the epoch under way
        self.is_finite = True

    @property
    def is_done(self) -> bool:
        """Has it made its last step? In a pack that may be within an epoch of the others."""
        return self.num_steps >= self.max_train_steps

    def bind(self, views: Views, gradients: Views) -> None:
        """Let the parameters be these tensors, with these gradients."""
        for group, parameters in self.parameters.items():
            for parameter, view, gradient in zip(
                parameters, views[group], gradients[group], strict=True
            ):
                parameter.data = view
                parameter.grad = gradient

    def rates(self) -> dict[str, float]:
        """The learning rates of the next step, by part and by weight of a block.

        lr_unet is that of a weight of 1, also where no block has it. Prodigy's and D-Adaptation's
        are multiplied by the step size that they have found.
        """
        rates = {"train/lr_unet": 0.0, "train/lr_text_encoder": 0.0}
        for group in self.optimizer.param_groups:
            name, _, weight = group["name"].partition("_x")
            rate = float(group["lr"]) * float(group.get("d", 1))
            rates[f"train/lr_{name}"] = rate / float(weight or 1)
            rates[f"train/lr_{group['name']}"] = rate
        return rates

    def step(self, loss: float) -> dict[str, float]:
        """Clip and step; the gradients' norm before clipping, and the rates of this step.

        Not finite: nothing is changed.
        """
        import torch

        self.num_steps += 1
        rates = self.rates()
        parameters = self._all_parameters()
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # a scaled fp16 gradient may overflow: the scaler skips that step and scales less;
        # but one that overflows at no scale at all is lost
        overflow_is_normal = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        grads_are_finite = bool(norm.isfinite())
        self.is_finite = math.isfinite(loss) and (overflow_is_normal or grads_are_finite)
        if self.is_finite:
            limit = self.run.optimizer.max_grad_norm
            if limit > 0 and grads_are_finite:
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if grads_are_finite:  # a skipped step is none
                self.lr_scheduler.step()
        if self.run.lr_scheduler.type == "adafactor":  # which tells them afterwards
            rates = self.rates()
        return {"train/grad_norm": float(norm), **rates}

    def snapshot(self) -> Snapshot:
        """A copy of all that a step changes, in the computer's memory."""
        return Snapshot(
            parameters=[_to_cpu(p.detach()) for p in self._all_parameters()],
            optimizer=_to_cpu(self.optimizer.state_dict()),
            lr_scheduler=copy.deepcopy(self.lr_scheduler.state_dict()),
            scaler=copy.deepcopy(self.scaler.state_dict()),
            num_epochs=self.num_epochs,
            num_batches=self.num_batches,
            num_steps=self.num_steps,
            num_micro_steps=self.num_micro_steps,
            records=tuple(self.records),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, into the tensors the parameters are bound to."""
        parameters = self._all_parameters()
        if [p.shape for p in parameters] != [
            getattr(p, "shape", None) for p in snapshot.parameters
        ]:
            raise ValueError(f"{self.run.name}: its state is of another adapter; delete `states`")
        for parameter, value in zip(parameters, snapshot.parameters, strict=True):
            parameter.data.copy_(value)
        self.optimizer.load_state_dict(snapshot.optimizer)
        self.lr_scheduler.load_state_dict(snapshot.lr_scheduler)
        self.scaler = self._new_scaler()  # forgets a begun step
        self.scaler.load_state_dict(snapshot.scaler)
        self.num_epochs, self.num_batches = snapshot.num_epochs, snapshot.num_batches
        self.num_steps, self.num_micro_steps = snapshot.num_steps, snapshot.num_micro_steps
        self.records = list(snapshot.records)
        self.is_finite = True

    def _all_parameters(self) -> list[Any]:
        return [p for parameters in self.parameters.values() for p in parameters]


def _to_cpu(value: Any) -> Any:
    """A deep copy with every tensor in the computer's memory."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_cpu(item) for item in value]
    return copy.deepcopy(value)
