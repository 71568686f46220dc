"""The training loop both stages share: resumable after a kill, the same bits as without one."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tools.base_model.optim import optimizers, update_average
from tools.base_model.presets import Plan
from torch import Tensor, nn

SAVE_EVERY_S = 60.0
WARMUP_STEPS = 50

Randomness = tuple[np.random.Generator, torch.Generator]


def fit(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    plan: Plan,
    state_file: Path,
    stop_at: int | None = None,
    on_step: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> dict[str, Tensor]:
    """Train to `plan.steps` (or pause at `stop_at`) and return the averaged weights.

    `loss_at(step)` draws its batch from a stream keyed by the step alone, so the state on disk
    is all that a resumed run needs. A larger `plan.samples` later extends a finished run.
    """
    optims = optimizers(model, plan.muon_lr, plan.adam_lr)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = restore(state_file, model, optims, average)
    last = plan.steps if stop_at is None else min(stop_at, plan.steps)
    saved, told = time.monotonic(), time.monotonic()
    losses: list[float] = []
    while step < last:
        set_rates(optims, plan, step)
        loss = loss_at(step)
        loss.backward()  # type: ignore[no-untyped-call]
        for optim in optims:
            optim.step()
            optim.zero_grad()
        step += 1
        update_average(average, model, step)
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            now = time.monotonic()
            rate, mean = len(losses) * plan.batch / (now - told), sum(losses) / len(losses)
            print(f"step {step}/{plan.steps} loss {mean:.4f} {rate:.1f}/s", flush=True)
            told, losses = now, []
        if time.monotonic() - saved > SAVE_EVERY_S or step == last:
            save(state_file, model, optims, average, step)
            saved = time.monotonic()
        if on_step:
            on_step(step, average)
    return average


def streams(seed: int, stage: int, step: int) -> Randomness:
    """Random streams of one step: of NumPy for choices, of torch for noise."""
    key = np.random.SeedSequence([seed, stage, step])
    noise = torch.Generator().manual_seed(int(key.generate_state(1)[0]))
    return np.random.default_rng(key), noise


def set_rates(optims: list[torch.optim.Optimizer], plan: Plan, step: int) -> None:
    """Short warm-up, then linear decay to zero at the plan's end."""
    share = min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / plan.steps)
    for optim, lr in zip(optims, (plan.muon_lr, plan.adam_lr), strict=True):
        for group in optim.param_groups:
            group["lr"] = lr * share


def save(
    path: Path,
    model: nn.Module,
    optims: list[torch.optim.Optimizer],
    average: dict[str, Tensor],
    step: int,
) -> None:
    """Write the whole state beside `path`, then rename: a kill leaves the old one or the new."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "optims": [o.state_dict() for o in optims],
        "average": average,
    }
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def restore(
    path: Path,
    model: nn.Module,
    optims: list[torch.optim.Optimizer],
    average: dict[str, Tensor],
) -> int:
    """Load the state at `path` if there is one; the step it was saved after, else 0."""
    if not path.exists():
        return 0
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    for optim, saved in zip(optims, state["optims"], strict=True):
        optim.load_state_dict(saved)
    for name, value in average.items():
        value.copy_(state["average"][name])
    return int(state["step"])
