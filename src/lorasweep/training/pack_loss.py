"""The loss of a pack's micro step, and its gradients.

The diffusion loss of each sample, weighted, averaged over each run's own batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorasweep.adapters.kohya_names import TEXT_ENCODERS
from lorasweep.adapters.pack import Pack
from lorasweep.core import rng
from lorasweep.data.latents import Item
from lorasweep.models.base_model import BaseModel
from lorasweep.models.conditioning import Conditioning, SizeAndCrop
from lorasweep.models.diffusion_loss import prediction_and_target
from lorasweep.training.training_batches import Batch
from lorasweep.training.training_captions import caption_of
from lorasweep.training.training_noise import DrawnNoise
from lorasweep.training.training_run import TrainingData
from lorasweep.training.training_state import TrainingState

if TYPE_CHECKING:
    from torch import Tensor


class PackLoss:
    """Computes losses of packs over one base model and one set of images."""

    def __init__(self, base: BaseModel, data: TrainingData) -> None:
        self.base, self.data = base, data
        self._encoded: dict[str, Conditioning] = {}
        self._every_caption = {item.caption for item in data.items}
        self._captions_vary = any(item.settings.captions_vary for item in data.items)

    def backward(
        self,
        pack: Pack,
        states: Sequence[TrainingState],
        batches: Sequence[Batch],
        num_micro_steps: int,
    ) -> list[float]:
        """Add each run's gradients of its batch, over the micro steps of its step; its loss."""
        import torch

        own = [self._latents(s, b) for s, b in zip(states, batches, strict=True)]
        drawn = [self._draw(state, rows) for state, rows in zip(states, own, strict=True)]
        latents = torch.cat(own)
        noise, on_input, timesteps = (
            torch.cat([getattr(one, name) for one in drawn]).to(latents.device)
            for name in ("target", "on_input", "timesteps")
        )
        captions = self._captions(states, batches)
        sizes = [s for one in zip(states, batches, strict=True) for s in self._sizes(*one)]
        with pack.attached(dropout_steps=[state.num_micro_steps for state in states]):
            with self.base.autocast():
                conditioning = self._encode(pack, captions, sizes)
                prediction, target = prediction_and_target(
                    self.base, latents, noise, timesteps, conditioning, on_input
                )
            losses = self._losses(prediction, target, timesteps, states)
            shares = losses / num_micro_steps
            total = torch.stack(
                [state.scaler.scale(share) for state, share in zip(states, shares, strict=True)]
            ).sum()
            total.backward()
        for state in states:
            state.num_micro_steps += 1
        values: list[float] = losses.tolist()
        return values

    def _latents(self, state: TrainingState, batch: Batch) -> Tensor:
        import torch

        return torch.stack(
            [
                item.flipped if flip and item.flipped is not None else item.latents
                for item, flip in self._flips(state, batch)
            ]
        )

    def _sizes(self, state: TrainingState, batch: Batch) -> list[SizeAndCrop]:
        return [
            item.size_and_crop(flipped=flip and item.flipped is not None)
            for item, flip in self._flips(state, batch)
        ]

    def _flips(self, state: TrainingState, batch: Batch) -> list[tuple[Item, bool]]:
        draw = rng.python_random(state.run.seed, "flip", state.num_micro_steps)
        return [(self.data.items[index], draw.random() < 0.5) for index in batch]

    def _draw(self, state: TrainingState, latents: Tensor) -> DrawnNoise:
        num_timesteps = self.base.noise_schedule.num_train_timesteps
        return state.run.draw(state.run.seed, state.num_micro_steps, latents, num_timesteps)

    def _captions(self, states: Sequence[TrainingState], batches: Sequence[Batch]) -> list[str]:
        return [
            caption_of(
                self.data.items[index],
                seed=state.run.seed,
                epoch=state.num_epochs + 1,
                place=(state.num_micro_steps, row),
            )
            for state, batch in zip(states, batches, strict=True)
            for row, index in enumerate(batch)
        ]

    def _encode(
        self, pack: Pack, captions: list[str], sizes: Sequence[SizeAndCrop]
    ) -> Conditioning:
        """What the base is told of K * rows of captions and pictures."""
        return self.base.with_sizes(self._encode_captions(pack, captions), sizes)

    def _encode_captions(self, pack: Pack, captions: list[str]) -> Conditioning:
        """Kept where nothing changes it; the text encoders leave the device's memory then."""
        import torch

        if any(pack.adapts(part) for part in TEXT_ENCODERS):
            return self.base.encode_prompt(captions)
        with torch.no_grad():
            if self._captions_vary:
                return self.base.encode_prompt(captions)
            missing = sorted(set(captions) - set(self._encoded))
            if missing:
                found = self.base.encode_prompt(missing)
                self._encoded.update((one, found[[row]]) for row, one in enumerate(missing))
            if self._encoded.keys() >= self._every_caption:
                self.base.rest_text_encoders()
            return Conditioning.joined([self._encoded[caption] for caption in captions])

    def _losses(
        self,
        prediction: Tensor,
        target: Tensor,
        timesteps: Tensor,
        states: Sequence[TrainingState],
    ) -> Tensor:
        """Each run's loss (K,) of predictions (K * rows, C, h, w), by its own settings."""
        import torch

        num_runs, schedule = len(states), self.base.noise_schedule
        losses = []
        for state, *own in zip(
            states,
            *(tensor.chunk(num_runs) for tensor in (prediction, target, timesteps)),
            strict=True,
        ):
            times = own[-1]
            errors = state.run.errors(*own, schedule).mean(dim=(1, 2, 3))
            losses.append(state.run.weighted(errors, times, schedule).mean())
        return torch.stack(losses)
