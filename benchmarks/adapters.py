"""A training step of every type over one of a standard LoRA: `python -m benchmarks.adapters`.

One optimiser step of a run, text encoder and UNet trained. All types adapt the same modules
(`--targets`), side by side in the same rounds. LoHa, LoKr and GLoRA have a rank of their own, as
their configs advise.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.common import Bench, interleaved, machine, median_ratio, prepare, show, stepper
from lorasweep.config.compose import compose
from lorasweep.core.settings import build

SETTINGS = {"sd15-random": (64, 1), "embedded": (16, 4)}
"""Model -> rank of lora, locon and dora, and batch size."""
OWN_RANK = 8
"""Of loha, lokr and LyCORIS's glora, whose rank means something else."""

CASES = {
    "lora": ["adapter=lora"],
    "locon": ["adapter=locon"],
    "dora": ["adapter=dora"],
    "loha": ["adapter=loha"],
    "lokr": ["adapter=lokr"],
    "lokr, full matrix": ["adapter=lokr", "adapter.full_matrix=true", "adapter.factor=8"],
    "glora by LyCORIS": ["adapter=lycoris"],
}


def main() -> None:
    """Measure and print a table a model."""
    arguments = _arguments()
    for model in arguments.models:
        _measure(model, arguments)


def _measure(model: str, arguments: argparse.Namespace) -> None:
    rank, batch_size = SETTINGS[model]
    bench = prepare(
        model,  # type: ignore[arg-type]
        device=arguments.device,
        precision="bf16" if arguments.device == "cuda" else "fp32",
        latent_side=arguments.latents,
        overrides=[f"adapter.rank={rank}"],
    )
    chosen = {
        name: _adapter(CASES[name], rank, arguments.targets) for name in ["lora", *arguments.types]
    }
    seconds = interleaved(
        {name: _case(bench, adapter, batch_size) for name, adapter in chosen.items()},
        rounds=arguments.rounds,
        steps=1 if model == "sd15-random" else 4,
        device=arguments.device,
    )
    rows = [
        [
            name,
            str(adapter.rank),
            f"{statistics.median(seconds[name]) * 1000:.0f}",
            f"{median_ratio(seconds[name], seconds['lora']):.2f}",
        ]
        for name, adapter in chosen.items()
    ]
    title = f"{model}, batch {batch_size}, {arguments.targets or 'own targets'}"
    columns = ["type", "rank", "ms", "over lora"]
    show(f"A step by type, {title}: {machine(arguments.device)}", columns, rows)


def _adapter(overrides: list[str], rank: int, targets: str | None) -> Any:
    """The settings of a type, as a run's config makes them."""
    own = rank if overrides[0] in ("adapter=lora", "adapter=locon", "adapter=dora") else OWN_RANK
    more = [f"adapter.targets={targets}"] if targets else []
    cfg = compose(["experiment=demo", *overrides, f"adapter.rank={own}", *more])
    return build(cfg.adapter, "adapter")


def _case(bench: Bench, adapter: Any, batch_size: int) -> Callable[[], object]:
    run = replace(bench.run, adapter=adapter)
    return stepper(replace(bench, run=run).training(1, batch_size))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--types", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--targets", default="attn-mlp", help="'' for each type's own")
    parser.add_argument("--latents", type=int, default=16, help="side of sd15-random's latents")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
