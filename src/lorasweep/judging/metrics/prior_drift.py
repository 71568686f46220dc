"""val/prior_drift: how far predictions have moved on prompts that the training has nothing to say
about. Small is good: what the base knows is still there (prior preservation, arXiv 2208.12242)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, PositiveInt

from lorasweep.adapters.pack import Pack, computing_with
from lorasweep.core import rng
from lorasweep.core.settings import Settings, SettingsError, Texts
from lorasweep.judging.metrics.metric import Images, Scored, Scorer, Scores
from lorasweep.models.base_model import BaseModel


@dataclass(frozen=True, kw_only=True)
class PriorDrift(Settings):
    """Mean squared distance to the base's predictions on points of its own denoising."""

    prompts: Texts
    num_timesteps: Annotated[int, Field(gt=0, le=1000)]
    seed: int
    batch_size: PositiveInt

    def __post_init__(self) -> None:
        if not self.prompts:
            raise SettingsError("metrics.prior_drift.prompts is empty: give at least one prompt")

    def names(self, arms: Collection[str], num_holdout: int) -> Mapping[str, bool]:
        """One score, of all prompts."""
        return {"val/prior_drift": False}

    def prepare(self, base: BaseModel, images: Images) -> Scorer | None:
        """Let the base denoise each prompt and keep what it met and predicted on the way."""
        return Drift(self, base, images.train[0].latents.shape)


class Drift:
    def __init__(self, settings: PriorDrift, base: BaseModel, shape: Sequence[int]) -> None:
        """DDIM from noise: latents of the base's own making fit every timestep and prompt."""
        import torch

        self.settings, self.base = settings, base
        prompts = settings.prompts
        scheduler = base.noise_schedule.sampler("DDIMScheduler")
        scheduler.set_timesteps(settings.num_timesteps, device=base.device)
        draws = [rng.generator(settings.seed, "drift", n) for n in range(len(prompts))]
        latents = torch.stack([torch.randn(*shape, generator=draw) for draw in draws])
        latents = latents.to(base.device) * scheduler.init_noise_sigma
        met, predicted = [], []
        with torch.no_grad(), base.autocast():
            conditioning = base.encode_prompt(prompts)
            for timestep in scheduler.timesteps:
                rows = timestep.expand(len(prompts))
                prediction = base.predict(latents, rows, conditioning).float()
                met.append(latents)
                predicted.append(prediction)
                latents = scheduler.step(prediction, timestep, latents).prev_sample
        self.drawn = latents
        self.latents, self.predictions = torch.cat(met), torch.cat(predicted)  # (T * P, C, h, w)
        self.timesteps = scheduler.timesteps.repeat_interleave(len(prompts))
        self.prompts = list(range(len(prompts))) * len(met)

    def baseline(self) -> Scores:
        return {"val/prior_drift": 0.0}

    def score(self, pack: Pack) -> list[Scored]:
        import torch

        base, num_runs = self.base, len(pack)
        rows = max(1, self.settings.batch_size // num_runs)
        distances = []
        with torch.no_grad(), computing_with(pack), base.autocast():
            num_prompts = len(self.settings.prompts)
            conditioning = base.encode_prompt(list(self.settings.prompts) * num_runs)
            for start in range(0, len(self.latents), rows):
                part = slice(start, start + rows)
                latents = self.latents[part].repeat(num_runs, 1, 1, 1)
                timesteps = self.timesteps[part].repeat(num_runs)
                told = conditioning[
                    [run * num_prompts + n for run in range(num_runs) for n in self.prompts[part]]
                ]
                prediction = base.predict(latents, timesteps, told).float()
                before = self.predictions[part].repeat(num_runs, 1, 1, 1)
                squared = (prediction - before).square().mean((1, 2, 3))
                distances.append(squared.view(num_runs, -1).cpu())
        means = torch.cat(distances, dim=1).mean(dim=1).tolist()
        return [Scored({"val/prior_drift": mean}) for mean in means]
