"""kohya's sd-scripts as trainer: what it is told, what becomes of its epochs, and its ends.

A stand-in with its interface trains here. The tests that take `checkout` run with the real one too
where LORASWEEP_SD_SCRIPTS names a checkout, and LORASWEEP_SD_SCRIPTS_PYTHON its Python.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.torch import save_file

import narrow_sd15
import sd_scripts_stand_in as stand_in
from adapter_packs import trained
from conftest import SMALL, options
from lorasweep.adapters.pack import Pack
from lorasweep.cli import main
from lorasweep.core.settings import SettingsError, build
from lorasweep.data.latents import Item
from lorasweep.lora_files import checkpoint as lora_file
from lorasweep.models.noise_schedule import NoiseSchedule
from lorasweep.runs import session
from lorasweep.runs.prepare import encoded_images, write_folders
from lorasweep.runs.session import run_pack
from lorasweep.training import saved_states, sd_scripts_guard
from lorasweep.training.native_trainer import NativeTraining
from lorasweep.training.pack_loss import PackLoss
from lorasweep.training.sd_scripts_config import (
    Start,
    check_base,
    dataset_config,
    kohya_settings,
    text_of,
)
from lorasweep.training.sd_scripts_trainer import SdScriptsTraining, files_of
from lorasweep.training.training_batches import steps_per_epoch
from lorasweep.training.training_noise import DrawnNoise
from lorasweep.training.training_run import Stopped, TrainingData
from renamed_loras import as_peft
from small_training import load

REAL = os.environ.get("LORASWEEP_SD_SCRIPTS")
RECORDED = Path(__file__).parent.parent / "recorded" / "kohya_options.json"
OPTIONS = json.loads(RECORDED.read_text())["options"]
STEPS = 4
"""Of an epoch: 12 rows in batches of 3."""


class Checkout:
    """A folder for trainer.path, and its Python."""

    def __init__(self, path, python):
        self.path = path
        self.overrides = (f"trainer.path={path}", f"trainer.python={python}")

    def plan(self, **amiss):
        stand_in.plan(self.path, **amiss)

    def state_of(self, run):
        """What /proc says of the process that trained a run: T is stopped; "" once it is gone."""
        pid = (self.path / f"{run.name}.pid").read_text()
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return ""

    def is_running(self, run):
        return self.state_of(run) not in ("", "Z")


def soon(holds):
    """Wait until a condition holds; False if it doesn't within seconds."""
    until = time.monotonic() + 10
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return holds()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "narrow"
    narrow_sd15.write_model(folder)
    return folder


@pytest.fixture(scope="module")
def base(model):
    """The narrow base model, loaded."""
    node = {"_target_": "Model", "path": str(model), "revision": None, "config": None}
    more = {"allow_pickle": False, "clip_skip": 1, "prediction_type": None}
    return build({**node, **more}, "model").load()


@pytest.fixture
def make_run(make_run, model):
    """A Run of the narrow model; its number names it."""
    few = ["dataset.resolution=[64,64]", "adapter.rank=2", "sampling.prompts=[a fox]"]
    return partial(make_run, "trainer=sd_scripts", f"model.path={model}", *few)


@pytest.fixture
def stood_in(tmp_path, make_run, base):
    """The stand-in."""
    path = tmp_path / "checkout"
    run = make_run(f"trainer.path={make_script(tmp_path)}")
    parts = frozenset({"unet", "text_encoder"})
    tensors = Pack.new(base.parts, [(run.adapter, 0, parts)]).file_tensors(0)
    lora_file.write(tmp_path / "weights.safetensors", tensors, {})
    return Checkout(path, stand_in.write(path, tmp_path / "weights.safetensors"))


@pytest.fixture(params=["stand-in", "real"])
def checkout(request, tmp_path, model):
    """The stand-in, and the real sd-scripts where there is one."""
    if request.param == "stand-in":
        return request.getfixturevalue("stood_in")
    if REAL is None:
        pytest.skip("LORASWEEP_SD_SCRIPTS names no checkout")
    narrow_sd15.write_checkout(tmp_path / "real", Path(REAL), model)
    python = os.environ.get("LORASWEEP_SD_SCRIPTS_PYTHON", sys.executable)
    return Checkout(tmp_path / "real", python)


def make_script(folder):
    """A folder that looks like a checkout."""
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "empty" / "train_network.py").touch()
    return folder / "empty"


class Told(dict):
    """What a training says of its steps, by run and step."""

    def note(self, run, step, values):
        self.setdefault(run, {})[step] = values


def start(base, data, *runs, saved=None):
    """A training of runs, and what it says of its steps."""
    told = Told()
    training = SdScriptsTraining(runs[0].trainer, base, [], data, on_step=told.note)
    for run in runs:
        training.join(run, saved)
    return training, told


def train(base, data, *runs):
    """Train to the end: what it says of its steps, checkpoints, failures by run."""
    training, told = start(base, data, *runs)
    epochs = list(training)
    failures = {name: why for epoch in epochs for name, why in epoch.failures.items()}
    return told, [one for epoch in epochs for one in epoch.checkpoints], failures


def test_each_epoch_gives_a_file_of_our_name_with_kohyas_metadata(checkout, make_run, base):
    run = make_run(*checkout.overrides)
    told, checkpoints, failures = train(base, load(run, base), run)
    assert not failures
    found = [(one.path.name, one.epoch, one.step) for one in checkpoints]
    assert found == [("demo-000001.safetensors", 1, 4), ("demo-000002.safetensors", 2, 8)]
    parts = frozenset({"unet", "text_encoder"})
    ours = Pack.new(base.parts, [(run.adapter, 0, parts)]).file_tensors(0)
    for one in checkpoints:
        tensors, metadata = lora_file.read(one.path)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert shapes == {name: tuple(tensor.shape) for name, tensor in ours.items()}
        assert metadata["ss_steps"] == str(one.step) and metadata["ss_epoch"] == str(one.epoch)
        assert metadata["ss_network_alpha"] == "1.0" and metadata["ss_output_name"] == "demo"
        assert "ss_session_id" in metadata and "lorasweep_version" in metadata
        assert metadata["sshs_model_hash"] == lora_file.data_hash(one.path)
    assert list(told["demo"]) == [*range(1, 9)]
    assert all(0 < values["train/loss"] < 10 for values in told["demo"].values())
    rates = {"train/lr_unet", "train/lr_text_encoder"}
    assert all(rates < set(told["demo"][step]) for step in range(1, 9))
    first = told["demo"][1]  # which sd-scripts doesn't log
    assert (first["train/lr_unet"], first["train/lr_text_encoder"]) == (1e-3, 5e-4)
    left = {path.name for path in (run.output_dir / "sd_scripts").iterdir()}
    assert left == {"accelerate.json", "logs"}


def test_a_run_goes_on_from_the_last_epochs_state(checkout, make_run, base):
    run = make_run(*checkout.overrides, "trainer.max_train_epochs=3", "lr_scheduler=linear")
    data = load(run, base)
    training, _ = start(base, data, run)
    epochs = iter(training)
    next(epochs)
    epochs.close()  # as if it was broken off in the next epoch
    saved = saved_states.together({run.name: run.output_dir})[run.name]
    assert [step for step, _ in saved.snapshot.records] == [1, 2, 3, 4]
    training, told = start(base, data, run, saved=saved)
    checkpoints = [one for epoch in training for one in epoch.checkpoints]
    assert [(one.epoch, one.step) for one in checkpoints] == [(2, 8), (3, 12)]
    assert [*told["demo"]] == [*range(5, 13)]
    last_logged = saved.snapshot.lr_scheduler["train/lr_unet"]  # with step 4, of step 5
    assert last_logged > 0 and told["demo"][5]["train/lr_unet"] == last_logged
    steps = [lora_file.read_metadata(one.path)["ss_steps"] for one in checkpoints]
    assert steps == ["8", "12"]
    told_it = tomllib.loads((run.output_dir / "sd_scripts.toml").read_text())["saving"]
    assert told_it["initial_epoch"] == 2 and told_it["resume"].endswith("demo-000001-state")
    assert not list((run.output_dir / "sd_scripts").glob("*-state"))


def test_a_run_whose_state_is_gone_says_so(stood_in, make_run, base):
    run = make_run(*stood_in.overrides)
    data = load(run, base)
    epochs = iter(start(base, data, run)[0])
    next(epochs)
    epochs.close()
    saved = saved_states.together({run.name: run.output_dir})[run.name]
    state = run.output_dir / "sd_scripts" / "demo-000001-state"
    state.rename(state.with_name("elsewhere"))
    with pytest.raises(SettingsError, match="is gone"):
        start(base, data, run, saved=saved)


def test_modules_that_its_networks_adapt_otherwise_are_named(stood_in, make_run, base, caplog):
    """The stand-in gives the text encoder too, whatever it is told."""
    run = make_run(*stood_in.overrides, "optimizer.text_encoder_lr=0")
    train(base, load(run, base), run)
    (said,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert said.startswith("demo: sd-scripts does also adapt lora_te_text_model_encoder_layers_0")


def test_it_waits_while_an_epoch_is_scored(stood_in, make_run, base):
    run = make_run(*stood_in.overrides)
    stood_in.plan(demo=("hang", 2))
    epochs = iter(start(base, load(run, base), run)[0])
    next(epochs)
    assert soon(lambda: stood_in.state_of(run) == "T")
    epochs.close()
    assert soon(lambda: not stood_in.is_running(run))


AMISS = {
    ("crash", 2): (
        "sd-scripts ended in epoch 2 with exit code 1: ",
        "RuntimeError: the stars are wrong (all of it in ",
    ),
    ("oom", 2): ("out of memory in epoch 2; try trainer.batch_size below 3", stand_in.NO_MEMORY),
    ("torn", 2): ("checkpoint of epoch 2: ",),
    ("short", 1): ("made 3 steps of epoch 1, and its folders hold 4",),
}
"""What goes amiss in which epoch, and what is said of it."""


def test_a_failure_is_that_runs_alone_and_says_why(stood_in, make_run, base):
    first = make_run(*stood_in.overrides, number=1)
    names = [*(kind for kind, _ in AMISS), "good"]
    runs = [replace(first, name=name, output_dir=first.output_dir / name) for name in names]
    stood_in.plan(**dict(zip(names, AMISS, strict=False)))
    _, checkpoints, failures = train(base, load(first, base), *runs)
    assert list(failures) == names[:-1]
    for (name, _), words in AMISS.items():
        assert failures[name].startswith(f"{name}: ")
        assert all(word in failures[name] for word in words), failures[name]
        assert "CalledProcessError" not in failures[name] and "\n" not in failures[name]
    before = [(kind, 1) for kind, epoch in AMISS if epoch == 2]
    assert [(one.run, one.epoch) for one in checkpoints] == [*before, ("good", 1), ("good", 2)]


def test_asked_to_stop_it_ends_the_process_within_an_epoch(stood_in, make_run, base):
    run = make_run(*stood_in.overrides)
    stood_in.plan(demo=("hang", 2))
    training, _ = start(base, load(run, base), run)
    epochs = iter(training)
    next(epochs)
    threading.Timer(0.2, training.stop).start()
    with pytest.raises(Stopped):
        next(epochs)
    assert soon(lambda: not stood_in.is_running(run))


def test_a_dropped_runs_process_is_ended_and_the_next_run_trains(stood_in, make_run, base):
    first, second = (make_run(*stood_in.overrides, number=number) for number in (1, 2))
    training, _ = start(base, load(first, base), first, second)
    epochs = iter(training)
    next(epochs)
    training.drop(first.name)
    assert soon(lambda: not stood_in.is_running(first))
    rest = [(one.run, one.epoch) for epoch in epochs for one in epoch.checkpoints]
    assert rest == [(second.name, 1), (second.name, 2)]
    assert not list(first.output_dir.rglob("*-state"))


def logged_files(run):
    """Of a run, those that go to MLflow, and into which folder there."""
    return json.loads((run.output_dir / "mlflow.json").read_text())["files"]


SWEEP = """\
# @package _global_
defaults:
  - override /hydra/sweeper: optuna
study:
  params:
    optimizer.unet_lr: choice(1e-3)
  sampler: grid
  pruner: patient
  pruner_options: {patience: 1}
  n_trials: 1
"""


def test_the_pruner_of_a_sweep_ends_the_process_with_the_epoch(
    stood_in, tmp_path, cache_dir, model, forked_workers
):
    """The stand-in's epochs score alike, so the second is no better than the first."""
    stood_in.plan(**{"demo-0": ("hang", 3)})
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text(SWEEP)
    places = [f"output_root={tmp_path}/outputs", f"cache_dir={cache_dir}", f"model.path={model}"]
    own = ["dataset.resolution=[64,64]", "adapter.rank=2", "trainer.max_train_epochs=3"]
    own += ["study.min_epochs=1", "trainer=sd_scripts", "sampling.every_n_epochs=0"]
    small = [one for one in SMALL if not one.startswith("sampling.")]
    chosen = [*small, *stood_in.overrides, *places, *own]
    main.main(["sweep", "mine", "--config-dir", str(tmp_path), *chosen])
    (folder,) = (tmp_path / "outputs").glob("demo/*/0")
    files = {path.name for path in folder.rglob("*.safetensors")}
    assert files == {f"demo-0-{epoch:06d}.safetensors" for epoch in (1, 2)}
    assert not stood_in.is_running(SimpleNamespace(name="demo-0"))
    assert not list(folder.rglob("*-state"))


KILLED = """
import sys
from pathlib import Path
from lorasweep.training.sd_scripts_process import SdScriptsProcess
from lorasweep.training.training_run import SdScriptsTrainer
values = dict(batch_size=1, gradient_accumulation_steps=1, precision="fp32", save_dtype="fp32")
values |= dict(gradient_checkpointing=False, device="cpu", keep_states=1, attention="plain")
path, python, toml = map(Path, sys.argv[1:])
trainer = SdScriptsTrainer(**values, path=path, python=python, sample_every_n_epochs=0,
                           sample_prompts=())
with SdScriptsProcess(trainer, "cpu", toml, toml.with_suffix(".log")):
    sys.stdin.read()
"""


def test_kill_9_of_ours_leaves_no_process(stood_in, make_run, base, tmp_path):
    run = make_run(*stood_in.overrides)
    stood_in.plan(demo=("hang", 1))
    begun = Start(output_dir=tmp_path, logging_dir=tmp_path / "logs", num_steps=8, save_state=False)
    toml = tmp_path / "sd_scripts.toml"
    sections = kohya_settings(run.trainer, run, base, load(run, base), begun)
    toml.write_bytes(text_of(sections, "a test"))
    places = [*map(str, (run.trainer.path, run.trainer.python, toml))]
    ours = subprocess.Popen([sys.executable, "-c", KILLED, *places], stdin=subprocess.PIPE)
    assert soon((stood_in.path / "demo.pid").exists)
    assert stood_in.is_running(run)
    ours.send_signal(signal.SIGKILL)
    ours.wait()
    assert soon(lambda: not stood_in.is_running(run))


def test_a_guard_that_is_ended_leaves_nothing_behind(tmp_path):
    file = tmp_path / "pid"
    work = f"import os, time, pathlib; pathlib.Path({str(file)!r}).write_text(f'{{os.getpid()}}.')"
    command = [sys.executable, "-I", sd_scripts_guard.__file__, sys.executable, "-c"]
    guard = subprocess.Popen([*command, f"{work}; time.sleep(60)"], stdin=subprocess.PIPE)
    ends = time.monotonic() + 20
    while not (file.exists() and file.read_text().endswith(".")) and time.monotonic() < ends:
        time.sleep(0.02)
    guard.terminate()
    assert guard.wait(10) == 128 + signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()[:-1]), 0)


def test_epochs_are_scored_and_drawn_and_a_broken_run_goes_on(
    stood_in, make_run, base, monkeypatch
):
    """By the same session as the native trainer's; one run fails, and another is broken off."""
    monkeypatch.setattr(session, "load_base", lambda run, device: base)
    own = ["metrics.validation.max_tuples=3", "trainer.sample_every_n_epochs=1"]
    drawn = [*stood_in.overrides, *own]
    first = make_run(*drawn, number=1)
    runs = [
        replace(first, name=name, output_dir=first.output_dir / name) for name in ("bad", "good")
    ]
    stood_in.plan(bad=("crash", 1), good=("hang", 2))
    reports = run_pack(runs)
    seen = [next(reports) for _ in range(4)]
    assert [(type(one).__name__, one.run) for one in seen] == [
        ("Started", "bad"),
        ("Failure", "bad"),
        ("Started", "good"),
        ("EpochReport", "good"),
    ]
    assert "the stars are wrong" in seen[1].reason and seen[3].scores["val/loss_rel"] > 0
    assert (runs[1].output_dir / "samples" / "good_e000001_00.png").is_file()
    reports.close()
    assert soon(lambda: not stood_in.is_running(runs[1]))
    stood_in.plan()
    again = [(type(one).__name__, getattr(one, "checkpoint", None)) for one in run_pack(runs[1:])]
    epochs = [one.epoch for kind, one in again if kind == "EpochReport"]
    assert epochs == [1, 2] and again[-1][0] == "Finished"
    assert not list(runs[1].output_dir.rglob("*-state"))
    assert not saved_states.together({"good": runs[1].output_dir})  # none without sd-scripts' own
    said = {"sd_scripts.toml": None, "sd_scripts.log": None}
    pictures = [f"sd_scripts/sample/good_e{epoch:06d}_00_20261129.png" for epoch in (1, 2)]
    assert logged_files(runs[0]).items() >= said.items()
    assert (
        logged_files(runs[1]).items()
        >= {
            **said,
            **dict.fromkeys(pictures, "sd_scripts_samples"),
        }.items()
    )


# What it is told


@pytest.fixture
def told(make_run, base, tmp_path):
    """All that sd-scripts is told of a run with these settings, read back from the TOML."""
    script = make_script(tmp_path)

    def settings(*overrides, of_base=base):
        run = make_run(f"trainer.path={script}", *overrides)
        where = {"output_dir": tmp_path / "out", "logging_dir": tmp_path / "logs"}
        begun = Start(**where, num_steps=8, save_state=True)
        path = tmp_path / "train" / "1_wd" / "a.png"
        image = Item(path, "wd", "a cat", 1, (64, 64), None, None, run.dataset)
        data, of_run = TrainingData([image], run.dataset), replace(of_base, settings=run.model)
        text = text_of(kohya_settings(run.trainer, run, of_run, data, begun), "a test").decode()
        flat = {}
        for section in tomllib.loads(text).values():
            assert not flat.keys() & section.keys()
            flat |= section
        return flat

    return settings


SAID = [
    {
        "seed=7": {"seed": 7},
        "trainer.batch_size=5": {"train_batch_size": 5},
        "trainer.gradient_accumulation_steps=2": {"gradient_accumulation_steps": 2},
        "trainer.save_dtype=fp16": {"save_precision": "fp16"},
        "trainer.gradient_checkpointing=true": {"gradient_checkpointing": True},
        "trainer.attention=xformers": {"xformers": True, "sdpa": None},
        "trainer.noise_offset=0.05": {"noise_offset": 0.05},
        "trainer.min_snr_gamma=5": {"min_snr_gamma": 5.0},
        "trainer.loss_type=huber": {"loss_type": "huber"},
        "trainer.huber_schedule=constant": {"huber_schedule": "constant"},
        "trainer.huber_c=0.2": {"huber_c": 0.2},
        "trainer.huber_scale=2": {"huber_scale": 2.0},
        "trainer.debiased_estimation_loss=true": {"debiased_estimation_loss": True},
        "trainer.multires_noise_iterations=6": {"multires_noise_iterations": 6},
        "trainer.multires_noise_discount=0.4": {"multires_noise_discount": 0.4},
        "trainer.ip_noise_gamma=0.1": {"ip_noise_gamma": 0.1},
        "trainer.ip_noise_gamma_random_strength=true": {"ip_noise_gamma_random_strength": True},
        "trainer.adaptive_noise_scale=0.2": {"adaptive_noise_scale": 0.2},
        "trainer.noise_offset_random_strength=true": {"noise_offset_random_strength": True},
        "trainer.min_timestep=100": {"min_timestep": 100},
        "trainer.max_timestep=900": {"max_timestep": 900},
        "trainer.sample_every_n_epochs=3": {"sample_every_n_epochs": 3},
        "model.clip_skip=2": {"clip_skip": 2},
        "model.max_token_length=150": {"max_token_length": 150},
        "model.weighted_captions=true": {"weighted_captions": True},
        "optimizer.unet_lr=3e-4": {"unet_lr": 3e-4, "learning_rate": 3e-4},
        "optimizer.text_encoder_lr=2e-5": {"text_encoder_lr": 2e-5},
        "optimizer.max_grad_norm=0": {"max_grad_norm": 0.0},
        "optimizer.loraplus_lr_ratio=4": {},
        "lr_scheduler=cosine": {"lr_scheduler": "cosine"},
        "lr_scheduler.warmup=0.1": {"lr_warmup_steps": 0.1},
        "adapter.rank=6": {"network_module": "networks.lora", "network_dim": 6},
        "adapter.alpha=2": {"network_alpha": 2.0},
        "adapter.network_dropout=0.1": {"network_dropout": 0.1},
        "adapter.rank_dropout=0.2": {"network_args": ["rank_dropout=0.2", "loraplus_lr_ratio=4.0"]},
        "adapter.scale_weight_norms=1": {"scale_weight_norms": 1.0},
        "dataset.resolution=[64,128]": {"resolution": "64,128", "enable_bucket": False},
        "dataset.flip_aug=true": {"flip_aug": True},
        "dataset.caption_dropout_rate=0.1": {"caption_dropout_rate": 0.1},
        "dataset.caption_dropout_every_n_epochs=2": {"caption_dropout_every_n_epochs": 2},
        "dataset.caption_prefix=sks": {"caption_prefix": "sks", "caption_separator": ","},
        "dataset.caption_suffix=end": {"caption_suffix": "end"},
        "dataset.token_warmup_min=2": {"token_warmup_min": 2},
        "dataset.token_warmup_step=0.5": {"token_warmup_step": 0.5},
        "dataset.keep_tokens_separator='|||'": {"keep_tokens_separator": "|||"},
        "dataset.secondary_separator=';;'": {"secondary_separator": ";;"},
        "dataset.enable_wildcard=true": {"enable_wildcard": True},
        "dataset.prior_loss_weight=0.5": {"prior_loss_weight": 0.5},
    },
    {
        "trainer.v_pred_like_loss=0.5": {"v_pred_like_loss": 0.5, "loss_type": "l2"},
        "trainer.scale_v_pred_loss_like_noise_pred=true": {
            "scale_v_pred_loss_like_noise_pred": True
        },
        "optimizer=lion": {"optimizer_type": "Lion", "optimizer_args": ["weight_decay=0.01"]},
        "optimizer.text_encoder_lr=0": {"network_train_unet_only": True, "text_encoder_lr": None},
        "lr_scheduler.warmup=3": {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3},
        "trainer.precision=bf16": {"mixed_precision": "bf16"},
        "trainer.attention=plain": {"sdpa": None, "xformers": None, "mem_eff_attn": None},
        "dataset.enable_bucket=true": {"enable_bucket": True, "bucket_reso_steps": 64},
        "dataset.min_bucket_reso=64": {"min_bucket_reso": 64},
    },
    {
        "optimizer=sgd": {"optimizer_type": "torch.optim.SGD", "optimizer_args": ["momentum=0.9"]},
        "optimizer.unet_lr=0": {"network_train_text_encoder_only": True, "learning_rate": 5e-4},
        "lr_scheduler=cosine_with_restarts": {"lr_scheduler": "cosine_with_restarts"},
        "lr_scheduler.num_cycles=3": {"lr_scheduler_num_cycles": 3},
    },
    {
        "optimizer=adamw8bit": {},
        "optimizer.type=DAdaptLion": {"optimizer_type": "DAdaptLion"},
        "lr_scheduler=polynomial": {"lr_scheduler": "polynomial", "lr_scheduler_args": None},
        "lr_scheduler.power=2": {"lr_scheduler_power": 2.0},
        "adapter=locon": {"network_module": "networks.lora"},
        "adapter.conv_rank=4": {},
        "adapter.conv_alpha=1": {"network_args": ["conv_dim=4", "conv_alpha=1.0"]},
    },
]
"""Settings of ours, and what sd-scripts is told then."""


@pytest.mark.parametrize("said", SAID)
def test_settings_are_told_in_kohyas_words(said, told):
    settings = told(*said)
    expected = {key: value for one in said.values() for key, value in one.items()}
    assert {key: settings.get(key) for key in expected} == expected
    # sd-scripts takes keys of a TOML that it doesn't know, and says nothing
    assert settings.keys() <= OPTIONS.keys()
    for key, choices in OPTIONS.items():
        assert key not in settings or choices is None or settings[key] in choices


def test_files_that_training_begins_with_are_told(told, tmp_path):
    file = tmp_path / "a b.safetensors"
    file.touch()
    settings = told(f"model.base_weights=['{file}']", f"trainer.network_weights='{file}'")
    assert settings["base_weights"] == [str(file)] and "base_weights_multiplier" not in settings
    assert settings["network_weights"] == str(file) and not settings["dim_from_weights"]


def test_a_file_whose_names_it_does_not_read_is_refused(stood_in, make_run, base, tmp_path):
    """It would train on without a word, and without the file."""
    path = tmp_path / "pefts.safetensors"
    run = make_run(*stood_in.overrides)
    own = trained(base, (run.adapter, 0)).file_tensors(0)
    save_file({name: one.contiguous() for name, one in as_peft(own, base).items()}, path)
    run = make_run(*stood_in.overrides, f"trainer.network_weights={path}")
    with pytest.raises(SettingsError, match="names that sd-scripts doesn't read"):
        start(base, load(run, base), run)


LYCORIS = {"loha": "loha", "lokr": "lokr", "dora": "locon", "lycoris": "glora"}


@pytest.mark.parametrize("adapter", LYCORIS)
def test_lycoris_is_told_its_algorithm(adapter, told):
    settings = told(f"adapter={adapter}", "adapter.rank=2")
    args = dict(one.split("=") for one in settings["network_args"])
    assert settings["network_module"] == "lycoris.kohya"
    assert args["algo"] == LYCORIS[adapter]
    assert ("dora_wd" in args) == (adapter == "dora")


def test_captions_that_are_sentences_keep_their_order(make_run, base, tmp_path):
    run = make_run(f"trainer.path={make_script(tmp_path)}", "dataset.shuffle_caption=true")
    data = load(run, base)
    assert dataset_config(data) is None
    whole = run.dataset.of_sentences()
    items = [replace(item, settings=whole) if item.arm == "kosmos" else item for item in data.items]
    subsets = tomllib.loads(dataset_config(replace(data, items=items)))["datasets"][0]["subsets"]
    shuffled = {Path(one["image_dir"]).name: one.get("shuffle_caption") for one in subsets}
    assert shuffled == {"1_empty": None, "1_wd": None, "1_kosmos": False}  # None: as all are


RANKS = "{down:[2,2,2,2,2,2,2,2,2,2,2,2],mid:2,up:[2,2,2,2,2,2,2,2,2,2,2,2]}"
BUCKETS = "dataset.enable_bucket=true dataset.min_bucket_reso=32"
REFUSED = {
    "adapter.targets=[unet.*]": "adapter.targets",
    "adapter.init=pissa": "adapter.init=pissa",
    f"adapter=locon adapter.targets=full adapter.block_ranks={RANKS}": "adapter.block_ranks",
    "adapter=loha adapter.targets=conv": "adapter.targets=conv",
    "model.allow_pickle=true": "model.allow_pickle",
    f"{BUCKETS} dataset.bucket_reso_steps=32": "dataset.bucket_reso_steps=32",
    "trainer.device=tpu": "trainer.device=tpu",
}


@pytest.mark.parametrize("ours", REFUSED)
def test_what_it_cannot_be_told_is_refused_by_name(ours, make_run, tmp_path):
    with pytest.raises(SettingsError) as error:
        make_run(f"trainer.path={make_script(tmp_path)}", *ours.split())
    assert REFUSED[ours] in str(error.value) and "\n" not in str(error.value)


def test_settings_of_the_native_trainer_alone_are_refused_by_name(make_run, tmp_path):
    for key in ("save_every_n_steps=5", "deterministic=true"):
        with pytest.raises(SettingsError, match=f"trainer.{key.partition('=')[0]}"):
            make_run(f"trainer.path={make_script(tmp_path)}", f"+trainer.{key}")


def test_a_base_that_it_would_compute_otherwise_is_refused(base, tmp_path):
    check_base(base, tmp_path)
    schedule = NoiseSchedule({**base.noise_schedule.config, "beta_end": 0.02})
    with pytest.raises(SettingsError, match=r"noise schedule of beta_end 0\.02"):
        check_base(replace(base, noise_schedule=schedule), tmp_path)


def test_a_base_whose_unet_is_not_of_its_fixed_shape_is_refused_by_name(base, tmp_path):
    (tmp_path / "library").mkdir()
    code = tmp_path / "library" / "original_unet.py"
    code.write_text("IN_CHANNELS = 4\nBLOCK_OUT_CHANNELS: Tuple[int] = (32, 32, 64, 64)\n")
    check_base(base, tmp_path)
    deeper = SimpleNamespace(config={**base.unet.config, "layers_per_block": 3})
    with pytest.raises(SettingsError, match=r"UNet of layers_per_block 3: .* of 2 alone"):
        check_base(replace(base, unet=deeper), tmp_path)
    code.write_text("BLOCK_OUT_CHANNELS: Tuple[int] = (320, 640, 1280, 1280)\n")  # as it is
    with pytest.raises(SettingsError, match=r"block_out_channels 32, 32, 64, 64: .* of 320, 640,"):
        check_base(base, tmp_path)


def test_a_model_of_v_prediction_is_told_as_that(told, base):
    changed = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    schedule = NoiseSchedule({**base.noise_schedule.config, **changed})
    settings = told(of_base=replace(base, noise_schedule=schedule))
    assert settings["v_parameterization"] and settings["zero_terminal_snr"]


def test_no_checkout_and_no_python_are_named(make_run, tmp_path):
    with pytest.raises(SettingsError, match=r"there is no train_network\.py"):
        make_run(f"trainer.path={tmp_path}")
    with pytest.raises(SettingsError, match=r"trainer\.python=.*no such file"):
        make_run(f"trainer.path={make_script(tmp_path)}", "trainer.python=/no/python")


def test_a_package_that_its_python_lacks_is_named_before_anything_starts(stood_in, make_run, base):
    stand_in.write(
        stood_in.path.with_name("bare"), stood_in.path / "weights.safetensors", ["torch"]
    )
    run = make_run(f"trainer.path={stood_in.path.with_name('bare')}", "adapter=loha")
    with pytest.raises(SettingsError, match="lacks accelerate, lycoris-lora, tensorboard;"):
        start(base, load(run, base), run)


def test_an_empty_caption_file_which_it_refuses_is_named(stood_in, make_run, base):
    run = make_run(*stood_in.overrides)
    data = load(run, base)
    caption = data.items[0].path.with_suffix(".txt")
    text = caption.read_text()
    try:
        caption.write_text("")
        with pytest.raises(SettingsError, match="is empty"):
            start(base, data, run)
    finally:
        caption.write_text(text)


@pytest.mark.skipif(REAL is None, reason="LORASWEEP_SD_SCRIPTS names no checkout")
@pytest.mark.parametrize("adapter", options("adapter"))
def test_the_real_one_and_ours_take_the_same_steps_from_the_same_numbers(
    adapter, make_run, base, model, tmp_path, monkeypatch
):
    """Under the same keys too; ours is given the weights, noise, … that the real one drew."""
    import torch

    narrow_sd15.write_checkout(tmp_path / "real", Path(REAL), model, tmp_path / "numbers")
    python = os.environ.get("LORASWEEP_SD_SCRIPTS_PYTHON", sys.executable)
    places = f"trainer.path={tmp_path / 'real'}", f"trainer.python={python}"
    drawn = ["trainer.sample_every_n_epochs=1", "trainer.sample_prompts=[a fox --s 2]"]
    own = [f"adapter={adapter}", "adapter.rank=2", "trainer.max_train_epochs=1"]
    own += ["lr_scheduler=cosine", "seed=3"]
    run = make_run(*places, *own, *drawn)
    data = load(run, base)
    told, (one,), failures = train(base, data, run)
    assert not failures
    (picture,) = (path for path in files_of(run.output_dir) if path.suffix == ".png")
    assert picture.name.startswith("demo_")
    numbers = torch.load(tmp_path / "numbers")
    repeat(numbers, monkeypatch)
    ours = make_run.func(*make_run.args[1:], *own, "trainer=native", number=1)
    closeness = 1e-4 if adapter == "dora" else 1e-5
    steps = Told()
    (epoch,) = NativeTraining(ours.trainer, base, [ours], data, on_step=steps.note)
    for values, theirs in zip(steps[ours.name].values(), told[run.name].values(), strict=True):
        assert values["train/loss"] == pytest.approx(theirs["train/loss"], rel=closeness)
        assert values["train/lr_unet"] == pytest.approx(theirs["train/lr_unet"])
    weights, expected = lora_file.read(epoch.checkpoints[0].path)[0], lora_file.read(one.path)[0]
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    changes = {name: expected[name] - numbers["initial"][name] for name in expected}
    if adapter == "dora":  # LyCORIS differentiates its norm too, ours, as its paper says, doesn't
        return
    off = sum((weights[name] - expected[name]).square().sum() for name in expected)
    assert off < 1e-4 * sum(change.square().sum() for change in changes.values())


def repeat(numbers, monkeypatch):
    """Let the native trainer begin with these weights, and take what was drawn at each step."""

    def with_weights(parts, runs, *bare, new=Pack.new):
        pack = new(parts, runs, *bare)
        members = [pack.member(index) for index in range(len(runs))]
        return Pack(pack.known, [replace(one, tensors=initial(one)) for one in members])

    def initial(member):
        return {
            key: {name: numbers["initial"][f"{key}.{name}"].clone() for name in tensors}
            for key, tensors in member.tensors.items()
        }

    def step(state):
        return numbers["steps"][state.num_micro_steps]

    def draw(_loss, state, *_shape):
        noise, timesteps = step(state)["noise"], step(state)["timesteps"]
        return DrawnNoise(target=noise, on_input=noise, timesteps=timesteps)

    def images(loss, state, batch):
        rows = zip(batch, step(state)["latents"], strict=True)
        return [(replace(loss.data.items[index], latents=row), False) for index, row in rows]

    monkeypatch.setattr(Pack, "new", with_weights)
    monkeypatch.setattr(PackLoss, "_images", images)
    monkeypatch.setattr(PackLoss, "_draw", draw)
    captions = lambda _loss, states, _batches: step(states[0])["captions"]  # noqa: E731
    monkeypatch.setattr(PackLoss, "_captions", captions)


@pytest.mark.skipif(REAL is None, reason="LORASWEEP_SD_SCRIPTS names no checkout")
@pytest.mark.parametrize("kind", ["regularisation", "masks", "alpha"])
def test_the_real_one_reads_our_folders_as_we_do(kind, make_run, base, model, tmp_path):
    """Else it makes other steps than ours in an epoch, or stops at its dataset config."""
    narrow_sd15.write_checkout(tmp_path / "real", Path(REAL), model)
    python = os.environ.get("LORASWEEP_SD_SCRIPTS_PYTHON", sys.executable)
    names = [f"{folder}/{n}.png" for folder in ("img/2_sks cat", "img/1_dog") for n in range(3)]
    names += [f"reg/1_cat/{n}.png" for n in range(4)]
    for number, name in enumerate(names):
        for path in (tmp_path / name, tmp_path / "masks" / name.partition("/")[2]):
            path.parent.mkdir(parents=True, exist_ok=True)
            mode = "RGBA" if kind == "alpha" else "RGB"
            Image.new(mode, (64, 64), (20 * number, 90, 40)).save(path)
    own = {
        "regularisation": [f"dataset.reg_data_dir={tmp_path / 'reg'}", "dataset.keep_tokens=1"],
        "masks": [f"dataset.conditioning_data_dir={tmp_path / 'masks'}"],
        "alpha": ["dataset.alpha_mask=true", "dataset.caption_prefix=photo"],
    }
    run = make_run(
        *(f"trainer.path={tmp_path / 'real'}", f"trainer.python={python}"),
        *("dataset=kohya", f"dataset.image_dir={tmp_path / 'img'}", "dataset.num_images=all"),
        *("dataset.num_holdout=1", "dataset.min_size=8", "dataset.shuffle_caption=true"),
        *("trainer.max_train_epochs=1", *own[kind]),
    )
    data = TrainingData(encoded_images(base, run, write_folders(run)).trained, run.dataset)
    told, checkpoints, failures = train(base, data, run)
    assert not failures
    assert len(checkpoints) == 1
    assert len(told[run.name]) == steps_per_epoch(data.items, run.trainer.batch_size)
