"""Optimisers of other packages: what is saved, what is logged, and which can't be used."""

from functools import partial

import pytest
import torch

from conftest import FEW
from lorasweep.core.settings import SettingsError
from lorasweep.training.native_trainer import NativeTraining
from small_training import load, tensors

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
