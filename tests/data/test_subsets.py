"""kohya's folders and dataset configs, read as sd-scripts reads them."""

import hashlib
import json
import os
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
import torch
from PIL import Image

from conftest import FEW
from lorasweep.core.settings import SettingsError
from lorasweep.data.dataset import select
from lorasweep.data.subsets import subsets
from lorasweep.lora_files import checkpoint
from lorasweep.runs.prepare import encoded_images, write_folders
from lorasweep.training.pack_loss import PackLoss
from lorasweep.training.sd_scripts_config import dataset_config
from lorasweep.training.training_batches import steps_per_epoch
from lorasweep.training.training_run import TrainingData
from small_training import reports

RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "kohya_subsets.json").read_text())
"""What sd-scripts' own config_util and DreamBoothDataset make of some folders."""
KOHYA = [
    "dataset=kohya",
    "dataset.num_images=all",  # the demo's recipe draws a few
    "dataset.num_holdout=0",
    "dataset.min_size=8",
    "dataset.resolution=[32,32]",
]


def write_files(root: Path, files: dict[str, str | None]) -> Path:
    """Pictures of different colours, and the captions that some of them have."""
    for number, (name, caption) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (number, 200 - number, 40)).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)
    return root


@pytest.fixture
def root(tmp_path):
    root = write_files(tmp_path / "kohya", RECORDED["files"])
    config = RECORDED["config"].replace("{root}", str(root))
    (root / "dataset.toml").write_text(config.replace("resolution = 64", "resolution = 32"))
    return root


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("case", RECORDED["cases"])
def test_folders_and_configs_give_what_sd_scripts_makes_of_them(case, root, make_run, base):
    told = RECORDED["cases"][case]
    reg = [f"dataset.reg_data_dir={root / told['reg_data_dir']}"] if told["reg_data_dir"] else []
    run = make_run(*KOHYA, f"dataset.image_dir={root / told['image_dir']}", *reg)
    images = encoded_images(base, run, write_folders(run))
    names = {digest(root / name): name for name in RECORDED["files"]}
    found = {
        names[digest(item.path)]: {
            "caption": item.caption,
            "repeats": item.repeats,
            "is_reg": item.is_reg,
            **item.settings.own(),
        }
        for item in images.trained
    }
    for name, image in told["images"].items():
        assert image.items() <= found[name].items()
    assert found.keys() == told["images"].keys()
    assert steps_per_epoch(images.trained, run.trainer.batch_size) == told["batches"]


def test_sd_scripts_is_told_of_the_same_folders(root, make_run, base):
    run = make_run(
        *KOHYA, f"dataset.image_dir={root / 'dataset.toml'}", "dataset.prior_loss_weight=0.5"
    )
    images = encoded_images(base, run, write_folders(run))
    config = tomllib.loads(dataset_config(TrainingData(images.trained, run.dataset)))
    told = {Path(one["image_dir"]).name: one for one in config["datasets"][0]["subsets"]}
    assert told.keys() == {"4_cat_woman", "1_dog", "2_woman"}
    assert told["4_cat_woman"]["keep_tokens"] == 2
    assert told["1_dog"]["caption_tag_dropout_rate"] == 0.125
    assert [one["is_reg"] for one in told.values()] == [False, False, True]
    assert told["2_woman"]["num_repeats"] == 2  # sd-scripts counts them up itself


def test_an_image_that_is_held_out_is_trained_on_in_no_folder(tmp_path, make_run, base):
    files = {f"{folder}/{n}.png": None for folder in ("2_sks", "1_other") for n in range(5)}
    root = write_files(tmp_path / "kohya", files)
    for n in range(5):
        (root / "1_other" / f"{n}.png").write_bytes((root / "2_sks" / f"{n}.png").read_bytes())
    run = make_run(*KOHYA, f"dataset.image_dir={root}", "dataset.num_holdout=8")
    images = encoded_images(base, run, write_folders(run))
    train, holdout = ({digest(one.path) for one in of} for of in (images.train, images.holdout))
    assert (len(train), len(holdout)) == (4, 1) and not train & holdout
    assert len(images.train) == 8 and {one.arm for one in images.train} == {"sks", "other"}


def test_folders_of_different_images_are_scored_as_one_arm(root, make_run, base):
    run = make_run(*KOHYA, f"dataset.image_dir={root / 'img'}", "dataset.num_holdout=2")
    images = encoded_images(base, run, write_folders(run))
    assert {one.arm for one in [*images.train, *images.holdout]} == {"all"}


def test_a_caption_that_was_edited_is_trained_on_with_the_next_command(root, make_run):
    run = make_run(*KOHYA, f"dataset.image_dir={root / 'img'}")
    before = write_folders(run)
    assert write_folders(run) == before
    (root / "img/3_dog/d.txt").write_text("a black dog\n")
    assert (write_folders(run) / "train/3_dog/dog_d.txt").read_text() == "a black dog\n"


def test_with_wildcards_all_lines_of_a_caption_come_through(root, make_run, base):
    (root / "img/3_dog/d.txt").write_text("\ufeffa {black|white} dog\n\n  a  hound\n")
    run = make_run(*KOHYA, f"dataset.image_dir={root / 'img'}", "dataset.enable_wildcard=true")
    items = encoded_images(base, run, write_folders(run)).train
    (item,) = [one for one in items if one.path.name == "dog_d.png"]
    assert item.caption == "a {black|white} dog\na hound"
    assert item.prompt == "a black dog"


def test_a_run_on_kohyas_folders_trains_is_scored_and_keeps_its_images(root, make_run, shared_base):
    run = make_run(
        *(*KOHYA, FEW, f"dataset.image_dir={root / 'img'}", f"dataset.reg_data_dir={root / 'reg'}"),
        "sampling.every_n_epochs=0",
        *("dataset.num_holdout=2", "dataset.log_images=true", "trainer.max_train_steps=1"),
    )
    (report,) = reports(run)
    metadata = checkpoint.read(report.checkpoint.path)[1]
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {
        "1_woman": {"n_repeats": 1, "img_count": 3},
        "2_person": {"n_repeats": 2, "img_count": 1},
    }
    assert "val/loss_rel" in report.scores
    (archive,) = run.output_root.glob("datasets/*/originals.zip")
    with ZipFile(archive) as packed:
        assert len(packed.namelist()) == 6 + 4


def test_the_loss_of_a_regularisation_image_counts_its_weight(make_run, base):
    """kohya: loss.mean(dim=(1, 2, 3)) * loss_weights, then the mean of the batch."""
    run = make_run("dataset.prior_loss_weight=0.25", "trainer.min_snr_gamma=null")
    told = {"settings": run.dataset, "prompt": "a dog"}
    items = [SimpleNamespace(is_reg=is_reg, **told) for is_reg in (False, True, True)]
    loss = PackLoss(base, TrainingData(items, run.dataset))
    per_sample = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    states = [SimpleNamespace(run=run)] * 2
    found = loss._weighted(per_sample, torch.zeros(6), states, [[0, 1, 2], [2, 0, 1]])
    assert found.tolist() == pytest.approx([(1 + 0.5 + 1) / 3, (2 + 16 + 8) / 3])


SUBSET = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='{root}/img/3_dog'\n"
REFUSED = {
    "no TOML": ("[[datasets", "is not TOML"),
    "two data sets": (SUBSET + SUBSET, "must be there once"),
    "no subset": ("[[datasets]]\n", "[[datasets.subsets]] is missing"),
    "no folder": ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats=1", "image_dir is missing"),
    "a folder that isn't there": (SUBSET.replace("3_dog", "4_dog"), "there is no such folder"),
    "a word of nobody": (f"{SUBSET}flip_augmentation=true", "did you mean flip_aug?"),
    "a word of another table": (f"[general]\nis_reg=true\n{SUBSET}", "is_reg: there is no such"),
    "another table": (f"{SUBSET}[optimizer]\nlr=1", "optimizer: there is no such setting"),
    "a table that is none": (f"general=3\n{SUBSET}", "must be a table"),
    "captions in a JSON": (f"{SUBSET}metadata_file='x.json'", "metadata_file is not read"),
    "random_crop": (f"{SUBSET}random_crop=true", "random_crop=True can't be: an image's latents"),
    "color_aug": (f"[general]\ncolor_aug=true\n{SUBSET}", "color_aug=True can't be: an image's"),
    "a wrong type": (f"{SUBSET}keep_tokens='two'", "subset 1.keep_tokens=two"),
    "repeats without end": (f"{SUBSET}num_repeats=100000", "repeats are 1 to 10000"),
    "a path as extension": (f"{SUBSET}caption_extension='/../x'", "must be as .txt"),
    "regularisation alone": (f"{SUBSET}is_reg=true", "give one to train on"),
    "another size": (
        f"[general]\nresolution=768\nenable_bucket=true\nbatch_size=7\n{SUBSET}",
        "add dataset.resolution=[768,768] dataset.enable_bucket=true trainer.batch_size=7",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_dataset_config_that_cannot_be_followed_is_one_line(case, root, make_run):
    text, message = REFUSED[case]
    (root / "dataset.toml").write_text(text.replace("{root}", str(root)))
    with pytest.raises(SettingsError, match=re.escape(message)) as error:
        select(make_run(*KOHYA, f"dataset.image_dir={root / 'dataset.toml'}").dataset)
    assert "\n" not in str(error.value)


def test_regularisation_images_go_with_any_folder_and_are_not_among_its_own(root, make_run, base):
    (root / "reg").rename(root / "img/3_dog/reg")
    reg = f"dataset.reg_data_dir={root / 'img/3_dog/reg'}"
    run = make_run(*KOHYA[1:], f"dataset.image_dir={root / 'img/3_dog'}", reg, "captions=[empty]")
    images = encoded_images(base, run, write_folders(run))
    assert {item.caption for item in images.train} == {""} and len(images.train) == 2
    assert {item.caption for item in images.reg} == {"woman", "a woman", "person"}
    assert sum(item.repeats for item in images.reg) == sum(item.repeats for item in images.train)


def test_a_folder_that_is_named_as_an_arm_is_refused(root, make_run):
    (root / "reg/1_woman").rename(root / "reg/1_empty")
    reg = f"dataset.reg_data_dir={root / 'reg'}"
    run = make_run(*KOHYA[1:], f"dataset.image_dir={root / 'img/3_dog'}", reg, "captions=[empty]")
    with pytest.raises(SettingsError, match=r"captions\.empty and a folder of dataset\.reg_data_d"):
        write_folders(run)


def test_folders_of_one_name_are_two_arms(tmp_path, make_run):
    root = write_files(tmp_path / "kohya", dict.fromkeys(["img/9_a b/x.png", "reg/1_a b/y.png"]))
    run = make_run(
        *KOHYA, f"dataset.image_dir={root / 'img'}", f"dataset.reg_data_dir={root / 'reg'}"
    )
    assert [one.name for one in subsets(run.dataset)] == ["a_b", "a_b-2"]


def test_a_dataset_config_may_be_json(root, make_run):
    (root / "dataset.toml").with_suffix(".json").write_text(
        json.dumps(tomllib.loads((root / "dataset.toml").read_text()))
    )
    found = [
        subsets(make_run(*KOHYA, f"dataset.image_dir={root}/dataset.{kind}").dataset)
        for kind in ("toml", "json")
    ]
    assert found[0] == found[1] and len(found[0]) == 3


def test_what_has_no_effect_is_refused_or_said(root, make_run, caplog):
    with pytest.raises(SettingsError, match="captions has no effect with dataset=kohya"):
        make_run(*KOHYA, f"dataset.image_dir={root / 'img'}", "captions=[empty]")
    with pytest.raises(SettingsError, match="no folder in it is named like 10_name"):
        select(make_run(*KOHYA, f"dataset.image_dir={root / 'img/3_dog'}").dataset)
    with pytest.raises(SettingsError, match="dataset config takes dataset=kohya"):
        select(make_run(f"dataset.image_dir={root / 'dataset.toml'}").dataset)
    select(make_run(*KOHYA, f"dataset.image_dir={root / 'img'}").dataset)
    assert "folders without repeats are not read: notes" in caplog.text


@pytest.mark.parametrize("kind", ["caption", "image", "folder"])
def test_a_link_out_of_the_folder_is_not_followed(kind, root, make_run, tmp_path, caplog):
    secret = write_files(tmp_path / "secret", {"s.png": "a secret\n"})
    dog = root / "img/3_dog"
    if kind == "caption":
        (dog / "d.txt").unlink()
        (dog / "d.txt").symlink_to(secret / "s.txt")
    elif kind == "image":
        (dog / "s.png").symlink_to(secret / "s.png")
    else:
        (root / "img/5_secret").symlink_to(secret)
    run = make_run(*KOHYA, f"dataset.image_dir={root / 'img'}")
    if kind == "caption":
        with pytest.raises(SettingsError, match="leads out of the image folder"):
            write_folders(run)
    else:
        assert not list(write_folders(run).rglob("*_s.png"))
        assert "lead out of" in caplog.text


def test_a_caption_that_is_a_pipe_is_not_waited_for(root, make_run):
    (root / "img/3_dog/e.txt").unlink()
    os.mkfifo(root / "img/3_dog/e.txt")
    with pytest.raises(SettingsError, match="is a device or a pipe"):
        write_folders(make_run(*KOHYA, f"dataset.image_dir={root / 'img'}"))
