"""What diffusers and LyCORIS make of a LoRA file, ours makes of it too: the same merged weights.

Their readers get the very file; PEFT's folders are in test_peft_files.py. Where a reader refuses a
file, or is known to be wrong, a test says so, and fails once a release has mended it.
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.func import functional_call

from lora_tensors import dora, lora
from lorasweep.adapters.differences import bias_delta
from lorasweep.adapters.kohya_names import every_norm, every_site, sites
from lorasweep.adapters.pack import check_fit, file_delta
from lorasweep.export.attach_loras import attachable, attached
from lorasweep.lora_files import read_lora_file
from renamed_loras import (
    as_attention_processors,
    as_comfyui,
    as_diffusers_once_saved,
    as_kohya,
    as_lycoris,
    as_one_trainer,
    as_original,
    as_peft,
    as_peft_in_diffusers,
    as_te1,
    by_diffusers,
    with_pefts_magnitudes,
    without_text_model,
)


@pytest.fixture
def bare(base):
    """A copy of the base, whose modules other programs may change."""
    return replace(base, unet=deepcopy(base.unet), text_encoder=deepcopy(base.text_encoder))


@pytest.fixture
def write(base, tmp_path):
    """Write a file with these tensors at every site, under another program's names."""

    def write(make, rename=as_kohya, **options):
        draw = torch.Generator().manual_seed(0)
        tensors = {
            f"{site.key}.{role}": tensor
            for site in sites(base.parts, "full")
            for role, tensor in make(site, draw, **options).items()
        }
        renamed = rename(tensors, base)
        save_file({n: t.contiguous() for n, t in renamed.items()}, tmp_path / "a.safetensors")
        return tmp_path / "a.safetensors"

    return write


def weights(base):
    """All weights of the UNet and the text encoder."""
    return {
        f"{part}.{name}": tensor.clone()
        for part, module in (("unet", base.unet), ("text_encoder", base.text_encoder))
        for name, tensor in module.state_dict().items()
    }


def merged(base, path):
    """The base's weights with what we read added."""
    known, found = every_site(base.parts) | every_norm(base.parts), weights(base)
    for key, tensors in read_lora_file.read(path, base).sites.items():
        site = known[key]
        check_fit(site, tensors)
        found[f"{site.part}.{site.path}.weight"] += file_delta(site, tensors)
        if (bias := bias_delta(tensors)) is not None:
            found[f"{site.part}.{site.path}.bias"] += bias
    return found


def fused(bare, path):
    """The weights after diffusers' load_lora_weights and fuse_lora, which change `bare`."""
    pipeline = bare.pipeline()
    # without the config it doesn't look for the original layout's blocks in a file of SD1.x
    pipeline.load_lora_weights(
        str(path.parent), weight_name=path.name, use_safetensors=True, unet_config=bare.unet.config
    )
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return weights(bare)


def differing(ours, theirs):
    assert set(ours) == set(theirs)
    return {name for name, one in theirs.items() if not torch.allclose(one, ours[name], atol=2e-5)}


LAST_UPSAMPLER = "unet.up_blocks.0.upsamplers.0.conv.weight"
BY_DIFFUSERS = {
    "kohya's": (as_kohya, lora),
    "lora_te1_ of SD1.x": (as_te1, lora),
    "lora_te_encoder_": (without_text_model, lora),
    "the original layout": (as_original, lora),
    "convert_state_dict_to_kohya": (by_diffusers, lora),
    "diffusers', of PEFT": (as_peft_in_diffusers, lora),
    "diffusers', of PEFT with magnitudes": (as_peft_in_diffusers, dora),
    "diffusers' before PEFT": (as_diffusers_once_saved, lora),
    "attention processors": (as_attention_processors, lora),
}


@pytest.mark.parametrize("name", BY_DIFFUSERS)
def test_every_scheme_that_diffusers_loads_is_merged_as_diffusers_fuses_it(name, base, bare, write):
    rename, make = BY_DIFFUSERS[name]
    path = write(make, rename)
    ours, theirs = merged(base, path), fused(bare, path)
    # Of the upsampler after a block without attention diffusers 0.42.1 makes attentions.1.conv in
    # the original layout, and leaves it out with a warning: SDXL has no such block.
    wrong = {LAST_UPSAMPLER} if rename is as_original else set()
    assert len(differing(weights(base), theirs)) == 195 - len(wrong)
    assert differing(ours, theirs) == wrong


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT, of the vocabulary
@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 6},
        {"lora_alpha": 6, "use_rslora": True},
        {"alpha_pattern": {"attn2.to_q": 1, "to_q": 3}, "rank_pattern": {"attn1.to_k": 2}},
        {"use_dora": True, "alpha_pattern": {"to_k": 2}},
    ],
    ids=["alpha", "rsLoRA", "patterns", "magnitudes"],
)
def test_what_diffusers_saves_with_its_metadata_is_merged_as_diffusers_fuses_it(
    options, base, bare, tmp_path
):
    """An alpha for each part, in the file's metadata.

    The text encoder's is plain: diffusers saves its magnitudes without `.weight`, and transformers
    5.23 then doesn't load them.
    """
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata

    parts = {"unet": deepcopy(bare.unet), "text_encoder": deepcopy(bare.text_encoder)}
    torch.manual_seed(0)
    for part, own in {
        "unet": {"r": 4, "target_modules": ["to_q", "to_k", "conv1"], **options},
        "text_encoder": {"r": 2, "target_modules": ["q_proj", "fc1"], "lora_alpha": 3},
    }.items():
        parts[part].add_adapter(peft.LoraConfig(init_lora_weights=False, **own))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        **{f"{n}_lora_layers": peft.get_peft_model_state_dict(part) for n, part in parts.items()},
        **_collate_lora_metadata(parts),
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    ours, theirs = merged(base, path), fused(bare, path)
    assert len(differing(weights(base), theirs)) > 30
    assert not differing(ours, theirs)


REFUSED = {
    "OneTrainer's": (as_one_trainer, lora, "Invalid LoRA checkpoint"),
    "ComfyUI's": (as_comfyui, lora, "Invalid LoRA checkpoint"),
    "LyCORIS's": (as_lycoris, lora, "Invalid LoRA checkpoint"),
    "magnitudes of PEFT under kohya's": (with_pefts_magnitudes, dora, "correctly renamed"),
    "convert_state_dict_to_kohya with magnitudes": (by_diffusers, dora, "correctly renamed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_schemes_that_diffusers_refuses_are_merged_like_kohyas(name, base, bare, write):
    """diffusers 0.42.1 knows only names that begin with lora_ or with a part's name."""
    rename, make, says = REFUSED[name]
    path = write(make, rename, alpha=4.0)
    with pytest.raises(ValueError, match=says):
        fused(bare, path)
    ours = merged(base, path)
    assert not differing(ours, merged(base, write(make, alpha=4.0)))
    assert len(differing(ours, weights(base))) == 195


WRONG = {
    "magnitudes under kohya's names": (as_kohya, dora),  # left out, with a warning
    "a PEFT folder's names": (as_peft, lora),  # nothing is loaded, with a warning
}


@pytest.mark.parametrize("name", WRONG)
def test_what_diffusers_is_known_to_read_wrong(name, base, bare, write):
    """So it is no truth for these: LyCORIS is for magnitudes, PEFT is for its folders."""
    path = write(*reversed(WRONG[name]))
    assert len(differing(merged(base, path), fused(bare, path))) > 100


LYCORIS = {
    "LoCon": {"algo": "locon", "conv_dim": 2, "conv_alpha": 3},
    "LoCon in Tucker form": {"algo": "locon", "use_tucker": True},
    "LoCon with a scalar": {"algo": "locon", "use_scalar": True},
    "LoCon with norms": {"algo": "locon", "train_norm": True},
    "DoRA": {"algo": "locon", "dora_wd": True},
    "DoRA of inputs": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
    "LoHa": {"algo": "loha", "conv_dim": 2, "conv_alpha": 3},
    "LoHa in Tucker form": {"algo": "loha", "use_tucker": True},
    "LoHa with a scalar": {"algo": "loha", "use_scalar": True},
    "LoHa with magnitudes": {"algo": "loha", "dora_wd": True},
    "LoKr": {"algo": "lokr", "linear_dim": 1},
    "LoKr, both decomposed": {"algo": "lokr", "linear_dim": 1, "decompose_both": True},
    "LoKr in Tucker form": {"algo": "lokr", "linear_dim": 1, "use_tucker": True},
    "LoKr with a scalar": {"algo": "lokr", "use_scalar": True},
    "LoKr of whole factors": {"algo": "lokr", "full_matrix": True},
    "LoKr of factor 8": {"algo": "lokr", "linear_dim": 1, "factor": 8},
    "LoKr, unbalanced": {"algo": "lokr", "linear_dim": 1, "unbalanced_factorization": True},
    "LoKr with magnitudes": {"algo": "lokr", "dora_wd": True},
    "LoKr with magnitudes of inputs": {"algo": "lokr", "dora_wd": True, "wd_on_output": False},
    "differences of weights and biases": {"algo": "full"},
    "OFT": {"algo": "diag-oft"},
    "OFT, rescaled": {"algo": "diag-oft", "rescaled": True},
    "OFT, constrained": {"algo": "diag-oft", "constraint": 0.01},
    "BOFT": {"algo": "boft"},
    "GLoRA": {"algo": "glora"},
}
"""Of 4.1.3, without DyLoRA, whose forward draws a rank at random, and without what is refused: IA3,
which LyCORIS can't load itself, and T-LoRA, whose forward fails on kernels."""


def trained_by_lycoris(bare, path, options):
    """What LyCORIS computes with adapters of random weights on a part of `bare`, and their file."""
    lycoris = pytest.importorskip("lycoris")
    unet = bare.unet
    part = {
        **{name: getattr(unet, name) for name in ("conv_in", "time_embedding", "mid_block")},
        "down_blocks": unet.down_blocks[:1],
    }
    if options["algo"] != "boft":  # which divides no module of 384 outputs
        part["text_model"] = bare.text_encoder
    torch.manual_seed(0)
    root = torch.nn.ModuleDict(part)
    network = lycoris.create_lycoris(root, linear_alpha=2, warn_on_unmatched=False, **options)
    network.apply_to()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    network.save_weights(str(path), None, {})
    return predict(bare)


def predict(base, changed=None):
    """What the UNet predicts; with these weights in place of its own and the text encoder's."""

    def called(part, *inputs):
        prefix = f"{part}."
        given = (changed or {}).items()
        own = {name[len(prefix) :]: one for name, one in given if name.startswith(prefix)}
        return functional_call(getattr(base, part), own, inputs)

    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        text = called("text_encoder", torch.arange(77)[None]).last_hidden_state
        return called("unet", latents, torch.tensor([500]), text).sample


@pytest.mark.parametrize("name", LYCORIS)
def test_what_lycoris_saves_is_merged_and_attached_as_lycoris_computes_it(
    name, base, bare, tmp_path
):
    """Before it saved: its loader fails on some, and its merge scales LoHa and LoKr twice."""
    path = tmp_path / "a.safetensors"
    theirs = trained_by_lycoris(bare, path, LYCORIS[name])
    effect = (theirs - predict(base)).norm()
    assert effect > 0.01 * theirs.norm()
    assert (predict(base, merged(base, path)) - theirs).norm() < 1e-4 * effect
    with attached(attachable(base, [(read_lora_file.read(path, base), 1.0)])):
        assert (predict(base) - theirs).norm() < 1e-4 * effect
