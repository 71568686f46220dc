"""A resized LoRA is drawn before and after where its base can be had; else a sentence says why."""

from dataclasses import replace

import pytest
import torch

from adapter_packs import trained
from candidates import candidate
from lorasweep.cli.main import main
from lorasweep.config.compose import compose, compose_without_images
from lorasweep.core.settings import build
from lorasweep.export import diffusers_lora, find_lora, merge
from lorasweep.lora_files import checkpoint, read_lora_file


@pytest.fixture(scope="module")
def tensors(base):
    """A LoRA of the embedded model, as if it had been trained."""
    cfg = compose(["experiment=demo", "adapter.rank=4"])
    return trained(base, (build(cfg.adapter, "adapter"), 0)).file_tensors(0)


@pytest.fixture
def write(tensors, tmp_path, monkeypatch):
    """Write that LoRA with this metadata, and work in its folder."""
    monkeypatch.chdir(tmp_path)

    def write(metadata, width=None):
        own = dict(tensors)
        if width is not None:
            down = next(name for name in own if name.endswith("attn2_to_k.lora_down.weight"))
            own[down] = torch.ones(4, width)
        checkpoint.write(tmp_path / "lora.safetensors", own, metadata)
        return tmp_path / "lora.safetensors"

    return write


def resize(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["resize", *map(str, words)])
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


EMBEDDED = {"ss_sd_model_name": "base_model"}


@pytest.mark.usefixtures("short_pictures")
def test_the_base_that_the_metadata_names_draws_the_pictures(write, capsys):
    path = write(EMBEDDED)
    code, out, _ = resize(capsys, path, "--rank", 4)
    assert code == 0
    assert "Base model, by its metadata" in out
    assert "The pictures before and after are close" in out
    assert read_lora_file.read(path.with_name("lora-resized.safetensors")).sites


def test_a_copy_of_a_runs_file_is_found_by_its_hash(base, write, tmp_path, monkeypatch):
    mine = write({})
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "mlflow.db").touch()
    found = [replace(candidate(3, loss_rel=0.4), hash=checkpoint.data_hash(mine))]
    rest = "revision: null, config: null, allow_pickle: false, clip_skip: 1, prediction_type: null"
    monkeypatch.setattr(find_lora.tracking, "candidates", lambda *_: found)
    monkeypatch.setattr(
        find_lora.tracking, "config_of", lambda *_: f"model: {{path: {base.settings.path}, {rest}}}"
    )
    model, told = find_lora.trained_on(mine, compose_without_images([]))
    assert model.path == base.settings.path
    assert "Base model, of a-e003 in the tracking store" in told
    other = read_lora_file.read(mine).tensors | {"lora_unet_x.alpha": torch.ones(())}
    checkpoint.write(mine, other, {})
    assert find_lora.trained_on(mine, compose_without_images([])) is None


@pytest.mark.parametrize(
    ("metadata", "width", "says"),
    [
        ({}, None, "which base model is it for? its metadata doesn't say; --model PATH gives it"),
        ({"ss_sd_model_name": "mix\x1b[1m_v3"}, None, "its metadata says mix?[1m_v3"),
        ({"ss_sd_model_name": "stable-diffusion-v1-5"}, None, "is not on this machine"),
        (EMBEDDED, 7, "Is it of another base than"),
    ],
)
def test_without_a_base_one_sentence_says_why(metadata, width, says, write, capsys, tmp_path):
    path = write(metadata, width)
    code, out, err = resize(capsys, path, "--rank", 2)
    told = out.splitlines()[-1]
    assert (code, err) == (0, "")
    assert told.startswith("Not checked by a picture: ") and says in told
    assert (tmp_path / "lora-resized.safetensors").is_file()


@pytest.mark.usefixtures("short_pictures")
def test_a_base_that_is_given_must_fit_and_wins(write, capsys, tmp_path):
    path = write({"ss_sd_model_name": "stable-diffusion-v1-5"})
    _, out, _ = resize(capsys, path, "--rank", 2, "--model", "embedded")
    assert "Base model" not in out and "The pictures before and after are" in out
    (tmp_path / "lora-resized.safetensors").unlink()
    code, out, err = resize(capsys, write(EMBEDDED, width=7), "--rank", 2, "--model", "embedded")
    assert (code, out) == (2, "") and "Is it of another base than" in err
    assert not (tmp_path / "lora-resized.safetensors").exists()


def test_a_file_that_is_no_lora_is_told_as_such(tmp_path, capsys):
    file = tmp_path / "cut.safetensors"
    file.write_bytes(b"\x10")
    code, out, err = resize(capsys, file, "--rank", 2)
    assert (code, out) == (2, "") and "not a whole safetensors file" in err


@pytest.mark.usefixtures("short_pictures")
def test_a_merged_lora_is_extracted_again_and_drawn_by_diffusers(write, base, tmp_path, capsys):
    path = write(EMBEDDED)
    merge.merged(base.settings, [(path, 1.0)], tmp_path / "tuned", precision="fp32")
    with pytest.raises(SystemExit) as ended:
        main(["extract", "tuned", "embedded", "--rank", "4", "--out", "again.safetensors"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "Kept energy: 100.00%" in out and "Wrote again.safetensors" in out
    assert "are close: drawn by diffusers' load_lora_weights" in out


@pytest.fixture
def strong(tensors, write):
    """The LoRA 64 times as strong: the model amplifies the last bits to other pictures."""
    path = write(EMBEDDED)
    own = {n: t * (8 if not n.endswith("alpha") else 1) for n, t in tensors.items()}
    checkpoint.write(path, own, EMBEDDED)
    return path


def test_a_lora_so_strong_that_rounding_redraws_the_picture_is_resized(strong, capsys):
    code, _, err = resize(capsys, strong, "--rank", 3)
    assert (code, err) == (0, "")


@pytest.mark.parametrize("to", ["diffusers-lora", "merged"])
def test_a_lora_so_strong_that_rounding_redraws_the_picture_is_compared_by_modules(
    to, strong, capsys, tmp_path
):
    out = tmp_path / ("merged" if to == "merged" else "d.safetensors")
    dtype = ["--dtype=fp32"] if to == "merged" else []
    with pytest.raises(SystemExit) as ended:
        main(["export", str(strong), "--to", to, f"--out={out}", *dtype])
    told = capsys.readouterr()
    assert ended.value.code == 0, told.err
    assert "modules were compared one by one: their outputs agree" in told.out


def test_a_strong_lora_that_is_read_otherwise_is_found_by_its_modules(
    strong, capsys, monkeypatch, tmp_path
):
    honest = diffusers_lora._load

    def other(pipeline, file):
        tensors, metadata = checkpoint.read(file)
        name = next(n for n in tensors if n.endswith("attn2_to_k.lora_up.weight"))
        checkpoint.write(
            tmp_path / "x" / "wrong.safetensors", tensors | {name: 1.01 * tensors[name]}, metadata
        )
        honest(pipeline, tmp_path / "x" / "wrong.safetensors")

    monkeypatch.setattr(diffusers_lora, "_load", other)
    code, _, err = resize(capsys, strong, "--rank", 3)
    assert code == 2 and "attn2.to_k computes otherwise than before" in err


@pytest.mark.usefixtures("short_pictures")
def test_a_file_that_diffusers_reads_otherwise_never_appears(write, capsys, tmp_path, monkeypatch):
    path, honest = write(EMBEDDED), diffusers_lora._load

    def other(pipeline, file):
        tensors, metadata = checkpoint.read(file)
        wrong = {n: t * 0.1 if n.endswith("alpha") else t for n, t in tensors.items()}
        checkpoint.write(tmp_path / "x" / "wrong.safetensors", wrong, metadata)
        honest(pipeline, tmp_path / "x" / "wrong.safetensors")

    monkeypatch.setattr(diffusers_lora, "_load", other)
    code, _, err = resize(capsys, path, "--rank", 2)
    assert code == 2 and "DISAGREE: drawn by diffusers' load_lora_weights" in err
    assert not (tmp_path / "lora-resized.safetensors").exists()
