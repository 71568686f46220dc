"""Schedules are those that sd-scripts makes of the same options, step by step."""

import logging

import pytest
import torch
from diffusers import optimization as diffusers_schedules
from transformers import optimization as schedules

from lorasweep.core.settings import SettingsError
from lorasweep.training.native_trainer import NativeTraining
from lorasweep.training.optimizers import Optimizer
from small_training import load

STEPS = 40


def rates(scheduler):
    """The rates of all steps, by group."""
    seen = []
    for _ in range(STEPS):
        seen.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return torch.tensor(seen)


def sd_scripts_optimizer(run):
    """It gives the class its learning rate, and each group its own."""
    by_part = {"text_encoder": run.optimizer.text_encoder_lr, "unet": run.optimizer.unet_lr}
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in by_part.values()
    ]
    return torch.optim.AdamW(groups, lr=run.optimizer.unet_lr)


@pytest.mark.parametrize(
    ("overrides", "name", "arguments"),
    [
        (["constant"], "constant", {}),
        (["constant", "warmup=0.25"], "constant_with_warmup", {"num_warmup_steps": 10}),
        (
            ["linear", "warmup=4"],
            "linear",
            {"num_warmup_steps": 4, "num_training_steps": STEPS},
        ),
        (["cosine"], "cosine", {"num_warmup_steps": 0, "num_training_steps": STEPS}),
        (
            ["cosine_with_restarts"],  # sd-scripts' default is 1 cycle
            "cosine_with_restarts",
            {"num_warmup_steps": 0, "num_training_steps": STEPS, "num_cycles": 1},
        ),
        (
            ["cosine_with_restarts", "num_cycles=3"],
            "cosine_with_restarts",
            {"num_warmup_steps": 0, "num_training_steps": STEPS, "num_cycles": 3},
        ),
        (
            ["polynomial", "power=2"],
            "polynomial",
            {"num_warmup_steps": 0, "num_training_steps": STEPS, "power": 2},
        ),
        (
            ["polynomial", "min_lr_ratio=0.2"],
            "polynomial",
            {"num_warmup_steps": 0, "num_training_steps": STEPS, "lr_end": 2e-5},
        ),
        (
            ["cosine_with_min_lr", "min_lr_ratio=0.3", "warmup=5"],
            "cosine_with_min_lr",
            {
                "num_warmup_steps": 5,
                "num_training_steps": STEPS,
                "num_cycles": 1 / 2,
                "min_lr_rate": 0.3,
            },
        ),
        (["inverse_sqrt", "warmup=5"], "inverse_sqrt", {"num_warmup_steps": 5}),
        (
            ["inverse_sqrt", "timescale=3"],
            "inverse_sqrt",
            {"num_warmup_steps": 0, "timescale": 3},
        ),
        (
            ["warmup_stable_decay", "warmup=4", "decay=0.25", "min_lr_ratio=0.1", "num_cycles=3"],
            "warmup_stable_decay",
            {
                "num_warmup_steps": 4,
                "num_stable_steps": 26,
                "num_decay_steps": 10,
                "num_cycles": 3 / 2,
                "min_lr_ratio": 0.1,
            },
        ),
        (
            ["piecewise_constant", 'step_rules="1:10,0.1:20,0.005"'],
            "piecewise_constant",
            {"step_rules": "1:10,0.1:20,0.005"},
        ),
    ],
)
def test_rates_are_those_of_sd_scripts(overrides, name, arguments, make_run):
    """Its get_scheduler_fix calls these functions with these arguments."""
    option, *settings = overrides
    given = ("optimizer.unet_lr=1e-4", "optimizer.text_encoder_lr=5e-5")
    run = make_run(f"lr_scheduler={option}", *given, *(f"lr_scheduler.{one}" for one in settings))
    if name == "piecewise_constant":
        function = diffusers_schedules.get_piecewise_constant_schedule
    else:
        function = schedules.TYPE_TO_SCHEDULER_FUNCTION[schedules.SchedulerType(name)]
    theirs = function(sd_scripts_optimizer(run), **arguments)
    groups = {part: [torch.nn.Parameter(torch.zeros(1))] for part in ("text_encoder", "unet")}
    ours = run.lr_scheduler.create(run.optimizer.create(groups), STEPS)
    torch.testing.assert_close(rates(ours), rates(theirs), rtol=0, atol=0)


def test_polynomial_takes_optimizers_whose_default_rate_is_none(make_run):
    """Adafactor's is; what the schedule ends at is measured by the rate of the run."""
    run = make_run("lr_scheduler=polynomial", "optimizer=sgd")
    adafactor = Optimizer(
        type="transformers.optimization.Adafactor",
        unet_lr=1e-3,
        text_encoder_lr=5e-4,
        block_lr_weights=None,
        max_grad_norm=1.0,
        args={"relative_step": False, "scale_parameter": False},
    )
    seen = rates(run.lr_scheduler.create(adafactor.check(), STEPS))
    assert seen[:, 0].tolist() == pytest.approx(
        [5e-4 * (1 - n / STEPS) for n in range(STEPS)], abs=1e-7
    )


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["cosine_with_min_lr", "min_lr_ratio=null"], "min_lr_ratio is missing"),
        (["cosine_with_min_lr", "min_lr_ratio=1"], "must be less than 1"),
        (["piecewise_constant", "step_rules=fast"], "give FACTOR:STEP"),
        (["piecewise_constant", "warmup=5"], "warmup=5 has no effect on piecewise_constant"),
        (["warmup_stable_decay", "decay=1.5"], "decay=1.5: give a whole number of steps"),
        (["cosine", "num_cycles=2"], "use lr_scheduler=cosine_with_restarts or cosine_with_min_lr"),
    ],
)
def test_what_a_schedule_cannot_be_is_refused(overrides, says, make_run):
    option, *settings = overrides
    with pytest.raises(SettingsError, match=says):
        make_run(f"lr_scheduler={option}", *(f"lr_scheduler.{one}" for one in settings))


def test_a_warm_up_and_a_decay_longer_than_the_run_are_refused(make_run, base):
    settings = ("lr_scheduler=warmup_stable_decay", "lr_scheduler.warmup=5", "lr_scheduler.decay=5")
    run = make_run(*settings)
    with pytest.raises(SettingsError, match="take 5 and 5 steps, and the run has 8"):
        NativeTraining(run.trainer, base, [run], load(run, base))


@pytest.mark.parametrize(("warmup", "is_warned"), [(8, True), (500, True), (7, False)])
def test_a_warm_up_as_long_as_the_run_is_warned_of_with_both_numbers(
    warmup, is_warned, make_run, base, caplog
):
    run = make_run(f"lr_scheduler.warmup={warmup}")
    with caplog.at_level(logging.WARNING):
        NativeTraining(run.trainer, base, [run], load(run, base))
    said = f"lr_scheduler.warmup={warmup} steps, and demo trains 8 in all"
    assert (said in caplog.text) == is_warned
