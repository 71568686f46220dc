"""Presets of kohya_ss and TOMLs of sd-scripts become an experiment, and no key is passed over."""

import json
import tomllib
from pathlib import Path

import pytest
import yaml

from command_line import done_here
from lorasweep.config.build_run import build_run
from lorasweep.config.compose import compose, flat, plain_values
from lorasweep.config.conf_folder import conf_dir
from lorasweep.core.settings import SettingsError
from lorasweep.core.trainer_words import meant
from lorasweep.reproduce.experiment_file import write_experiment
from lorasweep.reproduce.kohya_settings import CLASS_DEFAULTS
from lorasweep.reproduce.preset_file import read_preset
from lorasweep.reproduce.run_as_toml import write_toml
from lorasweep.tracking.records import NewRun, RunRecord, RunRecords
from lorasweep.tracking.store import FOLDERS_TAG
from lorasweep.training import sd_scripts_options
from lorasweep.training.sd_scripts_config import text_of

RECORDED = Path(__file__).parents[1] / "recorded"
EDG = json.loads((RECORDED / "kohya_edg_preset.json").read_text())
"""The guide's preset, and the TOML that kohya_ss itself made of it."""
OPTIONS = json.loads((RECORDED / "kohya_options.json").read_text())["options"]
PLACES = ("dataset.image_dir=images", "output_root=out")
TOGETHER = {
    *("network_module", "network_args", "network_dim", "network_alpha", "network_dropout"),
    *("network_train_text_encoder_only", "network_train_unet_only", "dim_from_weights"),
    *("optimizer_type", "optimizer_args", "use_8bit_adam", "use_lion_optimizer", "learning_rate"),
    *("unet_lr", "text_encoder_lr", "lr_scheduler", "lr_scheduler_type", "lr_scheduler_args"),
    *("lr_scheduler_min_lr_ratio", "lr_decay_steps", "max_train_epochs", "max_train_steps"),
    *("output_name", "pretrained_model_name_or_path", "v_parameterization", "train_data_dir"),
    *("dataset_config", "caption_extension", "caption_extention", "sample_every_n_epochs"),
    "sample_prompts",
}
"""Options that only say something together, or only sometimes: the code reads them."""


def found_of(folder, content):
    """What a preset (JSON) or a TOML's text is found to say."""
    is_toml = isinstance(content, str)
    file = folder / ("theirs.toml" if is_toml else "theirs.json")
    file.write_text(content if is_toml else json.dumps(content))
    return read_preset(file, "mine")


def run_of(found, folder):
    """The run of the experiment that is written, as train would have it."""
    file = write_experiment(found, folder, "a test")
    images = f"dataset.image_dir={folder}"
    cfg = compose([f"experiment={file.stem}", images, "output_root=elsewhere"], folder)
    return build_run(cfg, output_dir=Path("elsewhere"))


def toml(**options):
    return text_of({"section": options}, "a test").decode()


def verdicts(found):
    """By key of the file, as far as one can see from its beginning."""
    return {row.said.partition("=")[0].rpartition(": ")[2]: row for row in found.rows}


def test_every_option_of_sd_scripts_has_a_place():
    tables = (sd_scripts_options.OPTIONS, sd_scripts_options.NOT_HERE, sd_scripts_options.IDLE)
    places = [name for table in tables for name in table] + sorted(TOGETHER - {"dim_from_weights"})
    assert len(places) == len(set(places))
    assert OPTIONS.keys() <= set(places)
    assert set(places) - OPTIONS.keys() == {"num_reg_images"}  # of metadata


def test_what_an_optimiser_does_by_itself_is_known_of_every_argument_of_conf():
    """A file that doesn't say weight_decay means the class's own, and not conf/'s."""
    for file in (conf_dir() / "optimizer").glob("*.yaml"):
        given = yaml.safe_load(file.read_text())["args"].keys() - {"fused"}  # the same result
        assert given == CLASS_DEFAULTS[file.stem].keys(), file.stem


def test_whoever_types_an_option_of_sd_scripts_is_told_the_setting():
    known = [*flat(plain_values(compose(PLACES))), "lr_scheduler.timescale"]
    for name, option in sd_scripts_options.OPTIONS.items():
        assert option.setting in (name, meant(name, known)), name


def test_the_guides_preset_gives_the_run_that_kohya_ss_starts_by_it(tmp_path):
    """kohya_ss's own TOML of the preset says what it is to become."""
    by_preset = run_of(found_of(tmp_path, EDG["preset"]), tmp_path / "preset")
    by_toml = run_of(found_of(tmp_path, toml(**EDG["toml"])), tmp_path / "toml")
    left_out = ("name", "config_yaml", "tracking.registered_model", "dataset.image_dir")
    differ = {
        key: (value, by_toml.params[key])
        for key, value in by_preset.params.items()
        if value != by_toml.params[key] and key not in left_out
    }
    assert not differ
    assert by_toml.name == "edg"


@pytest.mark.parametrize("kind", ["preset", "toml"])
def test_of_every_key_it_is_said_what_became_of_it(kind, tmp_path):
    content = EDG[kind] if kind == "preset" else toml(**EDG["toml"])
    found = found_of(tmp_path, content)
    said = " ".join(row.said for row in found.rows)
    assert not [key for key in EDG[kind] if f"{key}=" not in said and key != "network_args"]
    told = verdicts(found)
    assert told["train_batch_size"][1:] == ("taken as", "trainer.batch_size=3")
    assert told["bucket_no_upscale"].verdict == "no effect"
    assert told["xformers"].verdict == "no effect"
    if kind == "toml":
        assert told["noise_offset_type"].verdict == told["epoch"].verdict == "unknown"
        assert told["network_dim"].what == "adapter.rank=64"
        assert told["train_data_dir"].verdict == "left out"


@pytest.mark.parametrize("kind", ["preset", "toml"])
def test_the_traps_of_the_guides_preset_are_told(kind, tmp_path):
    content = EDG[kind] if kind == "preset" else toml(**EDG["toml"])
    found = found_of(tmp_path, content)
    told = " ".join([*found.notes, *(f"{row.said} {row.what}" for row in found.rows)])
    assert "latents of 64 x 81, the same as of 512,648" in told
    assert ("epoch=1" in told and "no option epoch" in told) or "no such option" in told
    assert "kernels larger than 1x1 work at 1/32" in told
    assert found.settings["dataset.resolution"] == [512, 648]


def test_what_is_not_said_is_what_sd_scripts_does_then(tmp_path):
    """argparse's defaults: they are not ours."""
    run = run_of(found_of(tmp_path, toml(network_module="networks.lora")), tmp_path / "c")
    assert (run.adapter.rank, run.adapter.alpha) == (4, 1)
    assert (run.optimizer.unet_lr, run.optimizer.text_encoder_lr) == (2e-6, 2e-6)
    assert (run.max_train_steps, run.max_train_epochs) == (1600, 1600)
    assert (run.trainer.batch_size, run.trainer.save_dtype) == (1, "fp32")
    assert run.captions["sidecar"].suffix == ".caption"
    assert run.dataset.num_images == "all"


TAKEN = [
    (
        {"network_args": ["conv_dim=8"], "network_module": "networks.lora", "network_dim": 16},
        {"adapter.conv_rank": 8, "adapter.conv_alpha": 1.0, "adapter": "locon"},
    ),
    (
        {"network_args": ["algo=lokr"], "network_module": "lycoris.kohya", "network_alpha": 2},
        {"adapter.conv_rank": 4, "adapter.conv_alpha": 2.0, "adapter.targets": "full"},
    ),
    (
        {"network_args": ["algo=locon", "dora_wd=True", "wd_on_output=False", "conv_dim=0"]}
        | {"network_module": "lycoris.kohya", "network_alpha": 0, "network_dim": 8},
        {"adapter": "dora", "adapter.wd_on_output": False, "adapter.alpha": 8.0}
        | {"adapter.conv_rank": None},
    ),
    (
        {"learning_rate": 1e-3, "text_encoder_lr": [2e-4, 1e-4]},
        {"optimizer.unet_lr": 1e-3, "optimizer.text_encoder_lr": 2e-4},
    ),
    ({"network_train_unet_only": True, "unet_lr": 1e-3}, {"optimizer.text_encoder_lr": 0.0}),
    (
        {"optimizer_type": "lion", "optimizer_args": ["betas=(0.9,0.95)"]},
        {"optimizer": "lion", "optimizer.args.betas": [0.9, 0.95]}
        | {"optimizer.args.weight_decay": 0.0},  # lion_pytorch's own
    ),
    (
        {"optimizer_type": "Adafactor", "lr_scheduler": "cosine"},
        {"lr_scheduler": "adafactor", "optimizer.args.scale_parameter": True},
    ),
    (
        {"optimizer_type": "SGDNesterov"},
        {"optimizer.args.nesterov": True, "optimizer.args.momentum": 0.9},
    ),
    (
        {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3}
        | {"lr_warmup_steps": 0.05, "lr_scheduler_power": 2},
        {"lr_scheduler.num_cycles": 3, "lr_scheduler.warmup": 0.05, "lr_scheduler.power": None},
    ),
    (
        {"lr_scheduler": "polynomial", "lr_scheduler_args": ["lr_end=1e-5"], "unet_lr": 1e-4},
        {"lr_scheduler.min_lr_ratio": 0.1},
    ),
    (
        {"max_train_epochs": 7, "max_train_steps": 5},
        {"trainer.max_train_epochs": 7, "trainer.max_train_steps": None},
    ),
    (
        {"enable_bucket": True, "resolution": "512,650", "bucket_reso_steps": 64.0},
        {"dataset.resolution": [512, 650], "dataset.enable_bucket": True},
    ),
    (
        {"caption_extention": ".txt", "caption_extension": ".cap"},
        {"captions.sidecar.suffix": ".txt"},
    ),
    (
        {"keep_tokens": 2, "shuffle_caption": True, "v_parameterization": True},
        {"dataset.keep_tokens": 2, "model.prediction_type": "v_prediction"},
    ),
]
"""What a TOML says, and the settings that come of it; None: none does."""


@pytest.mark.parametrize(("said", "expected"), TAKEN)
def test_what_only_several_options_say_is_taken_as_sd_scripts_reads_it(said, expected, tmp_path):
    found = found_of(tmp_path, toml(**said))
    taken = {**found.choices, **found.settings}
    assert {key: taken.get(key) for key in expected} == expected


def test_kohya_ss_sends_no_zeros_and_reads_percents(tmp_path):
    preset = {
        "LoRA_type": "Standard",
        "text_encoder_lr": "0",
        "unet_lr": "0.001",
        "seed": "0",
        "max_grad_norm": 0,
        "lr_warmup": 5,
        "max_train_steps": "",
        "epoch": "12",
        "additional_parameters": "--network_train_unet_only --min_snr_gamma=5",
        "wandb_api_key": "hunter2",
        "conv_dim": 8,
        "lr_scheduler": "constant",
    }
    found = found_of(tmp_path, preset)
    run = run_of(found, tmp_path / "c")
    assert (run.optimizer.unet_lr, run.optimizer.text_encoder_lr) == (1e-3, 0)
    assert run.optimizer.max_grad_norm == 1
    assert (run.max_train_epochs, run.max_train_steps) == (12, None)
    assert (run.lr_scheduler.warmup, run.min_snr_gamma) == (0.05, 5)
    assert type(run.adapter).__name__ == "LoRA"
    told = verdicts(found)
    assert told["conv_dim"].what == "Standard doesn't read it"
    assert "1.0 holds" in told["max_grad_norm"].what
    assert "hunter2" not in str(found.rows)
    assert "lr_warmup=5: sd-scripts refuses it" in " ".join(found.notes)


def test_the_text_false_is_true_to_lycoris(tmp_path):
    preset = {"LoRA_type": "LyCORIS/LoKr", "network_dim": 100000, "decompose_both": False}
    found = found_of(tmp_path, preset)
    assert found.settings["adapter.decompose_both"]
    assert "LyCORIS takes the text False for true" in " ".join(found.notes)


REFUSED = {
    "of Flux": ({"LoRA_type": "Flux1", "flux1_checkbox": True}, "Stable Diffusion alone"),
    "of another network": ({"LoRA_type": "LyCORIS/iA3"}, "LoRA_type=LyCORIS/iA3"),
    "another module": ('network_module = "networks.lora_flux"', "networks.lora_flux"),
    "no preset": ({"a": 1}, "no preset of kohya_ss"),
    "data sets": ("[[datasets]]\nresolution = 512", "config of data sets"),
    "no TOML": ("network_dim = ", "is not TOML"),
    "endless": ({"LoRA_type": "Standard", **dict.fromkeys(map(str, range(3000)))}, "keys"),
    "nested": ("a = " + "[" * 5000, "is not TOML"),
    "a rank": ("network_dim = 99999", "adapter.rank=99999"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_can_not_be_taken_is_refused_in_one_line_and_leaves_nothing(kind, tmp_path):
    content, said = REFUSED[kind]
    with pytest.raises(ValueError) as refused:
        write_experiment(found_of(tmp_path, content), tmp_path / "c", "a test")
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "c").exists()


def test_what_a_stranger_writes_is_text(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THIS_MACHINE", "hunter2")
    odd = "${oc.env:SECRET_OF_THIS_MACHINE}"
    said = {
        "output_name": f"a{odd}\nseed: 9",
        "caption_extension": f".{odd}",
        "optimizer_args": [f"note='{odd}'"],
        "training_comment": f"{odd}\n\x1b[31m: x",
        "seed": "many",
        "noise_offset": [1],
        odd: 3,
        "resolution": "(" * 500,
    }
    text = toml(**{key: value for key, value in said.items() if key != odd})
    found = found_of(tmp_path, f"{text}{json.dumps(odd)} = 3\n")
    run = run_of(found, tmp_path / "c")
    assert run.captions["sidecar"].suffix == f".{odd}"
    assert run.optimizer.args["note"] == odd
    written = (tmp_path / "c" / "experiment" / "mine.yaml").read_text()
    assert "hunter2" not in written and "\x1b" not in written
    assert verdicts(found)["noise_offset"].what.startswith("not understood")


def test_the_command_writes_the_experiment_and_shows_what_became_of_the_keys(tmp_path):
    (tmp_path / "theirs.toml").write_text(toml(**EDG["toml"]))
    done = done_here("preset", "theirs.toml", "--as", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trainer.batch_size=3" in done.stdout and "unknown" in done.stdout
    assert "lorasweep train --config-dir conf experiment=mine" in done.stdout
    assert (tmp_path / "conf" / "experiment" / "mine.yaml").is_file()
    for name, why in (("mine", "there already"), ("guide", "lorasweep's own"), ("../x", "--as=")):
        again = done_here("preset", "theirs.toml", "--as", name, cwd=tmp_path)
        assert again.returncode == 2 and why in again.stderr
        assert len(again.stderr.strip().splitlines()) == 1


def test_the_shipped_edg_locon_is_the_guides_preset(tmp_path):
    """Key by key beside the TOML that kohya_ss starts sd-scripts with."""
    found = found_of(tmp_path, toml(**EDG["toml"]))
    cfg = compose(["experiment=edg_locon", *PLACES])
    run = build_run(cfg, output_dir=Path("out"))
    elsewhere = {"name", "captions.sidecar.suffix", "dataset.num_images", "dataset.min_size"}
    theirs = {key: value for key, value in found.settings.items() if key not in elsewhere}
    assert {key: run.params[key] for key in theirs} == theirs
    assert (run.adapter.rank, run.adapter.alpha) == (64, 64)
    assert (run.adapter.conv_rank, run.adapter.conv_alpha, run.adapter.targets) == (32, 1, "full")
    assert (run.optimizer.unet_lr, run.optimizer.text_encoder_lr) == (1e-4, 5e-5)
    assert run.optimizer.type == "bitsandbytes.optim.AdamW8bit"
    assert (run.trainer.batch_size, run.trainer.precision) == (3, "bf16")
    assert run.trainer.save_dtype == "bf16"
    assert (run.seed, run.model.clip_skip, run.noise_offset) == (1234, 2, 0.05)
    assert (run.lr_scheduler.type, run.max_train_steps) == ("constant", 1600)
    assert EDG["toml"]["resolution"] == "512,650" and 650 // 8 == 648 // 8 == 81
    assert run.dataset.size == (512, 648) and not run.dataset.enable_bucket


def test_650_pixels_are_answered_at_once_with_the_one_change():
    with pytest.raises(SettingsError, match=r"the nearest is \[512, 648\]"):
        build_run(
            compose(["experiment=edg_locon", "dataset.resolution=[512,650]", *PLACES]),
            output_dir=Path("out"),
        )


# The reverse


SD15 = "model.path=stable-diffusion-v1-5/stable-diffusion-v1-5"
"""Named by hand: it isn't on this machine."""


def logged(run, folder, data="/images/mine"):
    """The folder of a run as its training leaves it, as far as it is read."""
    config = NewRun(
        name=run.name,
        sweep=None,
        output_dir=folder,
        params=run.params,
        config_yaml=run.config_yaml,
        overrides=[],
        image_dir=folder,
        dataset_digest="",
        tags={FOLDERS_TAG: data},
    )
    record = RunRecord(
        uid="u",
        uri=None,
        experiment="e",
        upload=False,
        new=config,
        begun=0,
        opened=0,
    )
    RunRecords(folder).write_run(record)
    return folder


def told(folder, *places):
    """What the TOML of a run says, flat, and what is said beside it."""
    written = write_toml(str(folder), "", "", folder / "out.toml", places)
    sections = tomllib.loads(written.path.read_text())
    return {k: v for section in sections.values() for k, v in section.items()}, written.lines


def test_a_toml_comes_back_as_it_was(tmp_path):
    """TOML -> preset -> run -> TOML, key by key on what both know."""
    found = found_of(tmp_path, toml(**EDG["toml"]))
    run = run_of(found, tmp_path / "c")
    options, _ = told(logged(run, tmp_path), SD15)
    differ = {
        key: (value, options[key])
        for key, value in EDG["toml"].items()
        if key in options and options[key] != value and value != "..."
    }
    args = differ.pop("network_args")
    said = [
        {one for one in side if one.partition("=")[2] not in ("0", "0.0", "False")} for side in args
    ]
    assert {one.replace("conv_alpha=1.0", "conv_alpha=1") for one in said[1]} == said[0]
    assert differ == {
        "resolution": ("512,650", "512,648"),
        "optimizer_args": ([], ["weight_decay=0.01"]),  # bitsandbytes's default
        "text_encoder_lr": ([5e-5, 5e-5], 5e-5),  # of which the first is read
        "max_data_loader_n_workers": (1, 0),  # of no effect on the result
    }
    assert options["train_data_dir"] == "/images/mine/train"
    assert "max_train_epochs" not in options
    first, again = (found_of(tmp_path, toml(**one)).settings for one in (EDG["toml"], options))
    zeros = {"adapter.rank_dropout": 0.0, "adapter.module_dropout": 0.0}
    assert {**again, **zeros} == {**first, "sampling.every_n_epochs": 1}


def test_what_sd_scripts_can_not_be_told_is_said_by_name(make_run, tmp_path):
    run = make_run(
        "trainer.max_train_epochs=7", "dataset.shuffle_caption=true", "trainer.batch_size=2"
    )
    options, lines = told(logged(run, tmp_path))
    assert (options["max_train_epochs"], options["train_batch_size"]) == (7, 2)
    assert "max_train_steps" not in options
    assert options["sample_every_n_epochs"] == 1
    assert run.sampling.prompts[0] in Path(options["sample_prompts"]).read_text()
    subsets = tomllib.loads(Path(options["dataset_config"]).read_text())["datasets"][0]["subsets"]
    shuffled = {Path(one["image_dir"]).name: one.get("shuffle_caption") for one in subsets}
    assert shuffled["1_kosmos"] is False and shuffled["1_wd"] is None
    assert "metrics.*" in " ".join(lines)
    with pytest.raises(SettingsError, match="is there already"):
        told(tmp_path)
    odd = make_run("adapter.init=orthogonal", number=1)
    (tmp_path / "odd").mkdir()
    with pytest.raises(SettingsError, match=r"adapter\.init=orthogonal"):
        told(logged(odd, tmp_path / "odd"))


def test_the_command_writes_the_toml_of_a_run(make_run, tmp_path):
    logged(make_run("trainer.max_train_steps=3"), tmp_path)
    where = ("output_root=none", "--out", "mine.toml")
    done = done_here("preset", "--to-kohya", str(tmp_path), *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--config_file" in done.stdout
    assert tomllib.loads((tmp_path / "mine.toml").read_text())["training"]["max_train_steps"] == 3
    for words in (("x", "--to-kohya", "output_root=none"), ("x.json",), ("x.json", "seed=1")):
        done = done_here("preset", *words, cwd=tmp_path)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
