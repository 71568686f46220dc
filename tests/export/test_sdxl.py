"""SDXL as a base for exports: kohya's names find its modules, and diffusers reads what is written.

The model is a tiny SDXL of random weights; names and shapes are kohya's on SDXL's full topology.
"""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_tensors import dora, dora_here_and_there, loha, lora
from lorasweep.adapters.kohya_names import every_site
from lorasweep.adapters.weight_deltas import low_rank_delta
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.export import (
    attach_loras,
    convert_model,
    diffusers_folder,
    merge,
    picture_check,
    whole_model,
)
from lorasweep.export.attach_loras import attachable
from lorasweep.export.diffusers_folder import FILES
from lorasweep.export.exported import ExportError
from lorasweep.export.generic_diffusion_feature import loader_of, offline_lora
from lorasweep.export.kohya_lora import write_for_kohya
from lorasweep.export.single_file_names import ModelLayout
from lorasweep.lora_files import checkpoint, read_lora_file
from lorasweep.lora_files.peft_names import to_peft
from lorasweep.models.load_model import Model
from lorasweep.models.model_files import ModelError
from lorasweep.models.sdxl import SDXLModel

pytestmark = pytest.mark.usefixtures("short_pictures")

KEYS = json.loads(
    gzip.decompress((Path(__file__).parents[1] / "recorded/kohya_sdxl_keys.json.gz").read_bytes())
)
"""Names and shapes that kohya's sd-scripts gave SDXL's files, with convolutions, rank 8."""
TINY = {
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4, 4],
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
    "sample_size": 8,
}
MLP = "text_model_encoder_layers_0_mlp_fc1"
FULL = {
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
    "sample_size": 128,
}


def unet_of(sizes):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **sizes,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        use_linear_projection=True,
    )


def text_of(name, width, layers, heads, vocabulary):
    import transformers

    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        vocab_size=vocabulary,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return getattr(transformers, name)(config)


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """A tiny SDXL of random weights, as diffusers saves it."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.13025,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_of("CLIPTextModel", 32, 2, 2, 4096),
        text_encoder_2=text_of("CLIPTextModelWithProjection", 32, 2, 2, 4096),
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=unet_of(TINY),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_end=0.012),
        add_watermarker=False,
    )
    target = tmp_path_factory.mktemp("sdxl") / "model"
    pipeline.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def model(folder):
    return whole_model.read(str(folder), sdxl=True)


@pytest.fixture(scope="module")
def settings(folder):
    return settings_of(folder)


def settings_of(folder, clip_skip=1):
    return Model(
        path=str(folder),
        revision=None,
        config=None,
        allow_pickle=False,
        clip_skip=clip_skip,
        prediction_type=None,
    )


@pytest.fixture(scope="module")
def xl(settings, model):
    return whole_model.as_base(settings, model)


def is_kohyas(site):
    """What kohya adapts: blocks' modules, with convolutions."""
    return "_blocks" in site.path or "mid_block" in site.path or site.part != "unet"


def everywhere(site):
    return True


def is_attention(site):
    return "attn" in site.path


@pytest.fixture
def write(xl, tmp_path):
    """Write a LoRA of the tiny SDXL, by default under kohya's names, of the original layout."""
    theirs = {ours: key for key, ours in xl.keys_by_kohyas.items()}

    def write(make=lora, where=is_kohyas, names=theirs):
        draw = torch.Generator().manual_seed(0)
        tensors = {
            f"{names.get(key, key)}.{name}": tensor
            for key, site in every_site(xl.parts).items()
            if where(site)
            for name, tensor in make(site, draw).items()
        }
        checkpoint.write(tmp_path / "xl.safetensors", tensors, {"ss_seed": "5"})
        return tmp_path / "xl.safetensors"

    return write


def predict(pipeline, prompt="a fox"):
    """SDXL's noise prediction, of a pipeline of diffusers however it was loaded."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}
        return pipeline.unet(
            torch.randn(1, 4, 8, 8, generator=draw), 500, embeds, added_cond_kwargs=conditions
        ).sample


def attached(xl, path):
    with attach_loras.attached(attachable(xl, [(read_lora_file.read(path, xl), 1.0)])):
        return predict(xl.pipeline)


def test_every_name_of_kohyas_finds_its_module_on_sdxls_full_topology():
    with torch.device("meta"):
        from diffusers import AutoencoderKL

        unet, first = unet_of(FULL), text_of("CLIPTextModel", 768, 12, 12, 49408)
        second = text_of("CLIPTextModelWithProjection", 1280, 32, 20, 49408)
        layout = ModelLayout.from_modules(unet, AutoencoderKL(), first, second)
    parts = type("Pipeline", (), {"unet": unet, "text_encoder": first, "text_encoder_2": second})
    xl = SDXLModel(None, parts, layout.original_unet_paths)
    known = every_site(xl.parts)
    tensors = {name: torch.zeros(shape, device="meta") for name, shape in KEYS.items()}
    named = xl.named(tensors)
    sites = {name.partition(".")[0] for name in named}
    assert len(named) == len(KEYS) == 3156 and len(sites) == 1052
    for key in sites:
        down, up = named[f"{key}.lora_down.weight"], named[f"{key}.lora_up.weight"]
        weight = known[key].weight
        expected = (weight.shape[0], *weight.shape[1:])
        assert (up.shape[0], *down.shape[1:]) == expected, key
    ours = {key for key, site in known.items() if is_kohyas(site) and "text_proj" not in key}
    assert sites == {key for key in ours if "_mlp_" in key or "_self_attn_" in key or "unet" in key}
    assert xl.named(named) == named  # names of diffusers stay


def test_names_of_the_outer_modules_and_of_one_text_encoder_are_known(xl):
    for theirs, ours in {
        "lora_unet_label_emb_0_2": "lora_unet_add_embedding_linear_2",
        "lora_unet_time_embed_0": "lora_unet_time_embedding_linear_1",
        "lora_unet_input_blocks_0_0": "lora_unet_conv_in",
        "lora_unet_out_2": "lora_unet_conv_out",
        f"lora_te_{MLP}": f"lora_te1_{MLP}",
    }.items():
        assert list(xl.named({f"{theirs}.alpha": torch.ones(())})) == [f"{ours}.alpha"]
        assert ours in every_site(xl.parts)
    twice = {f"lora_unet_{n}.alpha": torch.ones(()) for n in ("out_2", "conv_out")}
    with pytest.raises(CheckpointError, match="twice"):
        xl.named(twice)


def dora_or_loha(site, draw):
    return loha(site, draw) if site.part == "text_encoder" else dora(site, draw)


def test_a_merged_folder_predicts_what_the_attached_lora_predicts(xl, settings, write, tmp_path):
    from diffusers import AutoPipelineForText2Image

    path = write(dora_or_loha, everywhere)
    done = merge.merged(settings, [(path, 1.0)], tmp_path / "merged")
    assert any("agree: drawn by diffusers' AutoPipelineForText2Image" in x for x in done.lines)
    found = AutoPipelineForText2Image.from_pretrained(tmp_path / "merged", use_safetensors=True)
    assert type(found).__name__ == "StableDiffusionXLPipeline"
    assert not torch.allclose(attached(xl, path), predict(xl.pipeline), atol=1e-2)
    assert torch.allclose(predict(found), attached(xl, path), atol=1e-5)


def test_the_merge_is_the_formula_written_out(xl, model, write):
    path = write()
    whole = merge.merge(xl, model, [(read_lora_file.read(path, xl), 0.5)])
    theirs, _ = checkpoint.read(path)
    for key, part, name in (
        ("lora_unet_input_blocks_4_1_proj_in", "unet", "down_blocks.1.attentions.0.proj_in"),
        ("lora_unet_output_blocks_2_2_conv", "unet", "up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_middle_block_2_emb_layers_1", "unet", "mid_block.resnets.1.time_emb_proj"),
        *(
            (f"lora_te{n}_text_model_encoder_layers_1_mlp_fc2", f"text_encoder{suffix}", at)
            for n, suffix in ((1, ""), (2, "_2"))
            for at in ["text_model.encoder.layers.1.mlp.fc2"]
        ),
    ):
        site = {n.partition(".")[2]: t for n, t in theirs.items() if n.startswith(f"{key}.")}
        bare = model.weights[part][f"{name}.weight"]
        expected = bare + 0.5 * low_rank_delta(site, bare.shape)
        assert torch.allclose(whole.weights[part][f"{name}.weight"], expected, atol=1e-6)


def test_offline_lora_holds_the_variant_fp16_too(settings, write, tmp_path):
    from diffusers import StableDiffusionXLImg2ImgPipeline

    target = tmp_path / "offline"
    path = write(dora, everywhere)  # of a picture that fp16 changes by 9 levels on average
    done = offline_lora(settings, [(path, 1.0)], target)
    agreeing = [line for line in done.lines if "before and after agree" in line]
    assert "StableDiffusionXLImg2ImgPipeline.from_pretrained," in agreeing[0]
    assert "with variant='fp16'" in agreeing[1]
    assert done.lines[-1].startswith(
        'df = FeatureExtractor(layer="feature/configs/config_xl_practical.json", version="xl",'
        ' device="cuda", img_size=1024, offline_lora='
    )
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        name = FILES[part]
        plain = load_file(target / part / name)
        half = load_file(target / part / name.replace(".safetensors", ".fp16.safetensors"))
        assert {t.dtype for t in plain.values()} == {torch.float32}
        assert all(torch.equal(half[n], t.half()) for n, t in plain.items())
    # as generic diffusion feature loads it
    loaded = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        target, dtype=torch.float16, variant="fp16", use_safetensors=True
    )
    assert loaded.unet.dtype == torch.float16
    assert any(
        name.startswith("text_model.")
        for name in load_file(target / "text_encoder" / "model.safetensors")
    )


def test_playground_is_printed_as_such(folder, settings, tmp_path):
    place = tmp_path / "models--playgroundai--playground-v2-1024px-aesthetic"
    place.symlink_to(folder)
    assert loader_of(replace(settings, path=str(place))).version == "pgv2"
    assert loader_of(settings).version == "xl"


def test_plain_weights_in_fp16_are_stored_once(settings, write, tmp_path):
    target = tmp_path / "offline"
    offline_lora(settings, [(write(), 1.0)], target, precision="fp16")
    plain = target / "unet" / "diffusion_pytorch_model.safetensors"
    assert plain.samefile(plain.with_name("diffusion_pytorch_model.fp16.safetensors"))


def loaded(xl, path):
    """What diffusers makes of a LoRA file, the base left as it was."""
    pipeline = picture_check.pipeline_of(xl)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    try:
        return predict(pipeline)
    finally:
        pipeline.unload_lora_weights()


@pytest.mark.parametrize("names", ["kohya's", "kohya's of diffusers' layout", "PEFT's"])
def test_a_file_is_read_as_diffusers_reads_it(names, xl, write):
    """An oracle: load_lora_weights on the very file."""
    path = write() if names == "kohya's" else write(names={})
    if names == "PEFT's":
        tensors, _ = checkpoint.read(path)
        checkpoint.write(path, to_peft(tensors), {})
    theirs = loaded(xl, path)
    assert not torch.allclose(theirs, predict(xl.pipeline), atol=1e-2)
    assert torch.allclose(attached(xl, path), theirs, atol=2e-5)


@pytest.mark.parametrize(
    ("make", "names"), [(dora_here_and_there, "original"), (lora, "diffusers")]
)
def test_diffusers_loads_every_module_of_the_lora_file(make, names, xl, settings, write, tmp_path):
    is_original = names == "original"
    path = write(make, everywhere) if is_original else write(make, is_attention, names={})
    target = tmp_path / "out.safetensors"
    done = offline_lora(settings, [(path, 1.0)], target)
    assert done.lines[0].startswith("Converted exactly")
    assert "stable-diffusion-xl-base-1.0 as the base" in done.lines[2]
    assert torch.allclose(loaded(xl, target), attached(xl, path), atol=2e-5)
    assert torch.allclose(attached(xl, target), attached(xl, path), atol=2e-5)  # read by ourselves


@pytest.mark.filterwarnings("ignore")
def test_kohyas_file_has_the_names_of_the_original_layout(xl, settings, write, tmp_path):
    """sd-scripts finds SDXL's modules by no other."""
    path = write(lora, everywhere, names={})
    target = tmp_path / "kohya.safetensors"
    write_for_kohya(settings, [(path, 1.0)], target)
    theirs = {name.partition(".")[0] for name in load_file(target)}
    assert "lora_unet_input_blocks_4_1_proj_in" in theirs
    assert not any("down_blocks" in key or "up_blocks" in key for key in theirs)
    assert torch.equal(attached(xl, target), attached(xl, path))


def test_diffusers_own_reading_loses_the_added_embedding(xl, write):
    """Why SDXL's files are always converted; when this fails diffusers has mended it."""
    path = write(lora, lambda site: "add_embedding" in site.path or is_attention(site), names={})
    assert not torch.allclose(loaded(xl, path), attached(xl, path), atol=1e-3)


def test_a_module_that_diffusers_leaves_out_is_found(settings, write, tmp_path, monkeypatch):
    """Pictures might miss it: one of hundreds."""
    from lorasweep.lora_files import peft_names

    honest, lost = peft_names.to_peft, "lora_unet_add_embedding_linear_1"
    monkeypatch.setattr(
        peft_names, "to_peft", lambda t: honest({n: v for n, v in t.items() if lost not in n})
    )
    path = write(lora, lambda site: "add_embedding" in site.path or is_attention(site))
    with pytest.raises(ExportError, match=r"leaves 1 of the 154 .*add_embedding\.linear_1.*merged"):
        offline_lora(settings, [(path, 1.0)], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_loha_is_refused_or_approximated_with_its_error(settings, write, tmp_path):
    path = write(loha, lambda site: site.part != "unet")
    target = tmp_path / "out.safetensors"
    with pytest.raises(ExportError, match="--rank 64"):
        offline_lora(settings, [(path, 1.0)], target)
    done = offline_lora(settings, [(path, 1.0)], target, rank=4)
    assert "relative error" in done.lines[0]


def test_a_folder_of_the_variant_alone_or_in_pieces_is_read(folder, model, write, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.save_pretrained(tmp_path / "pieces", max_shard_size="200KB")
    assert not (tmp_path / "pieces" / "unet" / FILES["unet"]).exists()
    found = whole_model.read(str(tmp_path / "pieces"), sdxl=True)
    for part, tensors in model.weights.items():
        assert all(torch.equal(found.weights[part][n], t) for n, t in tensors.items())
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    done = merge.merged(settings_of(tmp_path / "half"), [(write(), 1.0)], tmp_path / "merged")
    assert any("agree" in line for line in done.lines)
    assert whole_model.read(str(done.path), sdxl=True).precision == "fp16"


def test_an_index_that_leads_out_of_the_folder_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    unet = tmp_path / "model" / "unet" / FILES["unet"]
    unet.rename(tmp_path / "elsewhere.safetensors")
    index = unet.with_name(f"{unet.name}.index.json")
    for text, says in {
        '{"weight_map": {"a": "../../elsewhere.safetensors"}}': "no file beside it",
        '{"weight_map": {"a": "gone.safetensors"}}': "is missing",
        "[]": "can't be read",
    }.items():
        index.write_text(text)
        with pytest.raises(ModelError, match=says):
            whole_model.read(str(tmp_path / "model"), sdxl=True)


def test_what_comes_later_is_said_in_a_line(folder, settings, write, tmp_path):
    path, file = write(), tmp_path / "model.safetensors"
    refusals = {
        "SDXL as a single file comes later": lambda: merge.merged(settings, [(path, 1)], file),
        "SDXL comes later": lambda: convert_model.convert(str(folder), file, config=None),
        "StableDiffusionXLPipeline; lorasweep trains": settings.load,
        "clip_skip=2 has no effect on SDXL": lambda: merge.merged(
            settings_of(folder, clip_skip=2), [(path, 1)], tmp_path / "merged"
        ),
    }
    for says, act in refusals.items():
        with pytest.raises((ExportError, ModelError), match=says) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert [found.name for found in tmp_path.iterdir()] == ["xl.safetensors"]


def test_a_lora_of_another_base_is_told_in_a_line(base, settings, write, tmp_path):
    sd15 = tmp_path / "sd15.safetensors"
    save_file(
        {
            "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(1, 7),
            "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(7, 1),
        },
        sd15,
    )
    for one, on in ((sd15, settings), (write(), base.settings)):
        for to in (tmp_path / "out.safetensors", tmp_path / "out"):
            with pytest.raises((ExportError, CheckpointError)) as caught:
                offline_lora(on, [(one, 1.0)], to)
            assert "\n" not in str(caught.value)


def test_a_wrong_variant_is_an_error_and_leaves_nothing(settings, write, tmp_path, monkeypatch):
    path, honest = write(), diffusers_folder.write_variant

    def wrong(folder, weights):
        found = honest(folder, weights)
        unet = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
        tensors = load_file(unet)
        save_file(tensors | {"conv_out.weight": tensors["conv_out.weight"].flip(0)}, unet)
        return found

    monkeypatch.setattr(diffusers_folder, "write_variant", wrong)
    with pytest.raises(ExportError, match=r"unet's conv_out\.weight otherwise"):
        offline_lora(settings, [(path, 1.0)], tmp_path / "offline")
    assert [found.name for found in tmp_path.iterdir()] == ["xl.safetensors"]
