"""Noises, losses and their weights are those of kohya's own code.

recorded/kohya_losses.json holds what sd-scripts answered (commit 48d368f, February 2026) for waves
that are made here again, with the same draws.
"""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import FEW
from lorasweep.core.settings import SettingsError
from lorasweep.models.noise_schedule import NoiseSchedule
from lorasweep.training import training_noise
from lorasweep.training.native_trainer import NativeTraining
from lorasweep.training.training_loss import TrainingLoss
from lorasweep.training.training_noise import TrainingNoise
from small_training import load, train

KOHYA = json.loads((Path(__file__).parents[1] / "recorded" / "kohya_losses.json").read_text())
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def wave(*shape, step):
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float32) * step).view(shape)


@pytest.fixture
def kohyas_draws(monkeypatch):
    """kohya draws from the generators of the process, begun at the run's seed."""

    class Draws:
        generator = staticmethod(lambda *_: torch.Generator().manual_seed(7))
        python_random = staticmethod(lambda *_: random.Random(7))

    monkeypatch.setattr(training_noise, "rng", Draws)


def name_of(case):
    return (
        ",".join(f"{key}={value}" for key, value in case.get("settings", case).items()) or "plain"
    )


@pytest.mark.parametrize("case", KOHYA["noises"], ids=name_of)
def test_noise_is_kohyas(case, kohyas_draws):
    latents = wave(2, 4, 8, 12, step=0.37) + 0.2
    drawn = TrainingNoise(**{"noise_offset": 0, **case["settings"]}).draw(0, 0, latents, 1000)
    noisy = NoiseSchedule(SCHEDULE).add_noise(latents, drawn.on_input, torch.tensor([40, 700]))
    assert drawn.target.flatten()[::47].tolist() == pytest.approx(case["noise"], abs=2e-5)
    assert noisy.flatten()[::47].tolist() == pytest.approx(case["noisy"], abs=2e-5)


@pytest.mark.parametrize("case", KOHYA["timesteps"], ids=name_of)
def test_timesteps_are_drawn_from_kohyas_range(case, kohyas_draws):
    limits = {"min_timestep": case["min"], "max_timestep": case["max"]}
    drawn = TrainingNoise(noise_offset=0, **limits).draw(0, 0, torch.zeros(6, 4, 2, 2), 1000)
    assert drawn.timesteps.tolist() == case["drawn"]


@pytest.mark.parametrize("case", KOHYA["losses"], ids=name_of)
def test_losses_are_kohyas(case):
    kind = "v_prediction" if case["v_prediction"] else "epsilon"
    schedule = NoiseSchedule({**SCHEDULE, "prediction_type": kind})
    loss = TrainingLoss(**{"min_snr_gamma": None, **case["settings"]})
    loss.check_schedule(schedule)
    prediction, target = wave(5, 4, 4, 6, step=0.11), wave(5, 4, 4, 6, step=0.23) * 1.5
    times = torch.tensor([0, 3, 250, 700, 999])
    errors = loss.errors(prediction, target, times, schedule).mean(dim=(1, 2, 3))
    losses = loss.weighted(errors, times, schedule)
    assert losses.tolist() == pytest.approx(case["losses"], rel=1e-4)


def test_a_schedule_is_ended_in_noise_as_kohya_does(make_run, base):
    model = replace(make_run("model.zero_terminal_snr=true").model, prediction_type="epsilon")
    schedule = model.load().noise_schedule
    assert schedule.is_zero_terminal_snr and schedule.config["timestep_spacing"] == "trailing"
    plain = make_run("model.zero_terminal_snr=false").model.load().noise_schedule
    assert not plain.is_zero_terminal_snr
    usual = NoiseSchedule({**SCHEDULE, "rescale_betas_zero_snr": True}).scheduler.alphas_cumprod
    for timestep, alpha in KOHYA["zero_terminal_snr"].items():
        assert float(usual[int(timestep)]) == pytest.approx(alpha, rel=1e-3, abs=1e-12)


MIXED = [
    ("trainer.loss_type=huber", "trainer.noise_offset=0.1", "trainer.adaptive_noise_scale=0.1"),
    ("trainer.multires_noise_iterations=6", "trainer.debiased_estimation_loss=true"),
    ("trainer.ip_noise_gamma=0.1", "trainer.min_timestep=200", "trainer.loss_type=l1"),
    ("trainer.scale_v_pred_loss_like_noise_pred=true",),
]


def test_runs_of_several_losses_and_noises_train_in_a_pack_as_alone(make_run, base):
    short = (FEW, "adapter.rank=2", "trainer.max_train_epochs=1", "trainer.batch_size=6")
    runs = [make_run(*short, *own, number=number) for number, own in enumerate(MIXED)]
    data = load(runs[0], base)
    losses, _, failures = train(base, data, *runs)
    assert not failures and len({tuple(one) for one in losses.values()}) == len(runs)
    for run in runs:
        assert train(base, data, run)[0][run.name] == pytest.approx(losses[run.name], rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("trainer.min_timestep=500 trainer.max_timestep=500", "trainer.min_timestep=500: give"),
        ("trainer.adaptive_noise_scale=0.1", "trainer.noise_offset, which is 0"),
        ("trainer.huber_c=0.2", "trainer.huber_c has no effect without trainer.loss_type=huber"),
        ("trainer.max_timestep=1001", "trainer.max_timestep=1001: must be less than"),
        ("trainer.multires_noise_discount=0.5", "without trainer.multires_noise_iterations"),
    ],
)
def test_what_would_do_nothing_is_refused(overrides, says, make_run):
    with pytest.raises(SettingsError, match=says):
        make_run(*overrides.split())


def test_weights_that_the_model_has_no_use_for_are_refused(make_run, base):
    ends_in_noise = NoiseSchedule({**base.noise_schedule.config, "prediction_type": "epsilon"})
    of_noise = replace(base, noise_schedule=ends_in_noise)
    for override, where, says in (
        ("v_pred_like_loss=0.5", base, "for models that predict the noise"),
        ("scale_v_pred_loss_like_noise_pred=true", of_noise, "for models of v_prediction"),
        ("debiased_estimation_loss=true", of_noise, "divides by the signal"),
    ):
        run = make_run(f"trainer.{override}")
        with pytest.raises(SettingsError, match=says):
            NativeTraining(run.trainer, where, [run], load(run, base))
