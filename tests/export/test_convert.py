"""Single file <-> diffusers folder: bit by bit, checked by a picture, nothing silent."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapter_packs import predict
from lorasweep.cli.main import main
from lorasweep.core.atomic_write import TargetError
from lorasweep.export import diffusers_folder, read_back, whole_model
from lorasweep.export.convert_model import convert
from lorasweep.export.exported import ExportError
from lorasweep.export.single_file_names import ModelLayout
from lorasweep.models import file_schedule
from lorasweep.models.model_files import ModelError

pytestmark = pytest.mark.usefixtures("short_pictures")


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
    assert same(load_file(tmp_path / "again.safetensors"), load_file(single))


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


def test_a_tokenizer_of_one_file_becomes_three_for_older_transformers(embedded, tmp_path):
    source = tmp_path / "new"
    shutil.copytree(embedded, source)
    for name in ("vocab.json", "merges.txt"):
        (source / "tokenizer" / name).unlink()
    weights = whole_model.read(str(source)).weights
    diffusers_folder.write_folder(tmp_path / "out", weights, source, {})
    ours, theirs = tmp_path / "out" / "tokenizer", Path(embedded) / "tokenizer"
    read = [json.loads((folder / "vocab.json").read_text()) for folder in (ours, theirs)]
    assert read[0] == read[1]
    lines = [(folder / "merges.txt").read_text().split() for folder in (ours, theirs)]
    assert lines[0] == lines[1]


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
    with pytest.raises(ModelError, match=r"holds no VAE: .* take one by --vae"):
        whole_model.read(str(tmp_path / "cut.safetensors"), embedded)


@pytest.fixture(scope="module")
def without_vae(single, tmp_path_factory):
    """The single file without its VAE."""
    file = tmp_path_factory.mktemp("cut") / "model.safetensors"
    kept = {n: t for n, t in load_file(single).items() if not n.startswith("first_stage_model")}
    save_file(kept, file, {"modelspec.prediction_type": "v"})
    return file


def vae_under(names, single, embedded, tmp_path):
    """The embedded model's VAE as it is given by --vae."""
    prefix = "first_stage_model."
    original = {n: t for n, t in load_file(single).items() if n.startswith(prefix)}
    ours = Path(embedded) / "vae"
    if names == "a model's file":
        return single
    if names == "a model's folder":
        return embedded
    if names == "its folder":
        return ours
    if names == "diffusers' file":
        return ours / "diffusion_pytorch_model.safetensors"
    bare = {name.removeprefix(prefix): tensor for name, tensor in original.items()}
    save_file(bare | {"loss.logvar": torch.ones(1)}, tmp_path / "vae.safetensors")
    return tmp_path / "vae.safetensors"


@pytest.mark.parametrize(
    "names",
    ["a model's file", "a model's folder", "its folder", "diffusers' file", "the original file"],
)
def test_a_vae_is_given_to_a_file_without_one(names, without_vae, single, embedded, tmp_path):
    vae = vae_under(names, single, embedded, tmp_path)
    read = whole_model.read(str(without_vae), embedded, vae=str(vae))
    whole = whole_model.read(embedded)
    assert all(same(whole.weights[part], read.weights[part]) for part in whole.weights)
    assert any(line.startswith("VAE: of") for line in read.notes)


def test_another_vae_takes_the_place_of_a_models_own(embedded, tmp_path):
    vae = tmp_path / "vae"
    shutil.copytree(Path(embedded) / "vae", vae)
    file = vae / "diffusion_pytorch_model.safetensors"
    tensors = {name: 1.25 * tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    target = tmp_path / "model.safetensors"
    convert(embedded, target, config=None, vae=str(vae))
    read = whole_model.read(str(target), embedded)
    assert same(read.weights["vae"], whole_model.read(embedded, vae=str(file)).weights["vae"])
    assert not same(read.weights["vae"], whole_model.read(embedded).weights["vae"])


def test_what_is_no_vae_of_this_model_is_refused(embedded, single, tmp_path):
    shutil.copytree(Path(embedded) / "vae", tmp_path / "xl")
    config = json.loads((tmp_path / "xl" / "config.json").read_text())
    (tmp_path / "xl" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.13025}))
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    for vae, says in {
        "xl": "scaling_factor is 0.13025",
        "x.safetensors": "156 of a VAE's 156 tensors are missing",
        "nowhere": "no such file or folder",
    }.items():
        with pytest.raises(ModelError, match=says):
            whole_model.read(str(single), embedded, vae=str(tmp_path / vae))


def test_a_file_with_nais_names_of_the_text_encoder_is_read_everywhere(
    single, embedded, base, make_run, tmp_path
):
    """NAI and what was merged with it lack a level of the names, and hold the position ids."""
    level = "cond_stage_model.transformer."
    tensors = {n.replace(f"{level}text_model.", level): t for n, t in load_file(single).items()}
    tensors[f"{level}embeddings.position_ids"] = torch.arange(77)[None]
    file = tmp_path / "nai.safetensors"
    save_file(tensors, file)
    done = convert(str(file), tmp_path / "model", config=embedded)
    assert "pictures before and after agree" in done.lines[-1]
    settings = make_run(f"model.path={file}", f"model.config={embedded}").model
    loaded = whole_model.base_for_loras(settings)
    assert torch.equal(predict(loaded, None), predict(base, None))
    with pytest.raises(ModelError, match="NAI"):
        settings.load()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("conditioner.embedders.0.x", "exports of single files of SDXL come later"),
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


@pytest.mark.parametrize("lost", ["all", "ztsnr"])
def test_a_file_that_does_not_say_its_schedule_is_an_error(lost, embedded, tmp_path, monkeypatch):
    """Right tensors, wrong noise schedule: what the user's library draws is what counts."""
    right = file_schedule.as_said

    def wrong(schedule):
        _, metadata = right(schedule)
        return {}, metadata if lost == "ztsnr" else {}

    monkeypatch.setattr(file_schedule, "as_said", wrong)
    with pytest.raises(ExportError, match="DISAGREE"):
        convert(embedded, tmp_path / "model.safetensors", config=None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_say_its_schedule_is_an_error(single, plain, tmp_path, monkeypatch):
    right = diffusers_folder.write_folder
    monkeypatch.setattr(diffusers_folder, "write_folder", lambda *given: right(*given[:3], {}))
    with pytest.raises(ExportError, match="DISAGREE"):
        convert(str(single), tmp_path / "model", config=str(plain))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def plain(embedded, tmp_path_factory):
    """The embedded model's configs with Stable Diffusion 1.5's own noise schedule: epsilon."""
    folder = tmp_path_factory.mktemp("plain") / "configs"
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(embedded, folder, ignore=weights)
    schedule = {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_file_says_what_it_predicts_and_how_its_schedule_ends(single):
    """By the keys that ComfyUI and Forge look for, and by sd-scripts' metadata."""
    with safe_open(single, "pt") as file:
        assert {"v_pred", "ztsnr"} < set(file.keys())
        assert file.metadata()["modelspec.prediction_type"] == "v"


def own_picture(folder):
    """What diffusers draws with a folder as it is, its own sampler included."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(1)
    drawn = pipeline(
        "a fox", num_inference_steps=4, generator=seed, output_type="np", height=64, width=64
    )
    return torch.from_numpy(drawn.images[0])


def test_a_file_of_v_and_zero_terminal_snr_becomes_a_folder_of_them(
    single, plain, embedded, tmp_path
):
    """Configs of a model that predicts the noise don't make it one."""
    done = convert(str(single), tmp_path / "model", config=str(plain))
    assert "Noise schedule: the model predicts v, with zero terminal SNR" in done.lines
    found = DDIMScheduler.load_config(tmp_path / "model", subfolder="scheduler")
    assert (found["prediction_type"], found["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert torch.equal(own_picture(tmp_path / "model"), own_picture(embedded))


@pytest.mark.parametrize(
    ("names", "metadata", "predicts", "ends_in_noise"),
    [
        (["v_pred"], {}, "v_prediction", False),
        (["v_pred", "ztsnr"], {}, "v_prediction", True),
        ([], {"modelspec.prediction_type": "v"}, "v_prediction", False),
        ([], {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
        ([], {}, "epsilon", False),
    ],
)
def test_what_a_file_says_of_its_schedule_is_taken_wherever_it_is_read(
    names, metadata, predicts, ends_in_noise, single, plain, tmp_path, make_run
):
    file = tmp_path / "model.safetensors"
    kept = {n: t for n, t in load_file(single).items() if n not in ("v_pred", "ztsnr")}
    save_file(kept | {name: torch.empty(0) for name in names}, file, metadata)
    read = whole_model.read(str(file), str(plain))
    assert read.schedule.get("prediction_type", "epsilon") == predicts
    assert any("doesn't say what it predicts" in line for line in read.notes) == (
        not names and not metadata
    )
    loaded = make_run(f"model.path={file}", f"model.config={plain}").model.load()
    assert loaded.noise_schedule.prediction_type == predicts
    assert (float(loaded.noise_schedule.scheduler.alphas_cumprod[-1]) < 1e-6) == ends_in_noise
    assert bool(read.schedule.get("rescale_betas_zero_snr")) == ends_in_noise


def test_the_settings_stand_above_what_a_file_says(single, plain, embedded):
    read = whole_model.read(str(single), str(plain), told={"prediction_type": "epsilon"})
    assert read.schedule["prediction_type"] == "epsilon"
    assert whole_model.read(embedded, told={"prediction_type": "epsilon"}).schedule[
        "prediction_type"
    ] == ("epsilon")


def test_what_no_file_can_say_of_a_schedule_is_told(plain, embedded, tmp_path):
    schedule = json.loads((plain / "scheduler" / "scheduler_config.json").read_text())
    folder = tmp_path / "other"
    shutil.copytree(embedded, folder)
    other = json.dumps({**schedule, "beta_end": 0.02, "prediction_type": "v_prediction"})
    (folder / "scheduler" / "scheduler_config.json").write_text(other)
    done = convert(str(folder), tmp_path / "m.safetensors", config=None)
    assert any("No file can say the model's beta_end=0.02" in line for line in done.lines)
    assert not any("ztsnr" in line for line in done.lines)


def test_the_demos_model_is_known_by_its_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["embedded", "one.safetensors"], ["one.safetensors", "two", "--config=embedded"]):
        with pytest.raises(SystemExit) as ended:
            main(["convert", *words])
        assert ended.value.code == 0, capsys.readouterr().err
    assert "pictures before and after agree" in capsys.readouterr().out
