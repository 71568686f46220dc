"""Packs of adapters on the embedded base model that behave as if they had been trained."""

import torch

from lorasweep.adapters.pack import Pack, computing_with
from lorasweep.models.conditioning import SizeAndCrop

BOTH = frozenset({"text_encoder", "text_encoder_2", "unet"})


def trained(base, *runs):
    """A pack whose deltas are not zero: as if it had been trained."""
    pack = Pack.new(base.parts, [(adapter, seed, BOTH) for adapter, seed in runs])
    draw = torch.Generator().manual_seed(0)
    for index in range(len(pack)):
        for tensors in pack.views(index).values():
            for tensor in tensors:
                tensor += 0.05 * torch.randn(tensor.shape, generator=draw)
    return pack


def predict(base, pack, rows=2, runs=1):
    """The model's predictions on `rows` fixed inputs, the same for each of the pack's runs."""
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, 4, 16, 16, generator=draw).repeat(runs, 1, 1, 1)
    timesteps = torch.tensor([100, 900][:rows]).repeat(runs)
    with torch.no_grad(), computing_with(pack):
        told = base.encode_prompt(["a cat", "a rocket"][:rows] * runs)
        side = 16 * base.vae_scale_factor
        told = base.with_sizes(told, [SizeAndCrop.whole((side, side))] * rows * runs)
        return base.predict(latents, timesteps, told)
