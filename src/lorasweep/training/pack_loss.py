"""The loss of a pack's micro step, and its gradients.

The diffusion loss of each sample, weighted, averaged over each run's own batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorasweep.adapters.pack import Pack
from lorasweep.core import rng
from lorasweep.models.base_model import BaseModel
from lorasweep.models.conditioning import Conditioning
from lorasweep.models.diffusion_loss import squared_errors
from lorasweep.training.training_batches import Batch
from lorasweep.training.training_captions import caption_of
from lorasweep.training.training_run import TrainingData
from lorasweep.training.training_state import TrainingState

if TYPE_CHECKING:
    from torch import Tensor


class PackLoss:
    """Computes losses of packs over one base model and one set of images."""

    def __init__(self, base: BaseModel, data: TrainingData) -> None:
        self.base, self.data = base, data
        self._encoded: dict[str, Conditioning] = {}
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

        latents = torch.cat([self._latents(s, b) for s, b in zip(states, batches, strict=True)])
        draws = [self._draw(state, len(batches[0]), latents.shape[1:]) for state in states]
        noise = torch.cat([noise for noise, _ in draws]).to(latents.device)
        timesteps = torch.cat([timesteps for _, timesteps in draws]).to(latents.device)
        captions = self._captions(states, batches)
        with pack.attached(dropout_steps=[state.num_micro_steps for state in states]):
            with self.base.autocast():
                conditioning = self._encode(pack, captions)
                per_sample = squared_errors(self.base, latents, noise, timesteps, conditioning)
            losses = self._weighted(per_sample, timesteps, states)
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

        items = [self.data.items[index] for index in batch]
        draw = rng.python_random(state.run.seed, "flip", state.num_micro_steps)
        flips = [draw.random() < 0.5 for _ in items]
        return torch.stack(
            [
                item.flipped if flip and item.flipped is not None else item.latents
                for item, flip in zip(items, flips, strict=True)
            ]
        )

    def _draw(self, state: TrainingState, rows: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Noise (rows, C, h, w) and timesteps (rows,) of this run's micro step, on the CPU."""
        import torch

        seed, step = state.run.seed, state.num_micro_steps
        draw = rng.generator(seed, "noise", step)
        noise = torch.randn(rows, *shape, generator=draw)
        if state.run.noise_offset > 0:  # kohya: the offset noise is the target too
            noise += state.run.noise_offset * torch.randn(rows, shape[0], 1, 1, generator=draw)
        draw = rng.generator(seed, "timesteps", step)
        return noise, torch.randint(
            self.base.noise_schedule.num_train_timesteps, (rows,), generator=draw
        )

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

    def _encode(self, pack: Pack, captions: list[str]) -> Conditioning:
        """K * rows of captions; kept where nothing changes what the base is told of them."""
        import torch

        if pack.adapts("text_encoder"):
            return self.base.encode_prompt(captions)
        with torch.no_grad():
            if self._captions_vary:
                return self.base.encode_prompt(captions)
            missing = sorted(set(captions) - set(self._encoded))
            if missing:
                found = self.base.encode_prompt(missing)
                self._encoded.update((one, found[[row]]) for row, one in enumerate(missing))
            return Conditioning.joined([self._encoded[caption] for caption in captions])

    def _weighted(
        self, per_sample: Tensor, timesteps: Tensor, states: Sequence[TrainingState]
    ) -> Tensor:
        """Losses (K,) of per-sample losses (K * rows,)."""
        import torch

        num_runs = len(states)
        losses, times = per_sample.view(num_runs, -1), timesteps.view(num_runs, -1)
        if any(state.run.min_snr_gamma is not None for state in states):
            weights = [
                torch.ones_like(losses[index])
                if state.run.min_snr_gamma is None
                else self.base.noise_schedule.min_snr_weight(times[index], state.run.min_snr_gamma)
                for index, state in enumerate(states)
            ]
            losses = losses * torch.stack(weights)
        return losses.mean(dim=1)
