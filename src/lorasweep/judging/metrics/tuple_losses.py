"""Losses on fixed (image, caption, timestep, noise) tuples, of a pack's checkpoints at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasweep.adapters.pack import Pack, computing_with
from lorasweep.core import rng
from lorasweep.data.latents import Item, masks_of
from lorasweep.judging.sampling import equal_batches
from lorasweep.models.base_model import BaseModel
from lorasweep.models.conditioning import Conditioning
from lorasweep.models.diffusion_loss import squared_errors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LossTuple:
    """One noised image whose noise is to be predicted."""

    item: Item
    image: int
    timestep: int
    noise: int

    @property
    def cell(self) -> tuple[str, int, int, int]:
        """What tells it apart from others of one set of images."""
        return self.item.arm, self.image, self.timestep, self.noise


def tuple_losses(
    base: BaseModel, pack: Pack | None, chosen: Sequence[LossTuple], *, seed: int, batch_size: int
) -> Tensor:
    """Losses (K, N) of each checkpoint, or of the bare base, on the tuples.

    The noise depends on seed, image, timestep and the tuple's number of a noise: not on captions.
    """
    import torch

    num_runs = 1 if pack is None else len(pack)
    rows = max(1, batch_size // num_runs)
    losses = torch.zeros(num_runs, len(chosen))
    with torch.no_grad(), computing_with(pack), base.autocast():
        encoded = _encoded(base, num_runs, sorted({t.item.prompt for t in chosen}), rows)
        for numbers in equal_batches([t.item.bucket for t in chosen], rows):
            batch = [chosen[i] for i in numbers]
            losses[:, numbers] = _batch(base, num_runs, batch, encoded, seed)
    return losses


def _encoded(
    base: BaseModel, num_runs: int, captions: Sequence[str], size: int
) -> dict[tuple[int, str], Conditioning]:
    """A row for each run and caption."""
    encoded: dict[tuple[int, str], Conditioning] = {}
    for start in range(0, len(captions), size):
        part = captions[start : start + size]
        found = base.encode_prompt(list(part) * num_runs)
        pairs = [(run, caption) for run in range(num_runs) for caption in part]
        encoded.update((pair, found[[row]]) for row, pair in enumerate(pairs))
    return encoded


def _batch(
    base: BaseModel,
    num_runs: int,
    batch: Sequence[LossTuple],
    encoded: Mapping[tuple[int, str], Conditioning],
    seed: int,
) -> Tensor:
    import torch

    latents = torch.stack([t.item.latents for t in batch]).repeat(num_runs, 1, 1, 1)
    noise = torch.stack([_noise(t, seed) for t in batch]).to(latents.device)
    noise = noise.repeat(num_runs, 1, 1, 1)
    timesteps = torch.tensor([t.timestep for t in batch], device=latents.device)
    timesteps = timesteps.repeat(num_runs)
    conditioning = Conditioning.joined(
        [encoded[run, t.item.prompt] for run in range(num_runs) for t in batch]
    )
    sizes = [t.item.size_and_crop() for t in batch] * num_runs
    conditioning = base.with_sizes(conditioning, sizes)
    masks = masks_of([t.item for t in batch] * num_runs, [False] * len(batch) * num_runs)
    losses = squared_errors(base, latents, noise, timesteps, conditioning, masks)
    return losses.view(num_runs, -1).cpu()


def _noise(t: LossTuple, seed: int) -> Tensor:
    import torch

    draw = rng.generator(seed, "validation", t.image, t.timestep, t.noise)
    return torch.randn(t.item.latents.shape, generator=draw)
