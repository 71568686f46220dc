"""Every mistake in the settings is one line that names the key and the remedy, before any work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.errors import HydraException

from command_line import exit_code
from conftest import options
from lorasweep.cli import export_command
from lorasweep.cli.command_line import OneLineParser
from lorasweep.cli.train_command import flags_first
from lorasweep.config.build_run import build_run
from lorasweep.config.compose import compose
from lorasweep.config.conf_folder import conf_dir
from lorasweep.config.error_messages import one_line
from lorasweep.config.run import KEYS
from lorasweep.config.settings_digest import settings_digest
from lorasweep.core.settings import SettingsError, unknown_key
from lorasweep.core.trainer_words import SETTING_OF
from lorasweep.data import dataset

GROUPS = ["model", "adapter", "optimizer", "lr_scheduler", "trainer", "sampling", "tracking"]


def test_a_name_may_be_a_number(make_run):
    run = make_run("name=2026", "tracking.experiment=7")
    assert (run.name, run.tracking.registered_model) == ("2026", "2026")
    assert run.tracking.experiment == "7"


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in GROUPS for name in options(group)]
)
def test_every_option_composes_and_passes_its_own_checks(group, name, make_run, tmp_path):
    (tmp_path / "train_network.py").touch()
    given = [f"trainer.path={tmp_path}"] if name == "sd_scripts" else []
    run = make_run(f"{group}={name}", *given)
    assert getattr(run, group) is not None


@pytest.mark.parametrize("name", options("captions"))
def test_every_captioner_can_be_an_arm(name, make_run):
    run = make_run(f"captions=[{name}]")
    assert all(captioner.repeats >= 1 for captioner in run.captions.values())


@pytest.mark.parametrize("name", options("metrics"))
def test_every_metric_can_stand_alone(name, tmp_path):
    cfg = compose([f"metrics=[{name}]", f"dataset.image_dir={tmp_path}"])
    assert build_run(cfg, output_dir=tmp_path).metrics


@pytest.mark.parametrize("name", options("debug"))
def test_every_debug_option_composes(name, make_run):
    assert make_run(f"debug={name}").max_train_epochs >= 1


def test_guide_experiment_is_the_guides_recipe(tmp_path):
    cfg = compose(["experiment=guide", f"dataset.image_dir={tmp_path}"])
    run = build_run(cfg, output_dir=tmp_path)
    assert run.dataset.num_images == 30
    assert {arm: c.repeats for arm, c in run.captions.items()} == {
        "empty": 10,
        "wd": 10,
        "kosmos": 10,
    }
    assert (run.adapter.rank, run.adapter.alpha) == (64, 32)
    assert (run.optimizer.unet_lr, run.optimizer.text_encoder_lr) == (1e-4, 5e-5)
    assert run.max_train_epochs == 100
    assert run.sampling.every_n_epochs == 1


def test_quick_takes_own_images_and_captions_on_the_embedded_model():
    own = ["experiment=quick", "dataset.image_dir=photos"]
    run = build_run(compose(own), output_dir=Path(), checks=())
    assert (run.name, set(run.captions), run.model.path.endswith("base_model")) == (
        "photos",
        {"empty"},
        True,
    )
    cfg = compose([*own, "captions=[empty,sidecar]"])
    assert set(build_run(cfg, output_dir=Path(), checks=()).captions) == {"empty", "sidecar"}


def test_alpha_follows_the_rank(make_run):
    assert make_run("adapter.rank=10").adapter.alpha == 5


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("adapter=lara", "adapter=lara: there is no such option; choose one of dora"),
        ("adapter.rnk=4", "adapter.rnk: there is no such setting; did you mean adapter.rank?"),
        ("+adapter.rnk=4", "adapter.rnk: there is no such setting; did you mean adapter.rank?"),
        ("adapter.conv_rank=4", "only adapter=dora, locon, loha, lokr, lycoris have it"),
        ("adapter.algo=glora", "only adapter=lycoris has it"),
        ("adapter.conv_rank=4", "where -m sweeps adapter, sweep that alone and write ++adapter.c"),
        ("optimizer.args.weigth_decay=1", "AdamW refuses them"),
        ("+adapter.rank=4", "adapter.rank is there already: change it without the +"),
        ("adapter=lora,loha", "several values make a sweep; train it by lorasweep train -m"),
        (
            "adapter.block_ranks={down: 4, middle: 8}",
            "block_ranks.middle: there is no such setting; did you mean adapter.block_ranks.mid?",
        ),
        (
            "adapter.block_ranks={down: [4, 4, 4], mid: 8, up: 4}",
            "adapter.block_ranks.down=[4, 4, 4]: give one number or 12",
        ),
        ("nonsense=4", "nonsense: there is no such setting"),
        ("+nonsense=4", "nonsense: there is no such setting"),
        ("dataset.random_crop=true", "no such setting: an image's latents are computed once"),
        ("adapter.rank=four", "adapter.rank=four: must be a valid integer"),
        ("adapter.rank=0", "adapter.rank=0: must be greater than 0"),
        ("adapter.network_dropout=1.5", "adapter.network_dropout=1.5: must be less than 1"),
        ("adapter.targets=all", "adapter.targets=all: choose one of attn-mlp, conv, full"),
        ("trainer.precision=fp8", "trainer.precision=fp8: must be 'fp32', 'fp16' or 'bf16'"),
        ("dataset.caption_extension=.caption", "dataset.caption_extension=.caption"),
        ("dataset.keep_tokens=2", "dataset.keep_tokens=2"),
        ("dataset.bucket_no_upscale=true", "dataset.bucket_no_upscale"),
        ("dataset.image_dir=nowhere", "dataset.image_dir=nowhere"),
        ("model.path=model.ckpt", "model.allow_pickle=true"),
        ("model.path=/nowhere/at/all", "model.path=/nowhere/at/all: no such file or folder"),
        ("sampling.prompts=[a --x 3]", "--x in 'a --x 3' is not understood"),
        ("name='a b'", "name=a b: use letters"),
        ("seed=one", "seed=one: must be a whole number"),
        ("captions=[]", "captions is empty"),
        ("captions=[x]", "captions=x: there is no such option; choose one of demo, empty"),
        ("~seed", "seed can't be removed: leave out ~seed"),
        ("optimizer.type=adamw", "torch.optim has no class adamw"),
        ("optimizer.args.weight_decay=-1", "optimizer.args: AdamW refuses them"),
        ("lr_scheduler.power=2", "lr_scheduler.power=2 has no effect on constant"),
        ("sampling.scheduler=Euler", "diffusers has no such scheduler"),
        ("trainer.device=gpu", "trainer.device=gpu: give auto, cpu, cuda"),
        ("optimizer.type=No.Such", "No is not installed"),
        ("lr_scheduler.warmup=2.5", "lr_scheduler.warmup=2.5: give a whole number of steps"),
        ("adapter.rank=[1", "adapter.rank=[1: can't be read"),
        ("+captions.wdd.repeats=2", "captions.wdd has settings but is not chosen"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override, says, make_run):
    with pytest.raises((HydraException, SettingsError)) as caught:
        run = make_run(override)
        dataset.find(run.dataset)
        run.check()
    line = one_line(caught.value)
    assert line is not None
    assert says in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["dataset.min_bucket_reso=32"], "no effect without dataset.enable_bucket=true"),
        (
            ["adapter=locon", "adapter.targets=attn-mlp", "adapter.conv_rank=4"],
            "adapter.conv_rank has no effect without adapter.targets=full",
        ),
        (
            ["sampling.every_n_epochs=0", "sampling.seed=4"],
            "sampling.seed has no effect without sampling.every_n_epochs=1",
        ),
    ],
)
def test_an_override_that_nothing_reads_is_refused(overrides, says, make_run):
    with pytest.raises(SettingsError, match=says):
        make_run(*overrides)


BETAS = [
    "optimizer.args={betas: [0.9, 0.9]}",
    "+optimizer.args={betas: [0.9, 0.9]}",
    "optimizer.args.betas=[0.9,0.9]",
    "+optimizer.args.betas=[0.9,0.9]",
    "++optimizer.args.betas=[0.9,0.9]",
]


@pytest.mark.parametrize("override", BETAS)
def test_arguments_can_be_added_to_the_optimizers(override, make_run):
    run = make_run("optimizer=adamw", override)
    assert run.optimizer.args == {"weight_decay": 0.01, "fused": True, "betas": [0.9, 0.9]}


@pytest.mark.parametrize("override", BETAS[::2])
def test_arguments_can_be_added_on_the_command_line(override, capsys):
    assert exit_code("train", "--cfg", "job", "experiment=demo", override) == 0
    assert "    betas:\n    - 0.9\n    - 0.9\n" in capsys.readouterr().out


def test_a_key_is_never_suggested_instead_of_itself():
    assert "mean a.rank?" in unknown_key("a.conv_rank", ["a.conv_rank", "a.rank"])


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ("network_dim=8", "adapter.rank"),
        ("network_alpha=8", "adapter.alpha"),
        ("learning_rate=1e-4", "optimizer.unet_lr and optimizer.text_encoder_lr"),
        ("train_batch_size=2", "trainer.batch_size"),
        ("max_train_steps=2", "trainer.max_train_steps"),
        ("unet_lr=1e-4", "optimizer.unet_lr"),
        ("optimizer.lr=1e-4", "optimizer.unet_lr and optimizer.text_encoder_lr"),
        ("adapter.dim=8", "adapter.rank"),
        ("trainer.epochs=8", "trainer.max_train_epochs"),
        ("--network_dim=8", "adapter.rank=VALUE"),
        ("--config=mine", "--config-dir"),
    ],
)
@pytest.mark.parametrize("command", ["train", "doctor"])
def test_words_of_other_trainers_say_what_they_are_here(command, said, says, capsys):
    if command == "doctor" and said.startswith("--config"):
        return  # argparse completes it
    assert exit_code(command, "experiment=demo", said) == 2
    assert f"did you mean {says}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "did you mean train?"),
        (["zzz"], "there are caption, convert, doctor"),
        (["export", "demo", "--to", "diffuser"], "did you mean diffusers?"),
        (["export", "demo", "--to", "zzz"], "choose one of merged, kohya"),
    ],
)
def test_a_misspelt_command_or_program_is_told_from_its_like(words, says, capsys):
    assert exit_code(*words) == 2
    assert says in capsys.readouterr().err


def test_programs_stand_for_the_form_they_read():
    parser = OneLineParser()
    export_command.add_parser(parser.add_subparsers())
    programs = ("a1111", "ComfyUI", "forge", "kohya", "diffusers")
    found = [parser.parse_args(["export", "demo", "--to", one]).to for one in programs]
    assert found == ["kohya"] * 4 + ["diffusers-lora"]


def test_other_trainers_words_lead_to_settings_that_exist():
    known = {*KEYS, "captions.ARM.repeats"}
    for path in conf_dir().glob("*/*.yaml"):
        known |= {f"{path.parent.name}.{key}" for key in yaml.safe_load(path.read_text()) or {}}
    for word, setting in SETTING_OF.items():
        assert set(setting.split(" and ")) <= known, word


def test_both_learning_rates_zero_would_train_nothing(make_run):
    with pytest.raises(SettingsError, match="nothing would be trained"):
        make_run("optimizer.unet_lr=0", "optimizer.text_encoder_lr=0")


def test_a_part_without_adapters_or_learning_rate_is_said(make_run, caplog):
    make_run("adapter.targets=unet-only")
    assert "optimizer.text_encoder_lr has no effect" in caplog.text
    with pytest.raises(SettingsError, match=r"adapts the unet only, whose learning rate is 0"):
        make_run("adapter.targets=unet-only", "optimizer.unet_lr=0")


def test_shuffling_where_no_captions_are_tags_is_said(make_run, caplog, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it in our own process
    make_run("captions=[kosmos2]", "dataset.shuffle_caption=true")
    assert "dataset.shuffle_caption has no effect" in caplog.text
    caplog.clear()
    kosmos = make_run("captions=[kosmos2]", "captions.kosmos.tags=true")
    make_run("captions=[kosmos2]", "dataset.shuffle_caption=true", "captions.kosmos.tags=true")
    assert not caplog.text
    without = {key: value for key, value in kosmos.params.items() if not key.endswith(".tags")}
    assert settings_digest(kosmos.params) == settings_digest(without)  # of an older version


def test_alpha_above_rank_is_a_warning(make_run, caplog):
    make_run("adapter.rank=4", "adapter.alpha=8")
    assert "adapter.alpha=8 is larger than adapter.rank=4" in caplog.text


def test_image_dir_must_be_given():
    result = _lorasweep("train")
    assert result.returncode == 2
    assert result.stderr.startswith("lorasweep: dataset.image_dir is missing: give the folder")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "experiment=demo", "adapter.rank=four"],
        ["train", "adapter=lara"],
        ["train", "dataset.image_dir=nowhere"],
        ["train", "-m", "adapter=lara,lora"],
    ],
)
def test_answers_that_need_no_work_import_nothing_heavy(arguments, tmp_path):
    script = (
        "import sys\nfrom lorasweep.cli.main import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'mlflow', 'diffusers', 'transformers', 'optuna', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_every_flag_of_hydra_is_known():
    """They are declared by us, for Hydra's parser is a private part, to be looked at here alone."""
    from hydra._internal.utils import get_args_parser

    flags = [flag for action in get_args_parser()._actions for flag in action.option_strings]
    assert "-m" in flags
    before = {"--help", "-h", "--config-dir", "-cd"}  # answered before
    foreign = {"--config-path", "-cp", "--experimental-rerun"}
    for flag in set(flags) - before - foreign:
        try:
            flags_first([flag])
        except SettingsError as error:
            assert "expected one argument" in str(error)
    for flag in foreign & set(flags):
        with pytest.raises(SettingsError, match=r"unrecognized|invalid choice"):
            flags_first([flag, "x"])
    assert flags_first(["a=1", "-m", "b=2", "--cfg", "job"]) == ["-m", "--cfg", "job", "a=1", "b=2"]


def test_whoever_reads_the_output_may_stop_reading(tmp_path):
    """As `| head` does."""
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "lorasweep", "sync", f"output_root={tmp_path}"]
    with os.fdopen(theirs) as stdout:
        result = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_packs_hold_runs_with_the_same_data_and_batches(make_run):
    run = make_run("adapter.rank=4")
    assert run.can_share_pack(make_run("adapter.rank=8", "optimizer.unet_lr=1e-5", "seed=7"))
    assert run.can_share_pack(make_run("trainer.max_train_epochs=9", "trainer.noise_offset=0.1"))
    assert not run.can_share_pack(make_run("trainer.precision=bf16"))
    assert not run.can_share_pack(make_run("trainer.batch_size=2"))
    assert not run.can_share_pack(make_run("dataset.resolution=64"))
    assert not run.can_share_pack(make_run("dataset.seed=1"))


def _lorasweep(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorasweep", *arguments], capture_output=True, text=True
    )
