"""LoRA files: written whole, hashed as kohya does, refused when they can't be trusted."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.lora_files import checkpoint

DATA = Path(__file__).parents[1] / "recorded"
TENSORS = {"a.alpha": torch.tensor(4.0), "a.lora_down.weight": torch.randn(4, 300_000)}


def test_hashes_are_kohyas(tmp_path):
    """sd-scripts hashes the file as it is with the ss_ entries alone."""
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, TENSORS, {"ss_seed": "1", "modelspec.title": "a"})
    _, metadata = checkpoint.read(path)
    alone = save(TENSORS, {"ss_seed": "1"})
    (header,) = struct.unpack("<Q", alone[:8])
    assert metadata["sshs_model_hash"] == hashlib.sha256(alone[8 + header :]).hexdigest()
    part = alone[0x100000:0x110000]
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(part).hexdigest()[:8]
    assert checkpoint.read_metadata(path) == metadata


def test_writing_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, TENSORS, {"ss_epoch": "1"})

    def fails(*args):
        raise OSError("disk full (made by the test)")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(path, TENSORS, {"ss_epoch": "2"})
    assert checkpoint.read_metadata(path)["ss_epoch"] == "1"
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_names_sort_by_epoch_as_kohya_writes_them(tmp_path):
    assert checkpoint.checkpoint_path(tmp_path, "cat", 12).name == "cat-000012.safetensors"
    one = checkpoint.Checkpoint(path=tmp_path, run="cat", epoch=12, step=100)
    assert one.name == "cat-e012"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"not a file of tensors"), "not a whole safetensors file"),
        (lambda path: path.write_bytes(save(TENSORS)[:-100]), "not a whole safetensors file"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2**60)), "not a whole safetensors file"),
        (lambda path: save_file({"a": torch.tensor([1, float("nan")])}, path), "not finite"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(make, says, tmp_path):
    path = tmp_path / "a.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match=says) as caught:
        checkpoint.read(path)
    assert "\n" not in str(caught.value)


def test_pickles_are_never_read(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(TENSORS, path)
    with pytest.raises(CheckpointError, match=r"only \.safetensors"):
        checkpoint.read(path)


def test_training_writes_the_entries_that_kohya_writes(make_run, base):
    """All of sd-scripts' entries; those of options that we don't have as it writes them."""
    from small_training import load, train

    run = make_run("trainer.max_train_epochs=1", "lr_scheduler.warmup=0.25")
    _, last, _ = train(base, load(run, base), run)
    ours = checkpoint.read_metadata(last[run.name].path)
    reference = json.loads((DATA / "kohya_metadata.json").read_text())
    assert set(ours) - set(reference) == {"lorasweep_version"}
    assert set(reference) <= set(ours)
    for name in {"ss_network_module", "modelspec.architecture", *NOT_USED}:
        assert ours[name] == reference[name]
    assert ours["ss_base_model_version"] == "sd_v1_v"  # the demo's predicts v
    assert ours["ss_lr_warmup_steps"] == "0.25"
    # "CLASS(KEY=VALUE,…)" (sd-scripts' train_util.get_optimizer)
    assert ours["ss_optimizer"] == "torch.optim.adamw.AdamW(weight_decay=0.01,fused=True)"
    for name in ("ss_tag_frequency", "ss_dataset_dirs"):
        assert json.loads(ours[name]).keys() == {"1_empty", "1_kosmos", "1_wd"}


NOT_USED = {
    "ss_adaptive_noise_scale",
    "ss_color_aug",
    "ss_debiased_estimation",
    "ss_face_crop_aug_range",
    "ss_fp8_base",
    "ss_fp8_base_unet",
    "ss_full_fp16",
    "ss_huber_c",
    "ss_huber_scale",
    "ss_huber_schedule",
    "ss_ip_noise_gamma",
    "ss_ip_noise_gamma_random_strength",
    "ss_lowram",
    "ss_max_token_length",
    "ss_max_validation_steps",
    "ss_multires_noise_discount",
    "ss_multires_noise_iterations",
    "ss_noise_offset_random_strength",
    "ss_num_validation_images",
    "ss_prior_loss_weight",
    "ss_random_crop",
    "ss_resize_interpolation",
    "ss_sd_scripts_commit_hash",
    "ss_training_comment",
    "ss_v2",
    "ss_validate_every_n_epochs",
    "ss_validate_every_n_steps",
    "ss_validation_seed",
    "ss_validation_split",
}


def test_tags_and_buckets_are_counted_as_sd_scripts_counts_them(make_run, base, tmp_path):
    """Its set_tag_frequency and make_buckets, worked out by hand."""
    from dataclasses import replace

    from PIL import Image

    from lorasweep.training.kohya_metadata import pack_metadata
    from small_training import load

    sizes = ("min_bucket_reso=32", "max_bucket_reso=64", "bucket_reso_steps=32")
    run = make_run("dataset.enable_bucket=true", *(f"dataset.{one}" for one in sizes))
    data = load(run, base)
    items = []
    for size, bucket, caption in (((60, 30), (64, 32), "Red, A b"), ((30, 30), (32, 32), "red,")):
        path = tmp_path / "1_wd" / f"{size[0]}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", size).save(path)
        items.append(replace(data.items[0], path=path, bucket=bucket, caption=caption, repeats=3))
    items.append(replace(items[1], path=items[0].path))  # 2:1 in a square bucket
    said = pack_metadata(run.trainer, base, replace(data, items=items))
    assert json.loads(said["ss_tag_frequency"]) == {"1_wd": {"red": 3, "a b": 1}}
    assert json.loads(said["ss_bucket_info"]) == {
        "buckets": {
            "0": {"resolution": [32, 32], "count": 6},
            "1": {"resolution": [64, 32], "count": 3},
        },
        "mean_img_ar_error": 1 / 3,
    }
