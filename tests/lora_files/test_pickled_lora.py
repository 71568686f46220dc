"""A pickled LoRA is read with a person's consent alone, and then nothing of it is run."""

import pytest
import torch
from safetensors.torch import load_file

from lorasweep.adapters.kohya_names import sites
from lorasweep.cli.main import main
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.lora_files import pickled_lora

PICKLE = b"\x80\x04cposix\nsystem\n(S'touch PWNED'\ntR."


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["export", *words, "--to=kohya", "model=embedded"])
    return ended.value.code, capsys.readouterr()


def test_a_pickle_is_exported_with_consent_only(base, here, capsys):
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for site in sites(base.parts, "unet-only"):
        kernel = (1, 1) if site.is_conv else ()
        out, width = site.weight.shape[:2]
        tensors[f"{site.key}.lora_down.weight"] = torch.randn(2, width, *kernel, generator=draw)
        tensors[f"{site.key}.lora_up.weight"] = torch.randn(out, 2, *kernel, generator=draw)
        tensors[f"{site.key}.alpha"] = torch.tensor(1.0)
    torch.save({"state_dict": tensors, "epoch": 3}, here / "a.ckpt")
    (here / "other").mkdir()
    torch.save(tensors, here / "other" / "a.pt")
    code, told = export(capsys, "a.ckpt", "--out=a.safetensors")
    assert (code, told.err.count("\n")) == (2, 1)
    assert "--to kohya --allow-pickle" in told.err
    code, told = export(capsys, "a.ckpt", "--out=a.safetensors", "--allow-pickle")
    assert (code, told.err) == (0, "")
    found = load_file(here / "a.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    both = ("a.ckpt", "--with=other/a.pt=0.5", "--out=b.safetensors")
    assert export(capsys, *both)[0] == 2
    code, told = export(capsys, *both, "--allow-pickle")
    assert (code, told.err) == (0, "") and "2 LoRAs are one" in told.out


@pytest.mark.parametrize("content", [PICKLE, b"", b"PK\x03\x04" + b"\x00" * 40, b"not a pickle"])
def test_a_program_or_a_damaged_pickle_is_refused_even_then(content, here, capsys):
    (here / "a.pt").write_bytes(content)
    code, told = export(capsys, "a.pt", "--allow-pickle")
    assert (code, told.err.count("\n")) == (2, 1)
    assert "a.pt is not a whole pickle of tensors alone" in told.err
    assert not (here / "PWNED").exists()


@pytest.mark.parametrize("value", [[1], {}, {"a": 1}, {1: torch.ones(1)}, {"state_dict": None}])
def test_a_pickle_without_named_tensors_is_refused(value, tmp_path):
    torch.save(value, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"a\.bin holds no tensors by name"):
        pickled_lora.as_safetensors(tmp_path / "a.bin", tmp_path)
