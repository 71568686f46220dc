"""What the benchmarks share: the demo's run, real or SD1.5-sized models, and fair timing."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from lorasweep.config.build_run import build_run
from lorasweep.config.compose import compose
from lorasweep.config.run import Run
from lorasweep.data import kohya_folders, latents
from lorasweep.models.stable_diffusion import StableDiffusion
from lorasweep.runs.prepare import write_folders
from lorasweep.training.native_trainer import NativeTraining
from lorasweep.training.training_run import NativeTrainer, TrainingData

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

ModelName = Literal["embedded", "sd15-random"]

SD15_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SD15_TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}


@dataclass(frozen=True)
class Bench:
    """The demo's run with a loaded model and its encoded images."""

    run: Run
    base: StableDiffusion
    data: TrainingData

    def training(self, num_runs: int, batch_size: int) -> NativeTraining:
        """A training of a pack; the runs differ in their seeds."""
        assert isinstance(self.run.trainer, NativeTrainer)
        trainer = replace(self.run.trainer, batch_size=batch_size)
        runs = [replace(self.run, name=f"run-{number}", seed=number) for number in range(num_runs)]
        return NativeTraining(trainer, self.base, runs, self.data)


def prepare(
    model: ModelName, *, device: str, precision: str, latent_side: int, overrides: Sequence[str]
) -> Bench:
    """The demo, its folders and caches in a temporary place.

    `sd15-random` has SD1.5's UNet and text encoder with random weights and random latents of
    `latent_side` squared; captions and tokenizer stay the demo's.
    """
    chosen = ["experiment=demo", f"trainer.device={device}", f"trainer.precision={precision}"]
    with tempfile.TemporaryDirectory() as name:
        places = [f"output_root={name}", f"cache_dir={name}/cache"]
        run = build_run(compose([*chosen, *places, *overrides]), output_dir=Path(name))
        base = run.model.load(device, run.trainer.precision)
        arms = kohya_folders.read(write_folders(run) / "train", run.dataset.caption_extension)
        items = latents.encode(base, arms, run.dataset, run.cache_dir)
    if model == "sd15-random":
        import torch

        base = replace(base, unet=_sd15_unet(base), text_encoder=_sd15_text_encoder(base))
        shape = (base.latent_channels, latent_side, latent_side)
        items = [replace(item, latents=torch.randn(shape, device=device)) for item in items]
    return Bench(run, base, TrainingData(items, run.dataset))


def stepper(training: NativeTraining) -> Callable[[], object]:
    """Does one optimiser step of every run at each call, on its next batch of full size."""
    states = training.pack.states
    size = training.settings.batch_size
    batches = [[b for b in training.batches(state) if len(b) == size] for state in states]
    numbers = count()

    def step() -> object:
        number = next(numbers) % len(batches[0])
        return training.step([[own[number] for own in batches]])

    return step


def interleaved(
    cases: Mapping[str, Callable[[], object]], *, rounds: int, steps: int, device: str
) -> dict[str, list[float]]:
    """Seconds a call of each case, one figure a round.

    Each round runs every case `steps` times, so that what else the machine does hits all alike.
    The first round warms up and is left out. CPU: time of the process, all threads. CUDA: wall.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            begun = _now(device)
            for _ in range(steps):
                case()
            if number > 0:
                seconds[name].append((_now(device) - begun) / steps)
    return seconds


def median_ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """The median over rounds of one case over another, each pair from the same round."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, numbers to the right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def machine(device: str) -> str:
    """What the figures were measured on."""
    import os

    import torch

    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, wall time"
    return f"{os.cpu_count()} CPU cores, torch {torch.__version__}, CPU time"


def _now(device: str) -> float:
    if not device.startswith("cuda"):
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def _sd15_unet(base: StableDiffusion) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel
    from torch.nn import Module

    unet = UNet2DConditionModel(**SD15_UNET).requires_grad_(False).eval()
    return Module.to(unet, base.device, base.unet.dtype)  # diffusers' own warns of its fp32 parts


def _sd15_text_encoder(base: StableDiffusion) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    text_encoder = CLIPTextModel(CLIPTextConfig(**SD15_TEXT_ENCODER))
    return text_encoder.requires_grad_(False).eval().to(base.device, base.text_encoder.dtype)
