"""Which modules get an adapter, under which names, and at which ranks and rates."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from conftest import options
from lorasweep.adapters.kohya_names import every_site, sites
from lorasweep.adapters.pack import Pack
from lorasweep.adapters.unet_blocks import block_index
from lorasweep.core.settings import SettingsError
from lorasweep.lora_files.kohya_form import with_kohya_names
from lorasweep.training.kohya_metadata import _network
from tiny_sdxl import full_sdxl

KEYS = json.loads(
    gzip.decompress((Path(__file__).parents[1] / "recorded/kohya_keys.json.gz").read_bytes())
)
"""Names and shapes that kohya's sd-scripts and LyCORIS gave SD1.5's files."""
SDXL_KEYS = json.loads(
    gzip.decompress((Path(__file__).parents[1] / "recorded/kohya_sdxl_keys.json.gz").read_bytes())
)
"""The same of SDXL's files, with convolutions."""
SDXL_DIM8 = "76f7f4d08fb4c4984dfd9ed668b6aecaf9ed6ff9ac751c4135e01703e42806dc"
"""sha256 of those without convolutions, as sorted JSON."""
BOTH = frozenset({"text_encoder", "unet"})


@pytest.fixture(scope="module")
def sd15_parts():
    """SD1.5's UNet and text encoder without weights, on torch's meta device."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from lorasweep.models.stable_diffusion import parts_of

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        config = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        return parts_of(CLIPTextModel(config), unet)


SETTINGS = {
    "lora_dim8": ["adapter=lora"],
    "lycoris_locon_attn-mlp": ["adapter=locon", "adapter.targets=attn-mlp"],
    "lora_dim8_conv8": ["adapter=locon", "adapter.targets=conv"],
    "lycoris_locon_dim8_conv8": ["adapter=locon", "adapter.targets=full"],
    "lycoris_loha_dim8_conv8": ["adapter=loha", "adapter.targets=full"],
    "lycoris_lokr_dim8_conv8": ["adapter=lokr", "adapter.targets=full"],
    "lycoris_lokr_full_factor8": [
        "adapter=lokr",
        "adapter.targets=full",
        "adapter.factor=8",
        "adapter.full_matrix=true",
    ],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_names_and_shapes_are_kohyas_on_sd15(name, make_run, sd15_parts):
    adapter = make_run(*SETTINGS[name], "adapter.rank=8").adapter
    draw = torch.Generator()
    ours = {
        f"{site.key}.{below}": list(tensor.shape)
        for site in sites(sd15_parts, adapter.targets, adapter.carries)
        for below, tensor in adapter.initial(site, draw).items()
    }
    assert ours == KEYS[name]


@pytest.mark.parametrize("adapter", ["lora", "locon"])
def test_names_and_shapes_are_kohyas_on_sdxl(adapter, make_run):
    """kohya's `lora_dim8_conv8`; without convolutions `lora_dim8`, by its digest."""
    targets = {"lora": "attn-mlp", "locon": "conv"}[adapter]
    run = make_run(f"adapter={adapter}", f"adapter.targets={targets}", "adapter.rank=8")
    settings, sdxl = run.adapter, full_sdxl()
    ours = {}
    for site in sites(sdxl.parts, settings.targets, settings.carries):
        out, *rest = site.weight.shape
        ours |= {
            f"{site.key}.lora_down.weight": [8, *rest],
            f"{site.key}.lora_up.weight": [out, 8, *[1] * len(rest[1:])],
            f"{site.key}.alpha": [],
        }
    named = with_kohya_names(ours, sdxl)
    if adapter == "locon":
        assert named == SDXL_KEYS
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    assert (digest == SDXL_DIM8) == (adapter == "lora")


@pytest.mark.parametrize(
    ("preset", "count"), [("attn-mlp", 264), ("conv", 350), ("full", 354), ("unet-only", 192)]
)
def test_presets_have_kohyas_counts(preset, count, sd15_parts):
    assert len(sites(sd15_parts, preset)) == count


def test_patterns_choose_by_dotted_path(sd15_parts):
    patterns = ("unet.*.attn2.to_k", "text_encoder.*.q_proj", "unet.*.attn2.to_?")
    paths = {f"{site.part}.{site.path}" for site in sites(sd15_parts, patterns)}
    assert len(paths) == 16 * 3 + 12
    assert all(path.endswith(("attn2.to_k", "to_q", "to_v", "q_proj")) for path in paths)


def test_a_pattern_that_matches_nothing_is_refused_with_near_names(sd15_parts):
    with pytest.raises(SettingsError, match=r"attn3.*near it are unet\..*attn[12].*to_k"):
        sites(sd15_parts, ("unet.mid_block.attentions.0.transformer_blocks.0.attn3.to_k",))


def test_kernels_need_a_type_that_adapts_them(make_run, sd15_parts, caplog):
    lora = make_run("adapter=lora", "adapter.targets=[unet.*.conv1]").adapter
    with pytest.raises(SettingsError, match=r"unet\.\*\.conv1 .*use adapter=locon"):
        sites(sd15_parts, lora.targets, lora.carries)
    found = sites(sd15_parts, ("unet.*.resnets.*",), lora.carries)
    assert not any(site.has_kernel for site in found)
    assert "names 44 convolutions larger than 1x1" in caplog.text


@pytest.mark.parametrize(
    ("targets", "says"),
    [("all", "choose one of"), ("[]", "empty"), ("[to_k]", "begins with no part")],
)
def test_targets_that_say_nothing_are_refused(targets, says, make_run):
    with pytest.raises(SettingsError, match=says):
        make_run(f"adapter.targets={targets}")


def test_blocks_have_kohyas_numbers(sd15_parts):
    numbers = {site.path: block_index(site) for site in every_site(sd15_parts).values()}
    expected = {
        "down_blocks.0.resnets.0.conv1": 1,
        "down_blocks.0.attentions.1.proj_in": 2,
        "down_blocks.0.downsamplers.0.conv": 3,
        "down_blocks.3.resnets.1.conv2": 11,
        "mid_block.attentions.0.proj_in": 12,
        "up_blocks.0.resnets.0.conv1": 13,
        "up_blocks.0.upsamplers.0.conv": 15,
        "up_blocks.3.attentions.2.proj_out": 24,
        "conv_in": None,
        "time_embedding.linear_1": None,
        "encoder.layers.0.mlp.fc1": None,
    }
    assert {path: numbers[path] for path in expected} == expected


def test_blocks_of_sdxl_have_kohyas_numbers(make_run, sdxl_folder):
    """Of names in files, as get_block_index does: 1 to 9 go down, 10 to 12 are the middle's."""
    sdxl = full_sdxl()
    down, mid, up = list(range(1, 10)), [10, 11, 12], list(range(13, 22))
    ranks = f"adapter.block_ranks={{down:{down},mid:{mid},up:{up}}}".replace(" ", "")
    adapter = make_run(f"model.path={sdxl_folder}", ranks, "adapter.rank=30").adapter
    first = {"input": 1, "middle": 10, "output": 13}
    seen = set()
    for key, site in every_site(sdxl.parts).items():
        name = sdxl.kohya_names.get(key, key)
        found = re.match(r"lora_unet_(input|middle|output)_blocks?_(\d+)", name)
        if found and name != "lora_unet_input_blocks_0_0":  # conv_in, of no block
            assert adapter.rank_at(site) == first[found[1]] + int(found[2]), name
            seen.add(adapter.rank_at(site))
        else:
            assert adapter.rank_at(site) == 30
    assert seen == set(range(2, 22))
    with pytest.raises(SettingsError, match=r"down: give one number or 12, as many .* 1\.x has"):
        make_run(ranks)


def test_metadata_counts_sdxls_blocks_as_kohya_does(make_run, sdxl_folder):
    """block_dims are 23 there, of which the first and last are of no block."""
    run = make_run(
        f"model.path={sdxl_folder}",
        "adapter.rank=4",
        "adapter.block_ranks={down:1,mid:2,up:3}",
        "optimizer.block_lr_weights={down:0.5,mid:[0,1,1],up:1}",
    )
    args = json.loads(_network(run, is_sdxl=True)["ss_network_args"])
    assert args["block_dims"] == ",".join([*"4", *"1" * 9, *"2" * 3, *"3" * 9, *"4"])
    assert args["mid_lr_weight"] == "0,1,1"
    assert args["down_lr_weight"] == ",".join(["0.5"] * 9)
    of_sd = json.loads(
        _network(make_run("adapter.block_ranks={down:1,mid:2,up:3}"), is_sdxl=False)[
            "ss_network_args"
        ]
    )
    assert of_sd["block_dims"].count(",") == 24


RANKED = [name for name in options("adapter") if name != "lycoris"]


@pytest.mark.parametrize("name", RANKED)
def test_ranks_by_block_keep_the_scale_and_drop_zeros(name, make_run, base):
    ranks = "adapter.block_ranks={down:2,mid:0,up:4}"
    adapter = make_run(f"adapter={name}", "adapter.rank=4", "adapter.alpha=2", ranks).adapter
    pack = Pack.new(base.parts, [(adapter, 0, BOTH)])
    files = pack.file_tensors(0)
    assert not any("mid_block" in key for key in files)
    for entry in pack.entries:
        expected = {"down": 2}.get(entry.site.path.partition("_")[0], 4)
        if not entry.site.has_kernel:
            assert adapter.rank_at(entry.site) == expected
        if name != "lokr":  # whose full matrices have no rank to divide by
            assert adapter.scale_at(entry.site) == 0.5
    if name == "lora":
        downs = {k: t.shape[0] for k, t in files.items() if k.endswith("lora_down.weight")}
        assert {n for k, n in downs.items() if "down_blocks" in k} == {2}
        assert {n for k, n in downs.items() if "down_blocks" not in k} == {4}
        alphas = [float(files[k.replace("lora_down.weight", "alpha")]) for k in downs]
        assert alphas == [n / 2 for n in downs.values()]


def test_rates_by_block_make_groups_and_leave_blocks_bare(make_run, base):
    weights = "optimizer.block_lr_weights={down:0.5,mid:0,up:1}"
    run = make_run("adapter.rank=2", "adapter.targets=conv", "adapter=locon", weights)
    optimizer = run.optimizer
    pack = Pack.new(base.parts, [(run.adapter, 0, BOTH)], [optimizer.trains])
    assert not any("mid_block" in key for key in pack.file_tensors(0))
    views = pack.views(0, optimizer.group_of)
    parameters = {
        group: [torch.nn.Parameter(view) for view in tensors] for group, tensors in views.items()
    }
    made = optimizer.create(parameters)
    rates = {group["name"]: group["lr"] for group in made.param_groups}
    unet, text = optimizer.unet_lr, optimizer.text_encoder_lr
    assert rates == {"text_encoder": text, "unet": unet, "unet_x0.5": unet * 0.5}
    assert sum(len(group["params"]) for group in made.param_groups) == 2 * len(pack.entries)


def test_metadata_says_it_as_kohya_does(make_run):
    def entries(*overrides):
        return make_run(*overrides, "adapter.rank=8").adapter.metadata()

    assert "ss_network_args" not in entries()
    locon = entries("adapter=locon", "adapter.conv_alpha=1")
    assert locon["ss_network_module"] == "networks.lora"
    assert json.loads(locon["ss_network_args"]) == {
        "conv_dim": "8",
        "conv_alpha": "1.0",
        "dropout": None,
    }
    full = entries("adapter=locon", "adapter.targets=full")
    assert full["ss_network_module"] == "lycoris.kohya"
    args = json.loads(full["ss_network_args"])
    assert (args["algo"], args["preset"], args["conv_dim"]) == ("locon", "full", "8")
    dora = json.loads(entries("adapter=dora")["ss_network_args"])
    assert (dora["dora_wd"], dora["wd_on_output"]) == ("True", "True")
    blocks = entries("adapter.block_ranks={down:4,mid:8,up:0}")
    dims = json.loads(blocks["ss_network_args"])["block_dims"]
    assert dims == ",".join(["4"] * 12 + ["8"] + ["0"] * 12)
    pissa = entries("adapter.init=pissa")
    assert (pissa["ss_network_dim"], pissa["ss_network_alpha"]) == ("16", "8.0")
