"""What PEFT saves is merged as PEFT's own merge_and_unload merges it, or refused in a sentence."""

import json
import warnings
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasweep.adapters.differences import bias_delta
from lorasweep.adapters.kohya_names import every_site
from lorasweep.adapters.pack import check_fit, file_delta
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.lora_files import read_lora_file
from lorasweep.lora_files.pickled_lora import as_safetensors

peft = pytest.importorskip("peft")

TARGETS = ["attn2.to_k", "attn2.to_q", "attn1.to_out.0", "proj_in", "conv1"]
PATTERNS = {
    "attn[12].to_q|attn2.to_k": 1,
    ".*attn1\\.to_out\\.0": 6,
    "mid_block.*proj_in": 9,
    "to_k": 16,  # after the one that matched first
}
"""Whose alphas differ from every site's rank, so that each wrong match shows."""


def lora(**options):
    plain = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False}
    return peft.LoraConfig(**{**plain, **options})


def loha(**options):
    return peft.LoHaConfig(r=4, alpha=1, target_modules=TARGETS, init_weights=False, **options)


def lokr(**options):
    return peft.LoKrConfig(r=4, alpha=1, target_modules=TARGETS, init_weights=False, **options)


CONFIGS = {
    "LoRA": lora(),
    "LoRA with biases": lora(lora_bias=True, target_modules=["to_out.0", "proj_in", "conv1"]),
    "rsLoRA": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "DoRA scaled as rsLoRA": lora(use_dora=True, use_rslora=True),
    "LoRA with patterns": lora(alpha_pattern=PATTERNS, rank_pattern={"attn2.to_q": 3, "to_q": 2}),
    "rsLoRA with patterns": lora(use_rslora=True, alpha_pattern=PATTERNS, rank_pattern=PATTERNS),
    "LoHa": loha(),
    "LoHa in Tucker form": loha(use_effective_conv2d=True),
    "LoHa with patterns": loha(alpha_pattern=PATTERNS, rank_pattern={"to_q": 2}),
    "LoKr": lokr(decompose_both=True),
    "LoKr of factor 4": lokr(decompose_factor=4),
    "LoKr in Tucker form": lokr(use_effective_conv2d=True),
    "LoKr of whole factors": lokr(rank_pattern={"to_k": 64, "conv1": 300}, alpha_pattern=PATTERNS),
}


@pytest.fixture(scope="module")
def unet(base):
    return base.unet


def saved(unet, config, folder):
    """A PEFT folder of random weights, and the weights that PEFT merges when it loads it.

    It saves the patterns of a config sorted, so that what it loads may differ from what it saved.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(deepcopy(unet), config)
        if getattr(config, "lora_bias", False):
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B.default.bias"):
                    torch.nn.init.normal_(parameter)
        model.save_pretrained(str(folder))
        theirs = peft.PeftModel.from_pretrained(deepcopy(unet), str(folder)).merge_and_unload()
        return folder / "adapter_model.safetensors", theirs.state_dict()


def merged(base, path):
    """The UNet's weights with what we read added."""
    known, weights = every_site(base.parts), dict(base.unet.state_dict())
    for key, site in read_lora_file.read(path, base).sites.items():
        name = f"{known[key].path}.weight"
        weights[name] = weights[name] + file_delta(known[key], site)
        if (bias := bias_delta(site)) is not None:
            weights[f"{known[key].path}.bias"] = weights[f"{known[key].path}.bias"] + bias
    return weights


def differing(ours, theirs):
    return {name for name, one in theirs.items() if not torch.allclose(one, ours[name], atol=1e-5)}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_peft_folder_merges_as_peft_merges_it(name, base, unet, tmp_path):
    path, theirs = saved(unet, CONFIGS[name], tmp_path)
    assert len(differing(unet.state_dict(), theirs)) > 20
    assert not differing(merged(base, path), theirs)


@pytest.mark.parametrize(
    ("option", "count"), [({"bias": "lora_only"}, 34), ({"modules_to_save": ["conv_in"]}, 2)]
)
def test_weights_that_peft_would_put_in_place_of_the_bases_are_told(
    option, count, base, unet, tmp_path
):
    path, _ = saved(unet, lora(**option), tmp_path)
    found = read_lora_file.read(path, base)
    assert found.left_out == {"weights that would stand in place of the base's": count}


@pytest.mark.parametrize("names", [("to_k", "0.attn2.to_k"), ("0.attn2.to_k", "to_k")])
def test_the_first_pattern_in_the_files_order_counts(names, base, unet, tmp_path):
    path, _ = saved(unet, lora(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["alpha_pattern"] = {names[0]: 16, names[1]: 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    theirs = peft.PeftModel.from_pretrained(deepcopy(unet), str(tmp_path)).merge_and_unload()
    assert not differing(merged(base, path), theirs.state_dict())
    found = read_lora_file.read(path, base)
    alphas = {float(t["alpha"]) for key, t in found.sites.items() if key.endswith("to_k")}
    assert alphas == {16.0}


def test_a_text_encoders_patterns_are_matched_too(base, tmp_path):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "fc1"],
        init_lora_weights=False,
        alpha_pattern={"layers.[01].self_attn.q_proj": 1, "fc1": 2},
    )
    path, theirs = saved(base.text_encoder, config, tmp_path)
    known, ours = every_site(base.parts), dict(base.text_encoder.state_dict())
    for key, site in read_lora_file.read(path, base).sites.items():
        ours[f"{known[key].path}.weight"] = known[key].weight + file_delta(known[key], site)
    assert not differing(ours, theirs)


def test_a_pattern_that_takes_for_ever_is_refused(base, unet, tmp_path):
    path, _ = saved(unet, lora(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for pattern in ("(?:.|.|.|.)*[!?]", "("):
        changed = {**config, "alpha_pattern": {pattern: 1}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match="no pattern for modules' names"):
            read_lora_file.read(path, base)


SHIFTED = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PiSSA", "something new"]


@pytest.mark.parametrize("start", SHIFTED)
def test_starts_that_shift_the_base_are_refused(start, base, unet, tmp_path):
    path, _ = saved(unet, lora(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "init_lora_weights": start})
    )
    with pytest.raises(CheckpointError, match=f"init_lora_weights={start}.*merge_and_unload"):
        read_lora_file.read(path, base)


def test_the_start_is_refused_in_diffusers_metadata_too(tmp_path):
    name = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 3), f"{name}.lora_B.weight": torch.ones(3, 2)}
    says = json.dumps({"unet.init_lora_weights": "pissa"})
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": says})
    with pytest.raises(CheckpointError, match="init_lora_weights=pissa"):
        read_lora_file.read(tmp_path / "a.safetensors")


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_pissa_that_peft_converted_is_a_plain_lora(base, unet, tmp_path):
    """An oracle: PEFT's own conversion, merged into the base as it was."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["attn2.to_k"], init_lora_weights="pissa"
    )
    model = peft.get_peft_model(deepcopy(unet), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    model.save_pretrained(
        str(tmp_path / "end"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    theirs = model.merge_and_unload().state_dict()
    ours = merged(base, tmp_path / "end" / "adapter_model.safetensors")
    assert not differing(ours, theirs)


def test_what_peft_makes_of_other_types_is_refused_by_name(base, unet, tmp_path):
    config = peft.AdaLoraConfig(target_modules=["attn2.to_k"], init_r=4, target_r=2, total_step=10)
    path, _ = saved(unet, config, tmp_path)
    with pytest.raises(CheckpointError, match=r"PEFT's ADALORA.*merge_and_unload"):
        read_lora_file.read(path, base)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="of no type that is read"):
        read_lora_file.read(path, base)


@pytest.mark.parametrize("has_alpha", [True, False])
def test_a_lokr_of_whole_factors_is_merged_with_scale_1(has_alpha, base, tmp_path):
    """An oracle: LyCORIS's own module, loaded from the same tensors under kohya's names."""
    from lycoris.modules import make_module
    from lycoris.modules.lokr import LokrModule

    site = next(s for k, s in every_site(base.parts).items() if k.endswith("attn2_to_k"))
    out, width = site.weight.shape
    draw = torch.Generator().manual_seed(0)
    w1 = torch.randn(2, 2, generator=draw)
    w2 = torch.randn(out // 2, width // 2, generator=draw)
    alpha = {f"{site.key}.alpha": torch.tensor(3.0)} if has_alpha else {}
    tensors = {f"{site.key}.lokr_w1": w1, f"{site.key}.lokr_w2": w2}
    save_file({**tensors, **alpha}, tmp_path / "a.safetensors")
    x = torch.randn(3, width, generator=draw)
    values = [w1, None, None, w2, None, None, None, None, torch.tensor(3.0), None]
    lycoris = make_module(LokrModule, values, "a", site.module)
    lycoris.org_forward = lambda x: site.module(x)
    found = read_lora_file.read(tmp_path / "a.safetensors", base).sites[site.key]
    check_fit(site, found)
    ours = site.module(x) + site.apply(x, file_delta(site, found))
    assert torch.allclose(ours, lycoris(x), atol=1e-4)


def test_a_pickled_adapter_keeps_its_config(base, unet, tmp_path):
    """adapter_model.bin, as PEFT saved before safetensors."""
    path, theirs = saved(unet, CONFIGS["rsLoRA with patterns"], tmp_path)
    torch.save(load_file(path), tmp_path / "adapter_model.bin")
    (tmp_path / "converted").mkdir()
    converted = as_safetensors(tmp_path / "adapter_model.bin", tmp_path / "converted")
    assert not differing(merged(base, converted), theirs)


def test_a_file_of_pefts_without_its_config_has_the_rank_for_alpha(base, unet, tmp_path, caplog):
    """As diffusers takes it; PEFT itself loads nothing without a config."""
    path, _ = saved(unet, lora(), tmp_path)
    save_file(load_file(path), tmp_path / "alone.safetensors")
    found = read_lora_file.read(tmp_path / "alone.safetensors", base)
    assert {float(site["alpha"]) for site in found.sites.values()} == {4.0}
    assert "no adapter_config.json beside it says alpha" in caplog.text
