"""A LoRA file of kohya's scripts gives the nearest config, and a list of what is not known."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lorasweep.cli import main
from lorasweep.config.build_run import build_run
from lorasweep.config.compose import compose
from lorasweep.data.dataset import select
from lorasweep.reproduce import foreign_lora
from lorasweep.reproduce.experiment_file import write_experiment

KOHYA = json.loads((Path(__file__).parents[1] / "recorded/kohya_metadata.json").read_text())
"""Written by kohya's sd-scripts itself."""
SITES = ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_unet_mid_block_attentions_0_proj_in")
LYCORIS = {
    "ss_network_module": "lycoris.kohya",
    "ss_network_dim": "64",
    "ss_network_alpha": "64",
    "ss_network_args": json.dumps(
        {
            "preset": "full",
            "conv_dim": "32",
            "conv_alpha": "1",
            "algo": "locon",
            "dora_wd": "False",
            "use_scalar": "True",
            "loraplus_lr_ratio": "4",
        }
    ),
    "ss_unet_lr": "0.0001",
    "ss_text_encoder_lr": "[5e-05]",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1,betas=(0.9, 0.95))",
    "ss_lr_scheduler": "cosine",
    "ss_num_reg_images": "20",
    "ss_datasets": json.dumps(
        [
            {
                "batch_size_per_device": 3,
                "resolution": [512, 650],
                "enable_bucket": True,
                "min_bucket_reso": 256,
                "max_bucket_reso": 2048,
            }
        ]
    ),
    "ss_dataset_dirs": json.dumps(
        {
            "10_wd": {"n_repeats": 10, "img_count": 30},
            "5_a b": {"n_repeats": 5, "img_count": 30},
        }
    ),
}


def file_of(folder, metadata, rank=8, alpha=4.0):
    path = folder / "theirs.safetensors"
    tensors = {}
    for number, site in enumerate(SITES):
        tensors[f"{site}.lora_down.weight"] = torch.ones(rank, 16) * (number + 1)
        tensors[f"{site}.lora_up.weight"] = torch.ones(16, rank)
        tensors[f"{site}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return path


def run_of(found, folder):
    """The run that its config folder gives, as train would have it."""
    file = write_experiment(found, folder, "a test", replace=True)
    images = f"dataset.image_dir={folder}"
    cfg = compose([f"experiment={file.stem}", images, "output_root=elsewhere"], folder)
    return build_run(cfg, output_dir=Path("elsewhere"))


def test_what_kohya_says_is_taken_over(tmp_path):
    run = run_of(foreign_lora.read_settings(file_of(tmp_path, KOHYA)), tmp_path / "config")
    assert (run.adapter.rank, run.adapter.alpha) == (8, 4)
    assert (run.optimizer.unet_lr, run.optimizer.text_encoder_lr) == (1e-4, 5e-5)
    assert (run.max_train_epochs, run.trainer.batch_size) == (2, 2)
    assert (run.seed, run.noise_offset, run.model.clip_skip) == (1234, 0.05, 2)
    assert run.name == "ref_full-guess"
    assert run.dataset.size == (64, 64)
    assert {arm: captioner.repeats for arm, captioner in run.captions.items()} == {"wd": 2}
    assert (run.dataset.num_images, run.dataset.num_holdout) == (10, 0)


def test_what_is_not_known_is_listed(tmp_path):
    found = foreign_lora.read_settings(file_of(tmp_path, KOHYA))
    unknown = " ".join(what for what, _ in found.unknown)
    assert "the images" in unknown
    # nothing else that the reference says is lost
    assert [one for one in unknown.split() if one.startswith("ss_")] == [
        "ss_sd_model_name=sd15-random"
    ]


def test_of_every_entry_it_is_said_what_became_of_it(tmp_path):
    found = foreign_lora.read_settings(file_of(tmp_path, {**KOHYA, "ss_odd": "1"}))
    said = {row.said.partition("=")[0].partition(":")[0]: row for row in found.rows}
    assert KOHYA.keys() <= said.keys()
    assert said["ss_odd"].verdict == "unknown" and said["ss_seed"].what == "seed=1234"
    assert "captions.wd.repeats=2" in [row.what for row in found.taken]
    assert said["ss_session_id"].verdict == "no effect"
    assert said["ss_loss_type"].what == "trainer.loss_type=l2"


def test_a_lycoris_file_with_its_data_set_in_a_toml(tmp_path):
    found = foreign_lora.read_settings(file_of(tmp_path, LYCORIS))
    run = run_of(found, tmp_path / "config")
    assert type(run.adapter).__name__ == "LoCon"
    adapter = run.adapter
    assert (adapter.rank, adapter.alpha, adapter.conv_rank, adapter.conv_alpha) == (64, 64, 32, 1)
    assert adapter.targets == "full"
    assert run.optimizer.args["weight_decay"] == 0.1
    assert list(run.optimizer.args["betas"]) == [0.9, 0.95]
    assert run.optimizer.type.endswith("AdamW8bit")
    assert run.optimizer.text_encoder_lr == 5e-5
    assert run.optimizer.loraplus_lr_ratio == 4
    assert run.lr_scheduler.type == "cosine"
    assert (run.trainer.batch_size, run.dataset.size) == (3, (512, 650))
    assert run.dataset.enable_bucket
    assert {arm: one.repeats for arm, one in run.captions.items()} == {"wd": 10, "a-b": 5}
    unknown = [what for what, _ in found.unknown]
    assert "ss_network_args: use_scalar=True" in unknown
    assert "ss_num_reg_images=20" in unknown
    assert any("seed" in what.split(", ") for what in unknown)


def test_what_kohyas_users_set_is_taken_over(tmp_path):
    """20 steps are two whole epochs of the reference, 15 end within the second."""
    entries = {
        "ss_max_train_steps": "15",
        "ss_zero_terminal_snr": "True",
        "modelspec.timestep_range": "200,800",
        "ss_loss_type": "huber",
        "ss_max_token_length": "225",
        "ss_ip_noise_gamma": "0.1",
        "ss_debiased_estimation": "True",
    }
    found = foreign_lora.read_settings(file_of(tmp_path, {**KOHYA, **entries}))
    run = run_of(found, tmp_path / "config")
    assert run.max_train_steps == 15
    assert run.model.zero_terminal_snr and run.model.max_token_length == 225
    assert (run.min_timestep, run.max_timestep) == (200, 800)
    assert (run.loss_type, run.ip_noise_gamma) == ("huber", 0.1)
    assert run.debiased_estimation_loss and not run.multires_noise_iterations


def test_small_images_and_empty_captions_are_trained_on_again(tmp_path):
    folders = {name: {"n_repeats": 3, "img_count": 1} for name in ("3_empty", "3_wd")}
    entries = {
        "ss_dataset_dirs": json.dumps(folders),
        "ss_tag_frequency": json.dumps({"3_empty": {}, "3_wd": {"fox": 1}}),
    }
    found = foreign_lora.read_settings(file_of(tmp_path, {**KOHYA, **entries}))
    run = run_of(found, tmp_path / "config")
    kinds = {arm: (type(one).__name__, one.repeats) for arm, one in run.captions.items()}
    assert kinds == {"empty": ("Empty", 3), "wd": ("Sidecar", 3)}
    Image.new("RGB", (40, 30)).save(tmp_path / "small.png")
    images = select(replace(run.dataset, image_dir=tmp_path))
    assert [image.name for image in images.train] == ["small.png"]


def test_without_metadata_the_tensors_speak(tmp_path):
    found = foreign_lora.read_settings(file_of(tmp_path, None, rank=2, alpha=1.0))
    assert found.settings["adapter.rank"] == 2
    assert found.settings["adapter.alpha"] == 1
    assert {"optimizer.unet_lr", "trainer.max_train_epochs"} <= {what for what, _ in found.unknown}
    run_of(found, tmp_path / "config")


@pytest.mark.parametrize(
    "entries",
    [
        {"ss_network_dim": "8", "ss_unet_lr": "__import__('os')", "ss_resolution": "(" * 500},
        {"ss_dataset_dirs": "[" * 9999, "ss_datasets": "[1]", "ss_network_args": "[]"},
        {"ss_optimizer": "AdamW(**x)", "ss_dataset_dirs": '{"../x": {"n_repeats": 1}}'},
        {"ss_output_name": "n" * 9999, "ss_resolution": "-" * 99999 + "1"},
        {"ss_output_name": "../../etc/\x1b[31m", "ss_num_epochs": "many", "ss_seed": "[1]"},
    ],
)
def test_hostile_entries_are_not_understood_and_said_so(entries, tmp_path):
    folder = tmp_path / "config"
    found = foreign_lora.read_settings(file_of(tmp_path, entries))
    run = run_of(found, folder)
    assert found.unknown
    written = write_experiment(found, folder, "a test", replace=True)
    assert written.resolve().is_relative_to(folder.resolve())
    assert all(arm.isprintable() and "/" not in arm for arm in run.captions)


@pytest.mark.parametrize(
    "entries",
    [
        {"ss_optimizer": "AdamW(note='${oc.env:SECRET_OF_THIS_MACHINE}')"},
        {"ss_optimizer": "AdamW(note='\\\\${oc.env:SECRET_OF_THIS_MACHINE}',x=['${name}'])"},
    ],
)
def test_what_looks_like_a_variable_in_metadata_is_text(entries, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THIS_MACHINE", "hunter2")
    run = run_of(foreign_lora.read_settings(file_of(tmp_path, entries)), tmp_path / "config")
    assert "${oc.env:SECRET_OF_THIS_MACHINE}" in run.optimizer.args["note"]
    written = [path.read_text() for path in (tmp_path / "config").rglob("*.yaml")]
    assert not [text for text in written if "hunter2" in text]


def test_a_variable_that_is_named_as_an_algorithm_is_refused_as_text(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THIS_MACHINE", "hunter2")
    args = {"algo": "${oc.env:SECRET_OF_THIS_MACHINE}"}
    entries = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(args)}
    with pytest.raises(ValueError, match=r"(?i)algo=\$\{oc\.env:SECRET_OF_THIS_MACHINE\}"):
        run_of(foreign_lora.read_settings(file_of(tmp_path, entries)), tmp_path / "config")
    assert not (tmp_path / "config").exists()


def test_the_command_prints_the_table_and_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = file_of(tmp_path, KOHYA)
    with pytest.raises(SystemExit) as end:
        main.main(["reproduce", str(file), "--as-config", "mine", "output_root=none"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "No run in this log has made" in said
    (unknown,) = [line for line in said.splitlines() if line.startswith("Not known: ")]
    assert "the images (give them as dataset.image_dir=FOLDER" in unknown
    assert "lorasweep train --config-dir mine experiment=ref_full-guess" in said
    assert (tmp_path / "mine" / "experiment" / "ref_full-guess.yaml").is_file()


def test_a_file_that_is_no_lora_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"not at all")
    with pytest.raises(SystemExit) as end:
        main.main(["reproduce", "x.safetensors"])
    assert end.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
