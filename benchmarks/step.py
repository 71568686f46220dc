"""Our step over the bare model's: `python -m benchmarks.step`.

Ours: one optimiser step of a run, text encoder and UNet trained: forward, backward, clipping,
optimiser. Bare: the same batch through the same frozen text encoder and UNet without adapters,
forward and backward through all activations. The target at SD1.5's widths: at most 1.15.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.common import Bench, interleaved, machine, median_ratio, prepare, show, stepper

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TARGET = 1.15
SETTINGS = {"sd15-random": (64, 1), "embedded": (16, 4)}
"""Model -> rank and batch size."""


def main() -> None:
    """Measure and print a row a model."""
    arguments = _arguments()
    rows = [_measure(model, arguments) for model in arguments.models]
    columns = ["model", "latents", "rank", "batch", "bare ms", "ours ms", "ratio", "target"]
    show(f"A training step: {machine(arguments.device)}", columns, rows)


def _measure(model: str, arguments: argparse.Namespace) -> list[str]:
    rank, batch_size = SETTINGS[model]
    batch_size = arguments.batch or batch_size
    bench = prepare(
        model,  # type: ignore[arg-type]
        device=arguments.device,
        precision=arguments.precision or ("bf16" if arguments.device == "cuda" else "fp32"),
        latent_side=arguments.latents,
        overrides=[f"adapter.rank={rank}"],
    )
    seconds = interleaved(
        {"bare": bare_step(bench, batch_size), "ours": stepper(bench.training(1, batch_size))},
        rounds=arguments.rounds,
        steps=1 if model == "sd15-random" else 5,
        device=arguments.device,
    )
    return [
        model,
        "x".join(str(side) for side in bench.data.items[0].latents.shape[1:]),
        str(rank),
        str(batch_size),
        *(f"{statistics.median(seconds[name]) * 1000:.0f}" for name in ("bare", "ours")),
        f"{median_ratio(seconds['ours'], seconds['bare']):.2f}",
        f"<= {TARGET}" if model == "sd15-random" else "",
    ]


def bare_step(bench: Bench, batch_size: int) -> Callable[[], object]:
    """Forward and backward of the frozen model on a batch, gradients through all activations."""
    import torch

    base = bench.base
    items = bench.data.items[:batch_size]
    latents = torch.stack([item.latents for item in items])
    noise = torch.randn_like(latents)
    timesteps = torch.linspace(100, 900, batch_size, device=latents.device).long()
    noisy = base.noise_schedule.add_noise(latents, noise, timesteps)
    captions = [item.caption for item in items]

    def step() -> object:
        inputs = noisy.detach().requires_grad_(True)
        handle = base.text_encoder.get_input_embeddings().register_forward_hook(_with_gradient)
        try:
            with base.autocast():
                noise_pred = base.predict(inputs, timesteps, base.encode_prompt(captions))
        finally:
            handle.remove()
        (noise_pred.float() - noise).square().mean().backward()
        return inputs.grad

    return step


def _with_gradient(module: torch.nn.Module, args: object, output: Tensor) -> Tensor:
    """A hook: the embeddings of the tokens as a leaf that wants a gradient."""
    return output.detach().requires_grad_(True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], help="bf16 on CUDA")
    parser.add_argument("--latents", type=int, default=16, help="side of sd15-random's latents")
    parser.add_argument("--batch", type=int, help="else 1 for sd15-random, 4 for embedded")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


if __name__ == "__main__":
    main()
