"""What a run-step costs in packs of 1, 2, 4 and 8: `python -m benchmarks.packing`.

The step is the trainer's own: draws, text encoder and UNet forward and backward, clipping,
optimiser, for every run of the pack. The claim: in a pack of 8 a run-step costs at most 0.5 of
solo at batch 1 and 0.6 at batch 3.
"""

from __future__ import annotations

import argparse
import statistics

from benchmarks.common import Bench, interleaved, machine, median_ratio, prepare, show, stepper

PACKS = (1, 2, 4, 8)
CLAIMS = {1: 0.5, 3: 0.6}
"""Batch size -> a pack of 8's cost over solo, at most."""


def main() -> None:
    """Measure and print a table a batch size."""
    arguments = _arguments()
    overrides = [] if arguments.rank is None else [f"adapter.rank={arguments.rank}"]
    bench = prepare(
        arguments.model,
        device=arguments.device,
        precision=arguments.precision or ("bf16" if arguments.device == "cuda" else "fp32"),
        latent_side=arguments.latents,
        overrides=overrides,
    )
    for batch_size, claim in CLAIMS.items():
        _measure(bench, batch_size, claim, arguments)


def _measure(bench: Bench, batch_size: int, claim: float, arguments: argparse.Namespace) -> None:
    cases = {str(size): stepper(bench.training(size, batch_size)) for size in PACKS}
    seconds = interleaved(
        cases, rounds=arguments.rounds, steps=arguments.steps, device=arguments.device
    )
    per_run = {name: [s / int(name) for s in values] for name, values in seconds.items()}
    rows = [
        [
            name,
            f"{statistics.median(values) * 1000:.1f}",
            f"{median_ratio(values, per_run['1']):.2f}",
            f"<= {claim}" if name == "8" else "",
        ]
        for name, values in per_run.items()
    ]
    show(
        f"{arguments.model}, batch {batch_size}: {machine(arguments.device)}",
        ["pack of", "ms per run-step", "over solo", "claim"],
        rows,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="embedded", choices=["embedded", "sd15-random"])
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], help="bf16 on CUDA")
    parser.add_argument("--latents", type=int, default=64, help="side of sd15-random's latents")
    parser.add_argument("--rank", type=int, help="else the demo's")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="steps of each pack in a round")
    return parser.parse_args()


if __name__ == "__main__":
    main()
