"""`lorasweep info`: what it says of files by the names and shapes that kohya and LyCORIS write."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from command_line import exit_code
from lorasweep.cli import main
from lorasweep.lora_files import checkpoint, info, read_lora_file

DATA = Path(__file__).parents[1] / "recorded"
KEYS = json.loads(gzip.decompress((DATA / "kohya_keys.json.gz").read_bytes()))
SHAPES = KEYS["lora_dim8"]
ONE = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


def lora(key=ONE, rank=2, out=4, width=768, alpha=1.0):
    return {
        f"{key}.lora_down.weight": torch.ones(rank, width),
        f"{key}.lora_up.weight": torch.ones(out, rank),
        f"{key}.alpha": torch.tensor(alpha),
    }


@pytest.fixture
def described(tmp_path):
    """Info of a file with these tensors and metadata."""

    def describe(tensors, metadata=None):
        save_file(tensors, tmp_path / "a.safetensors", metadata)
        return info.inspect(tmp_path / "a.safetensors")

    return describe


def shown(found, width=200):
    console = Console(width=width, record=True, force_terminal=False)
    info.show(found, console)
    return console.export_text()


def test_kohyas_lora_of_sd15_is_described_from_names_and_shapes_alone(described):
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    tensors |= {name: torch.tensor(4.0) for name in SHAPES if name.endswith("alpha")}
    found = described({name: tensor.half() for name, tensor in tensors.items()})
    assert (found.type, found.written_by, found.targets) == ("LoRA", "kohya", "attn-mlp")
    assert found.base == "Stable Diffusion 1.x"
    assert found.modules == {"unet": 192, "text encoder": 72}
    assert found.ranks == {"text encoder": {"8": 72}, "unet": {"8": 192}}
    assert (found.alphas, found.dtypes) == ({"4": 264}, {"float16": 528})
    assert list(found.norms) == [
        *("text encoder", "down 0", "down 1", "down 2", "mid", "up 1", "up 2", "up 3")
    ]
    assert found.intact is None
    assert "█" in shown(found)


WRITTEN = {
    "lora_dim8_conv8": ("LoRA with 3x3 convolutions (LoCon)", "kohya", 278),
    "lycoris_locon_dim8_conv8": ("LoRA with 3x3 convolutions (LoCon)", "LyCORIS", 282),
    "lycoris_lokr_dim8_conv8": ("LoKr", "LyCORIS", 282),
    "lycoris_loha_dim8_conv8": ("LoHa", "LyCORIS", 282),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_files_of_kohya_and_lycoris_are_told_apart(name, tmp_path):
    """By names and shapes alone; all values are zero, which takes no time to read."""
    type_, writer, modules = WRITTEN[name]
    tensors = {key: torch.zeros(shape).half() for key, shape in KEYS[name].items()}
    save_file(tensors, tmp_path / "a.safetensors")
    file = read_lora_file.read(tmp_path / "a.safetensors")
    parts = Counter(info.part_of(key) for key in file.sites)
    assert (info.type_of(file), file.written_by) == (type_, writer)
    assert parts == {"unet": modules, "text encoder": 72}
    full = info.targets_of(file.sites) == "full"
    assert full == (writer == "LyCORIS")


def test_the_norm_of_a_block_is_that_of_its_deltas(described):
    found = described({**lora(alpha=1.0), **lora("lora_unet_mid_block_attentions_0_proj_in")})
    # each delta is 4 x 768 values of alpha / rank * rank = 1
    assert found.norms == pytest.approx({"down 1": 3072**0.5, "mid": 3072**0.5})


TYPES = {
    "LoHa": {f"{ONE}.hada_{n}": torch.ones(2, 2) for n in ("w1_a", "w1_b", "w2_a", "w2_b")},
    "LoKr": {f"{ONE}.lokr_w1": torch.ones(2, 2), f"{ONE}.lokr_w2": torch.ones(2, 2)},
    "DoRA": {**lora(), f"{ONE}.dora_scale": torch.ones(4, 1)},
    "full difference": {f"{ONE}.diff": torch.ones(4, 3)},
    "OFT": {f"{ONE}.oft_blocks": torch.ones(2, 2, 2)},
    "LoRA with 3x3 convolutions (LoCon)": {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(8, 2, 1, 1),
    },
}


@pytest.mark.parametrize("type_", TYPES)
def test_types_are_told_from_the_names_of_tensors(type_, described):
    assert described(TYPES[type_]).type == type_


GLORA = {"a1": (8, 2), "a2": (2, 8), "b1": (4, 2), "b2": (2, 8)}
RANKS = {
    "2": {f"{ONE}.{name}.weight": torch.ones(shape) for name, shape in GLORA.items()},
    "full": TYPES["full difference"],
    "-": {**TYPES["OFT"], f"{ONE}.alpha": torch.tensor(0.0)},
}


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_is_told_where_the_tensors_have_one(rank, described):
    found = described(RANKS[rank])
    assert found.ranks == {"unet": {rank: 1}}
    assert found.alphas == {"-" if rank == "-" else "none": 1}


@pytest.mark.parametrize(
    ("width", "base"), [(768, "Diffusion 1"), (1024, "Diffusion 2"), (2048, "SDXL"), (128, "embed")]
)
def test_the_base_is_told_from_the_cross_attention(width, base, described):
    assert base in described(lora(width=width)).base


BLOCKS = {
    "lora_te_text_model_encoder_layers_0_mlp_fc1": "text encoder",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": "text encoder 2",
    "lora_unet_conv_in": "in, out, time",
    "lora_unet_time_embedding_linear_1": "in, out, time",
    "lora_unet_down_blocks_3_resnets_0_conv1": "down 3",
    "lora_unet_mid_block_resnets_0_conv1": "mid",
    "lora_unet_up_blocks_2_upsamplers_0_conv": "up 2",
    "lora_unet_input_blocks_4_1_proj_in": "down 1",
    "lora_unet_middle_block_1_proj_in": "mid",
    "lora_unet_output_blocks_5_1_proj_in": "up 1",
}


@pytest.mark.parametrize(("key", "block"), BLOCKS.items())
def test_sites_belong_to_blocks(key, block):
    assert info.block_of(key) == block


def test_a_changed_value_shows_in_the_hash(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, lora(), {"ss_epoch": "3"})
    assert info.inspect(path).intact is True
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = info.inspect(path)
    assert found.intact is False
    assert "CHANGED" in shown(found)


def test_a_hash_by_lycoris_own_rule_is_not_checked(described):
    """An oracle: LyCORIS's own function, of tensors in the order of its modules."""
    from lycoris.utils import precalculate_safetensors_hashes

    found = described(lora(), {"sshs_model_hash": precalculate_safetensors_hashes(lora())})
    assert found.intact is None
    assert "not checked: the file has none by kohya's rule" in shown(found)


def test_training_settings_and_data_sets_come_from_kohyas_entries(described):
    metadata = {
        "ss_unet_lr": "0.0001",
        "ss_network_dim": "2",
        "ss_clip_skip": "None",
        "ss_base_model_version": "sd_v1",
        "ss_dataset_dirs": json.dumps({"10_cat": {"n_repeats": 10, "img_count": 7}}),
        "ss_tag_frequency": json.dumps({"10_cat": {"cat": 7, "red": 2}}),
    }
    found = described(lora(), metadata)
    assert found.training == {"unet lr": "0.0001", "network dim": "2"}
    assert found.datasets == {"10_cat": {"images": 7, "repeats": 10, "different tags": 2}}
    assert "10_cat: 7 images, 10 repeats, 2 different tags" in shown(found)
    assert "the file says sd_v1" in found.base


def test_metadata_cannot_write_to_the_terminal(described):
    evil = "\x1b]0;title\x07\x1b[2J[bold]x[/bold]\r\n\u202eevil"
    metadata = {
        "ss_optimizer": evil,
        "ss_base_model_version": evil,
        "ss_dataset_dirs": json.dumps({evil: {"img_count": 1}}),
        "ss_tag_frequency": "[" * 100_000,
        "ss_seed": "9" * 100_000,
    }
    found = described(lora(), metadata)
    text = shown(found)
    assert not set("\x1b\x07\r\u202e") & set(text)
    assert "[bold]x[/bold]" in text  # as it is, not as markup
    assert len(text) < 5000
    assert found.as_json().isascii() and "\x1b" not in found.as_json()


def test_the_command_prints_json(tmp_path, capsys):
    save_file(lora(), tmp_path / "a.safetensors")
    with pytest.raises(SystemExit) as ended:
        main.main(["info", "--json", str(tmp_path / "a.safetensors")])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["type"] == "LoRA"


def test_the_command_refuses_a_bad_file_in_one_line(tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(b"cut")
    with pytest.raises(SystemExit) as ended:
        main.main(["info", str(tmp_path / "a.safetensors")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_differences_of_norms_and_what_is_left_out_are_shown(described):
    norm = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_norm1"
    found = described(
        {
            **lora(),
            f"{ONE}.diff_b": torch.ones(4),
            f"{norm}.w_norm": torch.ones(8),
            f"{norm}.b_norm": torch.ones(8),
            "lora_unet_conv_in.diff_b": torch.ones(8),
            "bundle_emb.fox.clip_l": torch.ones(2, 768),
        }
    )
    assert found.type == "LoRA and bias difference and norm difference"
    assert found.left_out == {"bundled embeddings": 1}
    assert "left out        1 bundled embeddings" in shown(found)


def test_a_whole_model_is_told_as_such(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    names = ("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x")
    save_file({name: torch.zeros(1) for name in names}, path)
    assert exit_code("info", str(path)) == 0
    assert "a whole model, Stable Diffusion 1.x, and no LoRA" in capsys.readouterr().out
