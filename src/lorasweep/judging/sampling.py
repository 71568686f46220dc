"""Sample images: what checkpoints draw for fixed prompts and seeds, K checkpoints at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from lorasweep.adapters.pack import Pack, computing_with
from lorasweep.core import rng
from lorasweep.core.settings import Settings, SettingsError, Texts
from lorasweep.models.base_model import BaseModel

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

_OPTIONS = {"n": str, "w": int, "h": int, "d": int, "l": float, "s": int}
"""kohya's options of a prompt line that we understand."""
_MIN_SIDE, _MAX_STEPS = 64, 1000  # as kohya clamps them
_MAX_SIDE = 8192  # pixels; a larger picture is a typing error, and would take all memory
Side = Annotated[int, Field(gt=0, le=_MAX_SIDE)]


@dataclass(frozen=True)
class Prompt:
    """One picture to draw, with everything that decides how it looks."""

    text: str
    negative: str
    width: int
    height: int
    seed: int
    guidance_scale: float
    num_inference_steps: int


@dataclass(frozen=True, kw_only=True)
class Sampling(Settings):
    """Which pictures are drawn of every checkpoint."""

    prompts: Texts
    every_n_epochs: NonNegativeInt
    width: Side | None
    height: Side | None
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)]
    guidance_scale: PositiveFloat
    negative_prompt: str
    seed: int
    scheduler: str
    batch_size: PositiveInt

    def __post_init__(self) -> None:
        for line in self.prompts:
            _parse(line)

    def check(self) -> None:
        """Raise SettingsError unless the sampler exists, before any work."""
        import diffusers

        found = getattr(diffusers, self.scheduler, None)
        if not self.scheduler.endswith("Scheduler") or not _can_sample(found):
            raise SettingsError(
                f"sampling.scheduler={self.scheduler}: diffusers has no such scheduler; give e.g."
                " DDIMScheduler, EulerDiscreteScheduler or DPMSolverMultistepScheduler"
            )

    def due(self, epoch: int) -> bool:
        """Are pictures drawn after this epoch? The bare base, epoch 0, is always drawn."""
        return self.every_n_epochs > 0 and epoch % self.every_n_epochs == 0

    def resolve(self, size: tuple[int, int], multiple: int) -> list[Prompt]:
        """The prompts with all options filled in; sides are cut to the model's `multiple`."""
        prompts = []
        for number, line in enumerate(self.prompts):
            text, options = _parse(line)
            width = int(options.get("w", self.width or size[0]))
            height = int(options.get("h", self.height or size[1]))
            prompts.append(
                Prompt(
                    text=text,
                    negative=str(options.get("n", self.negative_prompt)),
                    width=max(_MIN_SIDE, width // multiple * multiple),
                    height=max(_MIN_SIDE, height // multiple * multiple),
                    seed=int(options.get("d", self.seed + number)),
                    guidance_scale=float(options.get("l", self.guidance_scale)),
                    num_inference_steps=min(
                        max(1, int(options.get("s", self.num_inference_steps))), _MAX_STEPS
                    ),
                )
            )
        return prompts


def _can_sample(scheduler: Any) -> bool:
    """Does the class take a prediction a step, as samplers of text to image do?"""
    step = getattr(scheduler, "step", None)
    needed = {"self", "model_output", "timestep", "sample"}
    if step is None:
        return False
    parameters = signature(step).parameters.values()
    return {one.name for one in parameters if one.default is one.empty} == needed


def render(
    base: BaseModel, pack: Pack | None, prompts: Sequence[Prompt], settings: Sampling
) -> list[list[Image.Image]]:
    """Pictures by run and prompt; without a pack those of the bare base, as one run.

    Classifier-free guidance (arXiv 2207.12598); the starting noise is the prompt's seed's alone, so
    pictures compare across runs and epochs.
    """
    num_runs = 1 if pack is None else len(pack)
    pictures: dict[int, list[Image.Image]] = {}
    shapes = [(one.width, one.height, one.num_inference_steps) for one in prompts]
    for numbers in equal_batches(shapes, max(1, settings.batch_size // num_runs)):
        latents = _denoise(base, pack, [prompts[number] for number in numbers], settings.scheduler)
        images = [base.decode_latents(of_run) for of_run in latents]
        pictures.update({n: [row[i] for row in images] for i, n in enumerate(numbers)})
    return [[pictures[number][run] for number in sorted(pictures)] for run in range(num_runs)]


def equal_batches(shapes: Sequence[tuple[int, ...]], size: int) -> Iterator[list[int]]:
    """Indices of what can be computed together: at most `size` of one shape."""
    in_order = sorted(range(len(shapes)), key=shapes.__getitem__)
    for _, members in groupby(in_order, key=shapes.__getitem__):
        numbers = list(members)
        yield from (numbers[i : i + size] for i in range(0, len(numbers), size))


def _denoise(
    base: BaseModel, pack: Pack | None, prompts: Sequence[Prompt], scheduler_name: str
) -> Tensor:
    """Latents (K, P, C, h, w) of P prompts of one shape."""
    import torch

    num_runs, num_prompts = 1 if pack is None else len(pack), len(prompts)
    scheduler = base.noise_schedule.sampler(scheduler_name)
    scheduler.set_timesteps(prompts[0].num_inference_steps, device=base.device)
    # samplers that add noise draw it from each picture's own stream
    draws = [rng.generator(prompt.seed, "sampler") for _ in range(num_runs) for prompt in prompts]
    extra = {"generator": draws} if "generator" in signature(scheduler.step).parameters else {}
    texts = [prompt.negative for prompt in prompts] + [prompt.text for prompt in prompts]
    guidance = torch.tensor([p.guidance_scale for p in prompts], device=base.device)
    start = torch.stack([noise(base, prompt) for prompt in prompts])
    latents = (start * scheduler.init_noise_sigma).to(base.device).repeat(num_runs, 1, 1, 1)
    with torch.no_grad(), computing_with(pack), base.autocast():
        conditioning = base.encode_prompt(texts * num_runs)
        for timestep in scheduler.timesteps:
            rows = latents.unflatten(0, (num_runs, num_prompts)).repeat(1, 2, 1, 1, 1).flatten(0, 1)
            rows = scheduler.scale_model_input(rows, timestep)
            prediction = base.predict(rows, timestep.expand(len(rows)), conditioning).float()
            without, with_text = prediction.unflatten(0, (num_runs, 2, -1)).unbind(1)
            guided = without + guidance[:, None, None, None] * (with_text - without)
            latents = scheduler.step(guided.flatten(0, 1), timestep, latents, **extra).prev_sample
    return latents.unflatten(0, (num_runs, num_prompts))


def noise(base: BaseModel, prompt: Prompt) -> Tensor:
    """The latents (C, h, w) that a prompt's picture starts from: its seed's alone."""
    import torch

    factor = base.vae_scale_factor
    shape = (base.latent_channels, prompt.height // factor, prompt.width // factor)
    return torch.randn(shape, generator=rng.generator(prompt.seed, "sample"))


def _parse(line: str) -> tuple[str, dict[str, str | int | float]]:
    """A prompt line in kohya's syntax: `text --n negative --w 512 --d 7 --l 7.5 --s 30`."""
    text, *parts = re.split(r"\s--(?=[a-zA-Z])", f" {line}")
    options: dict[str, str | int | float] = {}
    for part in parts:
        name, _, value = part.partition(" ")
        kind = _OPTIONS.get(name.lower())
        if kind is None:
            raise SettingsError(
                f"sampling.prompts: --{name} in {line!r} is not understood; use --n negative,"
                " --w width, --h height, --d seed, --l guidance, --s steps"
            )
        try:
            options[name.lower()] = kind(value.strip())
        except ValueError:
            raise SettingsError(f"sampling.prompts: --{name} in {line!r} wants a number") from None
        if name.lower() in ("w", "h") and int(options[name.lower()]) > _MAX_SIDE:
            raise SettingsError(
                f"sampling.prompts: --{name} in {line!r} is more than {_MAX_SIDE} pixels"
            )
    return text.strip(), options
