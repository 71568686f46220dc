"""States: a training that was broken off goes on bit by bit as if it had not been."""

import hashlib
import logging
from dataclasses import replace
from functools import partial

import pytest
import torch

from conftest import FEW, options
from lorasweep.lora_files import checkpoint
from lorasweep.training import saved_states, training_state
from lorasweep.training.native_trainer import NativeTraining
from lorasweep.training.saved_states import StateError
from lorasweep.training.training_run import Stopped
from small_training import Losses, half_of, load

EPOCHS = 2
KERNELS = FEW.replace("[", "[unet.*.resnets.0.conv?,")
ADAPTERS = [name for name in options("adapter") if name != "lycoris"]


@pytest.fixture
def make_run(make_run):
    return partial(make_run, FEW)


@pytest.fixture
def data(make_run, base):
    return load(make_run(), base)


@pytest.fixture
def half(data):
    """Half of the images: two steps an epoch."""
    return half_of(data)


def train(base, data, runs, stop_at=None, resume=False):
    """Train, or go on; `stop_at` steps ask for an end. What was logged, by run and step."""
    found = saved_states.together({run.name: run.output_dir for run in runs}) if resume else {}
    told = Losses()
    training = NativeTraining(runs[0].trainer, base, [], data, on_step=told.note)
    for run in runs:
        training.join(run, found.get(run.name))
    logged = {name: losses(state.snapshot.records) for name, state in found.items()}
    take_step = NativeTraining.step

    def step(self, group):
        records = take_step(self, group)
        if stop_at is not None and self.pack.states[0].num_steps == stop_at:
            self.stop()
        return records

    training.step = step.__get__(training)
    try:
        for _ in training:
            pass
    except Stopped:
        assert stop_at is not None
    for name, steps in told.by_step.items():
        logged.setdefault(name, {}).update(steps)
    return logged


def losses(steps):
    return {number: values["train/loss"] for number, values in steps}


def weights(run):
    """The bytes of every checkpoint's tensors."""
    paths = sorted(run.output_dir.glob("*.safetensors"))
    return {path.name: checkpoint.data_hash(path) for path in paths}


def packs(make_run, *overrides):
    """The same pack of three different runs, twice."""
    each = ["adapter.rank=4", "adapter.rank=8", "adapter.rank=2"]
    more = [("seed=1",), ("seed=2", "lr_scheduler=cosine"), ("seed=3", "trainer.noise_offset=0.1")]
    several = [
        [
            make_run(rank, *own, f"trainer.max_train_epochs={EPOCHS}", *overrides, number=n)
            for n, (rank, own) in enumerate(zip(each, more, strict=True))
        ]
        for _ in range(2)
    ]
    unbroken, broken = several
    return unbroken, [replace(run, output_dir=run.output_dir / "broken") for run in broken]


def test_a_pack_goes_on_bit_by_bit_from_any_step(make_run, base, half):
    """Broken off in an epoch, at its end, and in the next: each time it goes on from there."""
    unbroken, broken = packs(make_run, "dataset.flip_aug=true", "dataset.shuffle_caption=true")
    expected = train(base, half, unbroken)
    logged = {run.name: {} for run in broken}
    for stop_at in (1, 2, 3, None):
        for name, steps in train(base, half, broken, stop_at, resume=stop_at != 1).items():
            logged[name] |= steps
    for before, after in zip(unbroken, broken, strict=True):
        assert weights(before) == weights(after)
        assert logged[after.name] == expected[before.name]


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_goes_on_bit_by_bit(name, make_run, base, half):
    targets = [] if name == "lora" else [KERNELS]
    run = make_run(f"adapter={name}", "trainer.max_train_epochs=1", *targets)
    other = replace(run, output_dir=run.output_dir / "broken")
    train(base, half, [run])
    train(base, half, [other], stop_at=1)
    train(base, half, [other], resume=True)
    assert weights(run) == weights(other)


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter.init=pissa"],
        ["adapter.network_dropout=0.3", "adapter.rank_dropout=0.2"],
        ["optimizer=sgd", "lr_scheduler=cosine_with_restarts"],
        [
            "optimizer=sgd",
            "optimizer.type=averaging_optimizer.ScheduleFreeSGD",
            "~optimizer.args.momentum",
            "lr_scheduler=warmup_stable_decay",
        ],
        [
            "trainer.precision=bf16",
            "trainer.gradient_accumulation_steps=2",
            "trainer.max_train_epochs=2",
        ],
        ["optimizer.text_encoder_lr=0", "trainer.noise_offset=0.1", "trainer.min_snr_gamma=5"],
    ],
)
def test_settings_that_carry_state_go_on_bit_by_bit(overrides, make_run, base, data):
    run = make_run("trainer.max_train_epochs=1", *overrides)
    other = replace(run, output_dir=run.output_dir / "broken")
    train(base, data, [run])
    train(base, data, [other], stop_at=1)
    train(base, data, [other], stop_at=3, resume=True)
    train(base, data, [other], resume=True)
    assert weights(run) == weights(other)


@pytest.mark.parametrize("base", ["sdxl"], indirect=True)
def test_sdxl_goes_on_bit_by_bit(make_run, base, data):
    rates = "optimizer.text_encoder_lr=[1e-3,2e-3]"
    targets = "adapter.targets=[unet.*.attn2.*,text_encoder*.q_proj]"
    model = f"model.path={base.settings.path}"
    run = make_run(model, "trainer.max_train_steps=2", rates, targets, "dataset.flip_aug=true")
    other = replace(run, output_dir=run.output_dir / "broken")
    train(base, data, [run])
    train(base, data, [other], stop_at=1)
    train(base, data, [other], resume=True)
    assert weights(run) == weights(other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_pack_goes_on_bit_by_bit_on_cuda_too(precision, make_run):
    unbroken, broken = packs(
        make_run,
        "trainer.device=cuda",
        "trainer.deterministic=true",
        f"trainer.precision={precision}",
    )
    base = unbroken[0].model.load("cuda", precision)
    data = load(unbroken[0], base)
    train(base, data, unbroken)
    train(base, data, broken, stop_at=5)
    train(base, data, broken, resume=True)
    assert [weights(run) for run in unbroken] == [weights(run) for run in broken]


def test_states_are_bounded_and_written_within_epochs_too(make_run, base, data):
    run = make_run("trainer.save_every_n_steps=1", "trainer.keep_states=3")
    train(base, data, [run], stop_at=7)
    kept = sorted(path.stem for path in saved_states.folder_of(run.output_dir).glob("*.state"))
    assert kept == ["00000005", "00000006", "00000007"]


def test_without_states_nothing_is_written(make_run, base, data):
    run = make_run("trainer.keep_states=0")
    train(base, data, [run])
    assert not saved_states.folder_of(run.output_dir).exists()


def test_a_damaged_state_is_passed_over_for_the_one_before(make_run, base, half, caplog):
    unbroken, broken = packs(make_run)
    train(base, half, unbroken)
    train(base, half, broken, stop_at=4)
    path = saved_states.path_of(broken[0].output_dir, 4)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damaged in (flipped, b"", whole[: len(whole) // 2]):
        caplog.clear()
        path.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            found = saved_states.together({run.name: run.output_dir for run in broken})
        assert "is torn or was changed" in caplog.text
        # of all runs of the pack, for they round together
        assert {state.snapshot.num_steps for state in found.values()} == {2}
    train(base, half, broken, resume=True)
    assert [weights(run) for run in unbroken] == [weights(run) for run in broken]


def state_of(run, step, pack, folder):
    snapshot = training_state.Snapshot(
        parameters=[torch.ones(2)],
        optimizer={"state": {0: {"step": torch.tensor(3.0), "flag": None}}, "groups": [(0.9, 1)]},
        lr_scheduler={"last": 1.5},
        scaler={},
        num_epochs=step,
        num_batches=0,
        num_steps=step,
        num_micro_steps=step,
        records=((step, {"train/loss": float("nan")}),),
    )
    state = saved_states.SavedState(run=run, pack=pack, started=1.0, snapshot=snapshot)
    folder.mkdir(exist_ok=True)
    saved_states.write(folder, state)


def test_a_late_joiner_begins_anew_when_its_pack_falls_back_to_before_it_came(tmp_path):
    early, late = (("a", 3, 3), ("b", 3, 3)), (("a", 4, 4), ("b", 4, 4), ("c", 1, 1))
    for run in "ab":
        state_of(run, 3, early, tmp_path / run)
        state_of(run, 4, late, tmp_path / run)
    state_of("c", 1, late, tmp_path / "c")
    places = {run: tmp_path / run for run in "abc"}
    assert {r: s.snapshot.num_steps for r, s in saved_states.together(places).items()} == {
        "a": 4,
        "b": 4,
        "c": 1,
    }
    saved_states.path_of(tmp_path / "a", 4).write_bytes(b"torn")
    assert {r: s.snapshot.num_steps for r, s in saved_states.together(places).items()} == {
        "a": 3,
        "b": 3,
    }


def test_packs_that_trained_apart_go_on_each_from_its_last_moment(tmp_path):
    state_of("a", 3, (("a", 3, 3),), tmp_path / "a")
    state_of("b", 5, (("b", 5, 5),), tmp_path / "b")
    found = saved_states.together({run: tmp_path / run for run in "ab"})
    assert {run: state.snapshot.num_steps for run, state in found.items()} == {"a": 3, "b": 5}


def test_a_state_comes_back_as_it_was(tmp_path):
    state_of("a", 3, (("a", 3, 3),), tmp_path)
    path = saved_states.path_of(tmp_path, 3)
    found = saved_states.read(path)
    assert found.pack == (("a", 3, 3),)
    assert found.snapshot.optimizer["groups"] == [(0.9, 1)]
    assert found.snapshot.optimizer["state"][0]["flag"] is None
    assert torch.equal(found.snapshot.optimizer["state"][0]["step"], torch.tensor(3.0))
    content = path.read_bytes()
    assert content[:32] == hashlib.sha256(content[32:]).digest()
    path.write_bytes(content[:-1])
    with pytest.raises(StateError, match="torn"):
        saved_states.read(path)


def test_runs_within_an_epoch_end_it_before_the_others_go_on_with_them(make_run, base, half):
    """Two runs that were stopped at different steps: each trains on, to rounding as if alone."""
    unbroken, broken = packs(make_run)
    train(base, half, unbroken)
    train(base, half, broken[:1], stop_at=1)
    train(base, half, broken[1:], stop_at=3)
    train(base, half, broken, resume=True)
    for before, after in zip(unbroken, broken, strict=True):
        assert list(weights(before)) == list(weights(after))
        last = max(weights(before))
        a, b = (checkpoint.read(run.output_dir / last)[0] for run in (before, after))
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=5e-5)  # rounding of packs
