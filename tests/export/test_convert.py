"""Single file <-> diffusers folder: bit by bit, checked by a picture, nothing silent."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_packs import predict
from lorasweep.cli.main import main
from lorasweep.core.atomic_write import TargetError
from lorasweep.export import read_back, whole_model
from lorasweep.export.convert_model import convert
from lorasweep.export.exported import ExportError
from lorasweep.export.picture_check import Canvas
from lorasweep.export.single_file_names import ModelLayout
from lorasweep.models.model_files import ModelError


@pytest.fixture(scope="module")
def embedded(base):
    return base.settings.path


@pytest.fixture(scope="module")
def single(embedded, tmp_path_factory):
    """The embedded model as a single file."""
    target = tmp_path_factory.mktemp("single") / "model.safetensors"
    done = convert(embedded, target, config=None)
    assert "pictures before and after agree" in done.lines[-1]
    return target


@pytest.fixture(scope="module")
def folder(single, embedded, tmp_path_factory):
    """That file as a folder again."""
    target = tmp_path_factory.mktemp("folder") / "model"
    convert(str(single), target, config=embedded)
    return target


def same(one, other):
    """Equal names, types and bits."""
    return set(one) == set(other) and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )


def test_round_trips_are_bit_equal_both_ways(embedded, single, folder, tmp_path):
    there, back = whole_model.read(embedded), whole_model.read(str(folder))
    assert all(same(there.weights[part], back.weights[part]) for part in there.weights)
    convert(str(folder), tmp_path / "again.safetensors", config=None)
    assert (tmp_path / "again.safetensors").read_bytes() == single.read_bytes()


def test_the_folder_has_the_text_encoders_prefix_and_predicts_the_same(base, folder, make_run):
    """Without the prefix, transformers before 5 load random weights with only a warning."""
    names = set(load_file(folder / "text_encoder" / "model.safetensors"))
    assert all(name.startswith("text_model.") for name in names)
    loaded = make_run(f"model.path={folder}").model.load()
    assert torch.equal(predict(loaded, None), predict(base, None))


def test_the_folder_is_whole(embedded, folder):
    def files(root):
        found = {str(path.relative_to(root)) for path in Path(root).rglob("*.*")}
        return {name for name in found if not name.endswith((".md", ".png"))}

    assert files(folder) == files(embedded)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == [None, None]


def test_a_folder_loads_in_one_type_when_its_user_asks_for_none(folder):
    pipeline = read_back.load(folder, folder, "StableDiffusionPipeline")  # its files are fp16
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == torch.float32


def test_a_precision_casts_every_tensor(embedded, tmp_path):
    convert(embedded, tmp_path / "model.safetensors", config=None, precision="fp32")
    types = {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()}
    assert types == {torch.float32}


def test_a_taken_target_is_kept_unless_it_is_to_be_overwritten(embedded, single, folder, tmp_path):
    with pytest.raises(TargetError, match="--overwrite"):
        convert(embedded, single, config=None)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(TargetError, match="not a diffusers model's"):
        convert(str(single), tmp_path / "photos", config=embedded, overwrite=True)
    (folder / "stale.txt").write_text("")
    convert(str(single), folder, config=embedded, overwrite=True)
    assert not (folder / "stale.txt").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


def test_what_real_files_hold_besides_is_counted_and_the_unknown_named(
    embedded, single, tmp_path, caplog
):
    tensors = load_file(single)
    known = ["model_ema.decay", "model_ema.num_updates", "alphas_cumprod"]
    known += ["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    tensors |= {name: torch.ones(1) for name in [*known, "a.riddle"]}
    save_file(tensors, tmp_path / "real.safetensors")
    with caplog.at_level(logging.WARNING):
        model = whole_model.read(str(tmp_path / "real.safetensors"), embedded)
    assert sorted(model.notes) == [
        "Left out: 1 x noise schedule",
        "Left out: 1 x position ids",
        "Left out: 2 x EMA copies of weights",
    ]
    assert "a.riddle" in caplog.text
    assert "model_ema" not in caplog.text


def test_a_file_without_its_vae_is_refused(embedded, single, tmp_path):
    tensors = load_file(single)
    kept = {name: t for name, t in tensors.items() if not name.startswith("first_stage_model")}
    save_file(kept, tmp_path / "cut.safetensors")
    with pytest.raises(ModelError, match="156 of the vae's 156 tensors are missing"):
        whole_model.read(str(tmp_path / "cut.safetensors"), embedded)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("conditioner.embedders.0.x", "single files of SDXL come later"),
        ("cond_stage_model.model.x", "only 1.x is supported"),
        ("lora_unet_x.alpha", "a LoRA, not a whole model"),
        ("x", "not a whole model"),
    ],
)
def test_other_files_are_refused_in_a_line(name, says, embedded, tmp_path):
    save_file({name: torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=says):
        whole_model.read(str(tmp_path / "other.safetensors"), embedded)


def test_pickles_sdxl_folders_and_broken_files_are_refused_in_a_line(embedded, tmp_path):
    for name in ("model.ckpt", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x04")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    for source, says in {
        "model.ckpt": "only .safetensors",
        "cut.safetensors": "not a whole safetensors file",
        "": "SDXL comes later",
        "nowhere.safetensors": "no such file",
    }.items():
        with pytest.raises(ModelError, match=says) as caught:
            whole_model.read(str(tmp_path / source), embedded)
        assert "\n" not in str(caught.value)


def test_a_hub_id_that_cannot_be_reached_is_one_line():
    with pytest.raises(ModelError, match="nobody/nothing: no such file or folder") as caught:
        whole_model.read("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_messages_name_what_the_command_line_gave(single, tmp_path):
    with pytest.raises(ModelError, match=r"SOURCE=\S+gone\.safetensors: no such file"):
        convert(str(tmp_path / "gone.safetensors"), tmp_path / "copy", config=None)
    for config, says in {None: "by --config", "/nowhere": "--config=/nowhere: no such"}.items():
        with pytest.raises(ModelError, match=says):
            convert(str(single), tmp_path / "copy", config=config)


def test_two_files_or_two_folders_are_refused(embedded, single, tmp_path):
    with pytest.raises(ExportError, match="both a single file"):
        convert(str(single), tmp_path / "copy.safetensors", config=embedded)
    with pytest.raises(ExportError, match="both a folder"):
        convert(embedded, tmp_path / "copy", config=None)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        # the first shows in no picture: only reading back finds it
        ("first_stage_model.encoder.conv_in.weight", "vae's encoder.conv_in.weight otherwise"),
        ("model.diffusion_model.out.2.weight", "unet's conv_out.weight otherwise"),
    ],
)
def test_a_wrong_conversion_is_an_error_and_leaves_nothing(
    name, says, embedded, tmp_path, monkeypatch
):
    right = ModelLayout.to_original

    def wrong(self, weights):
        tensors = right(self, weights)
        return tensors | {name: tensors[name].flip(0).contiguous()}

    monkeypatch.setattr(ModelLayout, "to_original", wrong)
    with pytest.raises(ExportError, match=says):
        convert(embedded, tmp_path / "model.safetensors", config=None)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_picture_is_an_error_and_leaves_nothing(embedded, tmp_path, monkeypatch):
    """Right tensors, wrong noise schedule: what the user's library draws is what counts."""

    right = Canvas.of

    def wrong(base):
        sample = {**base.scheduler_config, "prediction_type": "sample"}
        return replace(right(base), scheduler_config=sample)

    monkeypatch.setattr(Canvas, "of", wrong)
    with pytest.raises(ExportError, match="DISAGREE"):
        convert(embedded, tmp_path / "model.safetensors", config=None)
    assert list(tmp_path.iterdir()) == []


def test_the_demos_model_is_known_by_its_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["embedded", "one.safetensors"], ["one.safetensors", "two", "--config=embedded"]):
        with pytest.raises(SystemExit) as ended:
            main(["convert", *words])
        assert ended.value.code == 0, capsys.readouterr().err
    assert "pictures before and after agree" in capsys.readouterr().out
