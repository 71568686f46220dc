"""LoRA files of any program are read as one; hostile ones are refused in one sentence."""

import json
import struct
from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file

from lorasweep.adapters.kohya_names import every_site, sites
from lorasweep.adapters.pack import computing_with
from lorasweep.cli import main
from lorasweep.core import safetensors_header
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.judging.judge import load_pack
from lorasweep.lora_files import checkpoint, peft_names, read_lora_file
from lorasweep.lora_files.kohya_form import kohya_form
from lorasweep.lora_files.peft_config import METADATA_KEY
from lorasweep.lora_files.site_names import parsed

KEY = "lora_unet_down_blocks_0_attentions_0_proj_in"
DOWN, UP, ALPHA = f"{KEY}.lora_down.weight", f"{KEY}.lora_up.weight", f"{KEY}.alpha"


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def content(head, data=b"", length=None):
    """A file byte by byte: the length of the header, the header, the data."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


WHOLE = {DOWN: entry([2, 3], 0, 24), UP: entry([4, 2], 24, 56), ALPHA: entry([], 56, 60)}
DATA = struct.pack("<15f", *[0.5] * 14, 2.0)


def changed(name, **parts):
    return {**WHOLE, name: {**WHOLE[name], **parts}}


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}'
NAN = DATA[:-4] + struct.pack("<f", float("nan"))
INF = DATA[:-4] + struct.pack("<f", float("inf"))

HOSTILE = {
    "empty file": (b"", "0 bytes"),
    "no header": (b"\x01\x00", "2 bytes"),
    "a pickle": (b"PK\x03\x04" + b"\x00" * 40, "header"),
    "header longer than the file": (content(WHOLE, DATA, 10**6), "claims 1000000 bytes"),
    "header of 2**63 bytes": (content(WHOLE, DATA, 2**63), "header claims"),
    "header not JSON": (content(b"{not json", DATA), "not JSON"),
    "header not text": (content(b"\xff\xfe\x00", DATA), "not JSON"),
    "header nested without end": (content(b"[" * 200_000, DATA), "not JSON"),
    "header a list": (content([1], DATA), "not a JSON object"),
    "metadata not texts": (content({"__metadata__": {"a": 1}}), "__metadata__"),
    "a number of 5,000 digits": (content(b'{"a":' + b"1" * 5000 + b"}"), "not JSON"),
    "a name twice": (content(TWICE, b"\x00" * 4), "twice"),
    "cut": (content(WHOLE, DATA[:-8]), "claims 60 bytes of data, the file has 52"),
    "more data than claimed": (content(WHOLE, DATA + b"x"), "the file has 61"),
    "huge shape": (content(changed(DOWN, shape=[2**40, 2**40]), DATA), "data_offsets"),
    "shape that overflows": (content(changed(DOWN, shape=[2**62, 4]), DATA), "not sizes"),
    "shape below zero": (content(changed(DOWN, shape=[-2, -3]), DATA), "not sizes"),
    "shape of texts": (content(changed(DOWN, shape=["2", "3"]), DATA), "not sizes"),
    "offsets beyond": (content(changed(ALPHA, data_offsets=[10**12, 10**12 + 4]), DATA), "gap"),
    "offsets overlap": (content(changed(UP, data_offsets=[20, 52]), DATA), "overlaps"),
    "offsets backwards": (content(changed(UP, data_offsets=[56, 24]), DATA), "data_offsets"),
    "one offset": (content(changed(UP, data_offsets=[24]), DATA), "1 data_offsets"),
    "no dtype": (content({DOWN: {"shape": [1], "data_offsets": [0, 4]}}, b"1234"), "dtype"),
    "unknown type": (content(changed(DOWN, dtype="F31"), DATA), "F31"),
    "weights of whole numbers": (content(changed(DOWN, dtype="I32"), DATA), "whole numbers"),
    "no values": (content({DOWN: entry([0, 3], 0, 0)}), "no names of a LoRA"),
    "a name without end": (content({"a" * 10**5: entry([1], 0, 4)}, b"1234"), "100000 characters"),
    "NaN": (content(WHOLE, NAN), "not finite"),
    "infinite": (content(WHOLE, INF), "not finite"),
    "no tensors": (content({}), "no tensors"),
    "names of nothing": (content({"a.b": entry([1], 0, 4)}, DATA[:4]), "no names of a LoRA"),
    "a text encoder's own weight": (
        content({"encoder.layers.0.mlp.fc1.weight": entry([1], 0, 4)}, DATA[:4]),
        "no names of a LoRA",
    ),
    "control characters": (content({"\x1b[31m.b": entry([1], 0, 4)}, DATA[:4]), r"\?\[31m"),
    "only one factor": (content({DOWN: entry([2, 3], 0, 24)}, DATA[:24]), "don't fit"),
    "ranks differ": (content(changed(UP, shape=[2, 4]), DATA), "don't fit"),
    "flat factor": (content(changed(DOWN, shape=[6]), DATA), "don't fit"),
    "alpha of two numbers": (
        content(
            {ALPHA: entry([2], 0, 8), DOWN: entry([1, 1], 8, 12), UP: entry([1, 1], 12, 16)},
            DATA[:16],
        ),
        "alpha must be one number",
    ),
    "a neighbour that changes what the others mean": (  # AdaLoRA's
        content({**WHOLE, f"{KEY}.lora_E": entry([1], 60, 64)}, DATA + DATA[:4]),
        "lora_E is of no type that is read",
    ),
    "a factor of old LyCORIS": (
        content({**WHOLE, f"{KEY}.scalar": entry([], 60, 64)}, DATA + DATA[:4]),
        "without scalar the others can't be right",
    ),
    "a neighbour of another type": (
        content({**WHOLE, f"{KEY}.hada_w1_a": entry([1], 60, 64)}, DATA + DATA[:4]),
        "hada_w1_a belongs to no lora",
    ),
    "a delta larger than any module": (
        content(
            {DOWN: entry([1, 2**14], 0, 2**16), UP: entry([2**14, 1], 2**16, 2**17)}, bytes(2**17)
        ),
        "no module is as large",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_sentence(name, tmp_path):
    content, says = HOSTILE[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_lora_file.read(path)
    message = str(caught.value)
    assert message.isprintable() and message.count(str(path)) == 1 and len(message) < 400


@pytest.mark.parametrize("name", ["cut", "header of 2**63 bytes", "header not JSON", "no header"])
def test_metadata_alone_is_refused_alike(name, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(HOSTILE[name][0])
    with pytest.raises(CheckpointError):
        checkpoint.read_metadata(path)


def test_a_header_over_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_header, "MAX_HEADER", 10)
    (tmp_path / "a.safetensors").write_bytes(content(WHOLE, DATA))
    with pytest.raises(CheckpointError, match="longer than any model"):
        read_lora_file.read(tmp_path / "a.safetensors")


def test_a_header_is_parsed_once_and_again_when_the_file_has_changed(tmp_path, monkeypatch):
    parsed, parse = [], safetensors_header._parsed
    monkeypatch.setattr(safetensors_header, "_parsed", lambda text: parsed.append(1) or parse(text))
    path = tmp_path / "a.safetensors"
    path.write_bytes(content(WHOLE, DATA))
    checkpoint.read_metadata(path)
    read_lora_file.read(path)
    assert len(parsed) == 1
    path.write_bytes(content({**WHOLE, "__metadata__": {"new": "er"}}, DATA))
    assert checkpoint.read_metadata(path) == {"new": "er"}


def test_the_file_that_the_hostile_ones_are_made_from_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content(WHOLE, DATA))
    assert read_lora_file.read(path).algorithms == {KEY: "lora"}


@pytest.mark.parametrize("tensor", ["lora_unet_x.alpha", "unet.x.lora_A.weight"])
def test_a_lora_given_as_a_whole_model_is_told_by_its_names(tensor, tmp_path, capsys):
    path = tmp_path / "lora.safetensors"
    save_file({tensor: torch.ones(1)}, path)
    command = ["extract", str(path), "embedded", "--rank=4", "--config=embedded"]
    with pytest.raises(SystemExit):
        main.main([*command, "--out", str(tmp_path / "out.safetensors")])
    assert "is a LoRA, not a whole model" in capsys.readouterr().err


def test_alpha_may_be_missing_or_a_whole_number(tmp_path):
    tensors = {DOWN: torch.ones(2, 3), UP: torch.ones(4, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert float(read_lora_file.read(tmp_path / "a.safetensors").tensors[ALPHA]) == 2  # the rank
    save_file({**tensors, ALPHA: torch.tensor(3)}, tmp_path / "b.safetensors")
    assert float(read_lora_file.read(tmp_path / "b.safetensors").tensors[ALPHA]) == 3


NAMES = {
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": "kohya",
    "lora_unet_conv_in.lora_down.weight": "LyCORIS",
    "unet.mid_block.attentions.0.proj_in.lora_A.weight": "diffusers",
    "unet.mid_block.attentions.0.proj_in.lora.down.weight": "diffusers",
    "base_model.model.unet.mid_block.attentions.0.proj_in.lora_A.weight": "PEFT",
}


@pytest.mark.parametrize(("name", "writer"), NAMES.items())
def test_the_writer_is_known_by_the_names_alone(name, writer, tmp_path):
    other = name.replace("down", "up").replace("lora_A", "lora_B")
    save_file({name: torch.ones(2, 3), other: torch.ones(3, 2)}, tmp_path / "renamed.safetensors")
    assert read_lora_file.read(tmp_path / "renamed.safetensors").written_by == writer


ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
UNET = f"lora_unet_{ATTN.replace('.', '_')}"
TEXT = "lora_te_text_model_encoder_layers_0"
FORMS = {
    f"unet.{ATTN}.to_q.lora_A.weight": f"{UNET}_to_q.lora_down.weight",
    f"unet.{ATTN}.to_q.lora_A.default.weight": f"{UNET}_to_q.lora_down.weight",
    f"unet.{ATTN}.to_q.lora.down.weight": f"{UNET}_to_q.lora_down.weight",
    f"unet.{ATTN}.processor.to_q_lora.down.weight": f"{UNET}_to_q.lora_down.weight",
    f"unet.{ATTN}.processor.to_out_lora.down.weight": f"{UNET}_to_out_0.lora_down.weight",
    f"unet.{ATTN}.to_out.0.lora_A.weight": f"{UNET}_to_out_0.lora_down.weight",
    f"{ATTN}.processor.to_k_lora.down.weight": f"{UNET}_to_k.lora_down.weight",
    f"base_model.model.{ATTN}.to_q.lora_A.weight": f"{UNET}_to_q.lora_down.weight",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight": (
        f"{TEXT}_mlp_fc1.lora_down.weight"
    ),
    "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight": f"{TEXT}_mlp_fc1.lora_down.weight",
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight": (
        f"{TEXT}_self_attn_q_proj.lora_down.weight"
    ),
    "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": (
        f"{TEXT}_self_attn_q_proj.lora_down.weight"
    ),
}


@pytest.mark.parametrize(("theirs", "ours"), FORMS.items())
def test_every_form_of_diffusers_names_becomes_kohyas(theirs, ours):
    found = parsed(theirs)
    assert found is not None and f"{found.key()}.{found.role}" == ours


def test_names_lead_back_to_the_modules_of_the_model(base):
    for key, site in every_site(base.parts).items():
        assert peft_names.peft_path(key).split(".", 1)[1].removeprefix("text_model.") == site.path


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"unet.lora_alpha": 8, "unet.r": 4}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {f"{ATTN}.to_q": 2}}, 0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"^other.to_q": 2}}, 2.0),
        ({"text_encoder.lora_alpha": 8}, 1.0),
    ],
)
def test_alpha_is_pefts(config, scale):
    names = {f"unet.{ATTN}.to_q.lora_A.weight": torch.ones(4, 3)}
    found = kohya_form(names, {METADATA_KEY: json.dumps(config)}).tensors
    assert float(found[f"{UNET}_to_q.alpha"]) / 4 == scale


def test_adapter_config_beside_the_file_gives_alpha(tmp_path):
    name = f"base_model.model.{ATTN}.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 3), f"{name}.lora_B.weight": torch.ones(3, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6, "r": 4}')
    found = read_lora_file.read(tmp_path / "adapter_model.safetensors")
    assert float(found.tensors[f"{UNET}_to_q.alpha"]) == 6


def adapted(base):
    """Small random LoRA tensors at all sites of attn-mlp."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for site in sites(base.parts, "attn-mlp"):
        kernel = (1, 1) if site.is_conv else ()
        out, width = site.weight.shape[:2]
        tensors[f"{site.key}.lora_down.weight"] = 0.1 * torch.randn(
            4, width, *kernel, generator=draw
        )
        tensors[f"{site.key}.lora_up.weight"] = 0.1 * torch.randn(out, 4, *kernel, generator=draw)
        tensors[f"{site.key}.alpha"] = torch.tensor(2.0)
    return tensors


def predict(base, unet, embeds):
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 16, 16, generator=draw)
    with torch.no_grad():
        return unet(latents, torch.tensor([500]), embeds).sample


def test_a_file_under_pefts_names_scores_as_under_kohyas(base, tmp_path):
    tensors = adapted(base)
    checkpoint.write(tmp_path / "kohya.safetensors", tensors, {})
    checkpoint.write(tmp_path / "peft.safetensors", peft_names.to_peft(tensors), {})
    predictions = []
    for name in ("kohya", "peft"):
        pack = load_pack(base, [tmp_path / f"{name}.safetensors"])
        with torch.no_grad(), computing_with(pack):
            predictions.append(predict(base, base.unet, base.encode_prompt(["a cat"]).embeds))
    assert torch.allclose(*predictions, atol=1e-5)
    bare = predict(base, base.unet, base.encode_prompt(["a cat"]).embeds)
    assert not torch.allclose(predictions[0], bare, atol=1e-2)


def test_what_diffusers_saves_is_read_with_its_alpha(base, tmp_path):
    """An oracle: diffusers' own writer, alpha in the file's metadata."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    unet = deepcopy(base.unet)
    targets = ["to_q", "to_out.0", "proj_in", "conv1"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        **_collate_lora_metadata({"unet": unet}),
    )
    found = read_lora_file.read(tmp_path / "pytorch_lora_weights.safetensors")
    assert {float(site["alpha"]) for site in found.sites.values()} == {6.0}
    assert any(key.endswith("conv1") for key in found.sites)
    embeds = base.encode_prompt(["a cat"]).embeds.detach()
    theirs = predict(base, unet, embeds)
    known = every_site(base.parts)
    merged = deepcopy(base.unet)
    for key, site in found.sites.items():
        module = merged.get_submodule(known[key].path)
        module.weight.data += read_lora_file.low_rank_delta(site, module.weight.shape)
    assert torch.allclose(theirs, predict(base, merged, embeds), atol=1e-4)


FOREIGN = {
    "bundle_emb.fox.clip_l": torch.ones(2, 768),
    "bundle_emb.fox.clip_g": torch.ones(2, 768),
    "lora_te_text_model_embeddings_token_embedding.diff": torch.ones(2, 3),
    "lora_unet_something.new": torch.ones(3),
    f"{KEY}.evil": torch.ones(1),
    "position_ids": torch.arange(9)[None],
    "nothing": torch.zeros(0, 3),
    "lora_unet_alone.alpha": torch.tensor(1.0),
}
WHAT = (
    "2 bundled embeddings, 5 tensors of unknown names, 1 changes of the text encoder's embeddings"
)


def test_what_is_not_known_is_left_out_by_count(tmp_path, caplog):
    tensors = {DOWN: torch.ones(2, 3), UP: torch.ones(4, 2)}
    save_file({**tensors, **FOREIGN}, tmp_path / "a.safetensors")
    found = read_lora_file.read(tmp_path / "a.safetensors")
    read_lora_file.read(tmp_path / "a.safetensors")
    assert set(found.tensors) == {DOWN, UP, ALPHA}
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a.safetensors'}: left out: {WHAT}"
    ]


def test_modules_of_rank_0_change_nothing(tmp_path):
    other = "lora_unet_conv_in"
    tensors = {
        DOWN: torch.ones(2, 3),
        UP: torch.ones(4, 2),
        f"{other}.lora_down.weight": torch.zeros(0, 3),
        f"{other}.lora_up.weight": torch.zeros(4, 0),
        f"{other}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_lora_file.read(tmp_path / "a.safetensors")
    assert set(found.sites) == {KEY} and found.left_out == {"modules of rank 0": 1}


def test_half_of_an_adapter_is_not_left_out(tmp_path):
    save_file(
        {DOWN: torch.ones(2, 3), UP: torch.ones(4, 2), f"{KEY}x.lora_up.weight": torch.ones(4, 2)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(CheckpointError, match="is half of an adapter"):
        read_lora_file.read(tmp_path / "a.safetensors")
