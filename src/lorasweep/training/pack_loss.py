"""The loss of a pack's micro step, and its gradients.

The diffusion loss of each sample, weighted, averaged over each run's own batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorasweep.adapters.kohya_names import TEXT_ENCODERS
from lorasweep.adapters.pack import Pack
from lorasweep.core import rng
from lorasweep.data.latents import Item, masks_of
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
        self._every_caption = {item.prompt for item in data.items}
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

        images = [one for pair in zip(states, batches, strict=True) for one in self._images(*pair)]
        latents = torch.stack([item.latents_of(mirrored=flip) for item, flip in images])
        own = latents.chunk(len(states))
        drawn = [self._draw(state, rows) for state, rows in zip(states, own, strict=True)]
        noise, on_input, timesteps = (
            torch.cat([getattr(one, name) for one in drawn]).to(latents.device)
            for name in ("target", "on_input", "timesteps")
        )
        captions = self._captions(states, batches)
        sizes = [item.size_and_crop(flipped=flip) for item, flip in images]
        masks = masks_of(*zip(*images, strict=True))
        with pack.attached(dropout_steps=[state.num_micro_steps for state in states]):
            with self.base.autocast():
                conditioning = self._encode(pack, captions, sizes)
                prediction, target = prediction_and_target(
                    self.base, latents, noise, timesteps, conditioning, on_input
                )
            errors = self._errors(prediction, target, timesteps, states, masks)
            losses = self._weighted(errors, timesteps, states, batches)
            shares = losses / num_micro_steps
            total = torch.stack(
                [state.scaler.scale(share) for state, share in zip(states, shares, strict=True)]
            ).sum()
            total.backward()
        for state in states:
            state.num_micro_steps += 1
        values: list[float] = losses.tolist()
        return values

    def _images(self, state: TrainingState, batch: Batch) -> list[tuple[Item, bool]]:
        """A run's images of a micro step, and whether they are mirrored."""
        draw = rng.python_random(state.run.seed, "flip", state.num_micro_steps)
        items = [(self.data.items[index], draw.random() < 0.5) for index in batch]
        return [(item, flip and item.flipped is not None) for item, flip in items]

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
                step=state.num_steps,
                max_train_steps=state.max_train_steps,
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

    def _errors(
        self,
        prediction: Tensor,
        target: Tensor,
        timesteps: Tensor,
        states: Sequence[TrainingState],
        masks: Tensor | None,
    ) -> Tensor:
        """Errors (K * rows,) of predictions (K * rows, C, h, w), each run's by its own settings."""
        import torch

        schedule = self.base.noise_schedule
        rows = (one.chunk(len(states)) for one in (prediction, target, timesteps))
        errors = torch.cat(
            [s.run.errors(*own, schedule) for s, *own in zip(states, *rows, strict=True)]
        )
        return (errors if masks is None else errors * masks).mean(dim=(1, 2, 3))

    def _weighted(
        self,
        per_sample: Tensor,
        timesteps: Tensor,
        states: Sequence[TrainingState],
        batches: Sequence[Batch],
    ) -> Tensor:
        """Losses (K,) of per-sample losses (K * rows,), each run's weighed by its own settings."""
        import torch

        num_runs, schedule = len(states), self.base.noise_schedule
        losses, times = per_sample.view(num_runs, -1), timesteps.view(num_runs, -1)
        weight = self.data.settings.prior_loss_weight
        if weight != 1:
            is_reg = [[self.data.items[index].is_reg for index in batch] for batch in batches]
            losses = torch.where(
                torch.tensor(is_reg, device=losses.device), losses * weight, losses
            )
        rows = zip(states, losses, times, strict=True)
        return torch.stack([s.run.weighted(of, at, schedule).mean() for s, of, at in rows])
