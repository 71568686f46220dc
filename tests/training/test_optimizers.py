"""Optimisers of other packages: what is saved, what is logged, and which can't be used."""

import json
import math
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from conftest import FEW, options
from lorasweep.core.settings import SettingsError
from lorasweep.lora_files import checkpoint
from lorasweep.training.native_trainer import NativeTraining
from lorasweep.training.network_weights import first_adapters
from lorasweep.training.optimizers import KNOWN_PACKAGES, KOHYAS_NAMES
from small_training import load, relative_difference, tensors, train

ADAFACTOR = "optimizer.type=transformers.optimization.Adafactor"
NO_ADAMW = ("~optimizer.args.fused", "~optimizer.args.weight_decay")


@pytest.fixture
def make_run(make_run):
    return partial(make_run, FEW, "adapter.rank=2", "trainer.max_train_epochs=1")


def trained(base, run):
    """Train a run: its state and pack as they are in the end, its checkpoint, its steps."""
    steps = []
    note = lambda _run, _step, values: steps.append(values)  # noqa: E731
    training = NativeTraining(run.trainer, base, [run], load(run, base), on_step=note)
    pack, (state,) = training.pack.adapters, training.pack.states
    (epoch,) = training
    assert not epoch.failures
    return state, pack, epoch.checkpoints[0], steps


def installed(name):
    """The class of a package, or a skip."""
    module, _, cls = name.rpartition(".")
    return getattr(pytest.importorskip(module), cls)


@pytest.mark.parametrize(
    "name",
    [
        "averaging_optimizer.ScheduleFreeSGD",
        "schedulefree.AdamWScheduleFree",
        "schedulefree.SGDScheduleFree",
        "prodigyplus.ProdigyPlusScheduleFree",
    ],
)
def test_of_a_schedule_free_optimizer_the_weights_of_eval_are_saved(name, make_run, base):
    installed(name)
    rates = ("optimizer.unet_lr=0.1", "optimizer.text_encoder_lr=0.1")
    run = make_run(f"optimizer.type={name}", *NO_ADAMW, *rates)
    run.check()
    state, pack, written, _ = trained(base, run)
    saved = tensors(written)
    training = {key: tensor.clone() for key, tensor in pack.file_tensors(0).items()}
    state.optimizer.eval()
    using = pack.file_tensors(0)
    for key, tensor in using.items():
        torch.testing.assert_close(saved[key], tensor)
    ups = [key for key in saved if "lora_up" in key]
    assert any(not torch.allclose(saved[key], training[key]) for key in ups)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("LBFGS", "wants a closure"),
        ("averaging_optimizer.WantsClosure", "refuses to step"),
    ],
)
def test_optimizers_that_want_a_closure_are_refused_in_a_line(name, says, make_run):
    with pytest.raises(SettingsError, match=f"optimizer.type={name}.*{says}") as caught:
        make_run(f"optimizer.type={name}", *NO_ADAMW).check()
    assert "\n" not in str(caught.value)


def test_adafactor_logs_the_rates_that_it_finds_itself(make_run, base, caplog):
    """Those of the paper (arXiv 1804.04235) with warm-up: a millionth more with each step."""
    args = "+optimizer.args={scale_parameter: false, relative_step: true, warmup_init: true}"
    run = make_run(ADAFACTOR, *NO_ADAMW, args, "lr_scheduler=adafactor")
    assert "only say which parts are trained" in caplog.text
    run.check()
    *_, steps = trained(base, run)
    assert len(steps) == 4
    for part in ("unet", "text_encoder"):
        rates = [values[f"train/lr_{part}"] for values in steps]
        assert rates == pytest.approx([1e-6, 2e-6, 3e-6, 4e-6])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("lr_scheduler=constant",), "lr_scheduler=adafactor"),
        (("lr_scheduler=polynomial",), "lr_scheduler=adafactor"),
        (("lr_scheduler=adafactor", "+optimizer.args.relative_step=false"), "relative_step=true"),
        (
            ("lr_scheduler=adafactor", "optimizer.block_lr_weights={down: 1, mid: 1, up: 0.5}"),
            "block_lr_weights have no effect",
        ),
    ],
)
def test_rates_that_adafactor_would_not_read_are_refused(overrides, says, make_run):
    with pytest.raises(SettingsError, match=says):
        make_run(ADAFACTOR, *NO_ADAMW, *overrides).check()


@pytest.mark.parametrize(
    "name", ["prodigyopt.Prodigy", "dadaptation.DAdaptAdam", "dadaptation.DAdaptLion"]
)
def test_the_effective_rate_of_optimizers_that_find_it_is_logged(name, make_run, base, monkeypatch):
    cls, taken = installed(name), []
    step = cls.step

    def noted(self, closure=None):
        taken.append([group["d"] * group["lr"] for group in self.param_groups])
        return step(self, closure)

    monkeypatch.setattr(cls, "step", noted)
    rates = ("optimizer.unet_lr=1", "optimizer.text_encoder_lr=1")
    run = make_run(f"optimizer.type={name}", *NO_ADAMW, *rates, "lr_scheduler=cosine")
    *_, steps = trained(base, run)
    for values, (text_encoder, unet) in zip(steps, taken, strict=True):
        assert values["train/lr_unet"] == pytest.approx(unet)
        assert values["train/lr_text_encoder"] == pytest.approx(text_encoder)
    assert steps[-1]["train/lr_unet"] != pytest.approx(1, rel=0.1)


def test_a_step_size_that_was_found_multiplies_the_logged_rate(make_run, base):
    """As in the packages prodigyopt and dadaptation: `d` of each group."""
    run = make_run("optimizer=sgd", "optimizer.unet_lr=0.5")
    training = NativeTraining(run.trainer, base, [run], load(run, base))
    (state,) = training.pack.states
    for group in state.optimizer.param_groups:
        group["d"] = 0.25
    assert state.rates()["train/lr_unet"] == 0.125


HALF = "{down:0.5,mid:0.5,up:0.5}"
LORA_PLUS = {
    "loraplus_lr_ratio=4": {"text_encoder_plus": 4e-3, "unet_plus": 8e-3},
    "loraplus_unet_lr_ratio=3": {"unet_plus": 6e-3},
    f"loraplus_lr_ratio=4 loraplus_text_encoder_lr_ratio=2 block_lr_weights={HALF}": {
        "text_encoder_plus": 2e-3,
        "unet_plus_x0.5": 4e-3,
    },
}
"""Settings, and the groups of second factors that sd-scripts (networks/lora.py) made of them."""


@pytest.mark.parametrize("adapter", ["lora", "locon", "dora"])
@pytest.mark.parametrize("settings", LORA_PLUS)
def test_lora_plus_speeds_the_second_factors_as_kohya_does(settings, adapter, make_run, base):
    rates = ("optimizer.text_encoder_lr=1e-3", "optimizer.unet_lr=2e-3")
    options = [f"optimizer.{one}" for one in settings.split()]
    run = make_run(f"adapter={adapter}", *rates, *options)
    pack, _ = first_adapters(base, run)
    views = pack.views(0, run.optimizer.group_of)
    made = run.optimizer.create(
        {name: [torch.nn.Parameter(t) for t in views[name]] for name in views}
    )
    groups = {group["name"]: group for group in made.param_groups}
    plus = {name: group["lr"] for name, group in groups.items() if "plus" in name}
    assert plus == pytest.approx(LORA_PLUS[settings])
    parts = [name.removesuffix("_x0.5") for name in groups]
    assert parts == [name for name in PARTS if name in parts]  # kohya's order
    for name, of_group in views.items():
        part = name.removesuffix("_x0.5").removesuffix("_plus")
        expected = {"plus" in name} if part in run.optimizer.plus_ratios else {True, False}
        assert {_is_up(tensor, pack) for tensor in of_group} == expected
    run.check()


PARTS = ("text_encoder", "text_encoder_plus", "unet", "unet_plus")


def _is_up(tensor, pack):
    """Is it the second factor of a site, by the memory that it shares?"""
    stacks = [getattr(entry.stack, "inner", entry.stack) for entry in pack.entries]
    return any(tensor.data_ptr() == stack.up.data_ptr() for stack in stacks)


def test_a_run_with_lora_plus_trains_beside_one_without_as_alone(make_run, base):
    runs = [
        make_run("optimizer.loraplus_lr_ratio=16", number=0),
        make_run("optimizer.unet_lr=1e-3", number=1),
    ]
    data = load(runs[0], base)
    losses, last, _ = train(base, data, *runs)
    alone, file, _ = train(base, data, runs[0])
    name = runs[0].name
    assert losses[name] == pytest.approx(alone[name], rel=1e-5)
    assert relative_difference(tensors(last[name]), tensors(file[name])) < 1e-5
    metadata = checkpoint.read_metadata(last[name].path)
    assert json.loads(metadata["ss_network_args"])["loraplus_lr_ratio"] == "16.0"


def test_lora_plus_without_second_factors_is_refused(make_run):
    with pytest.raises(SettingsError, match=r"optimizer\.loraplus_lr_ratio has no effect"):
        make_run("adapter=loha", "optimizer.loraplus_unet_lr_ratio=4")


@pytest.mark.parametrize("option", options("optimizer"))
def test_every_option_trains_and_goes_on_bit_by_bit(option, make_run, base):
    """Those of packages that are not installed say in one line what to install."""
    one_rate = ("optimizer.unet_lr=1e-3", "optimizer.text_encoder_lr=1e-3")  # Prodigy wants one
    run = make_run(f"optimizer={option}", *one_rate, "trainer.batch_size=6")
    package = run.optimizer.dotted_type.partition(".")[0]
    if find_spec(package) is None and "." in run.optimizer.dotted_type:
        with pytest.raises(SettingsError, match=f"pip install {KNOWN_PACKAGES[package]}"):
            run.check()
        return
    if option.startswith("paged") and not torch.cuda.is_available():
        pytest.skip("pages memory of a GPU")
    run.check()
    data, states = load(run, base), []
    for number in range(2):
        own = replace(run, output_dir=run.output_dir / str(number))
        training = NativeTraining(run.trainer, base, [own], data)
        (state,) = training.pack.states
        for step, batch in enumerate(training.batches(state)):
            if number == step == 1:  # gone and come back
                saved = state.snapshot()
                training = NativeTraining(run.trainer, base, [own], data)
                (state,) = training.pack.states
                state.restore(saved)
            (record,) = training.step([[batch]]).values()
            assert math.isfinite(record["train/loss"])
        states.append(state.snapshot().parameters)
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))


def test_kohyas_names_are_taken(make_run):
    ours = make_run().optimizer
    told = {name: replace(ours, type=name) for name in KOHYAS_NAMES}
    assert told["DAdaptLion"].dotted_type == "dadaptation.DAdaptLion"
    assert not [name for name in KOHYAS_NAMES if hasattr(torch.optim, name)]
    for name, optimizer in told.items():
        package = optimizer.dotted_type.partition(".")[0]
        if find_spec(package) is None:
            with pytest.raises(SettingsError, match=f"pip install {KNOWN_PACKAGES[package]}"):
                optimizer._class()
        else:
            assert optimizer._class().__name__ == name
