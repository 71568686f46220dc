"""What diffusers loads gives what the file's own formula gives, for every type, or is refused."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from lora_tensors import (
    dora,
    dora_here_and_there,
    dora_of_inputs,
    dora_of_loha,
    loha,
    lokr,
    lora,
    mixed,
    normal,
    tucker,
)
from lorasweep.adapters.kohya_names import by_site, every_site
from lorasweep.adapters.weight_deltas import low_rank_delta
from lorasweep.core.atomic_write import TargetError
from lorasweep.export import diffusers_lora, diffusers_lora_tensors, picture_check
from lorasweep.export.exported import ExportError
from lorasweep.lora_files import checkpoint, peft_names, read_lora_file
from lorasweep.lora_files.kohya_form import kohya_form

pytestmark = pytest.mark.usefixtures("short_pictures")


def is_attention_or_mlp(site):
    return site.part == "text_encoder" or "attentions" in site.path


def everywhere(site):
    return True


@pytest.fixture
def write(base, tmp_path):
    """Write a file with these tensors at each chosen site of the embedded model."""

    def write(make, where=is_attention_or_mlp, dtype=torch.float32):
        draw = torch.Generator().manual_seed(0)
        tensors = {
            f"{key}.{name}": tensor if dtype is None else tensor.to(dtype)
            for key, site in every_site(base.parts).items()
            if where(site)
            for name, tensor in make(site, draw).items()
        }
        checkpoint.write(tmp_path / "source.safetensors", tensors, {"ss_seed": "5"})
        return tmp_path / "source.safetensors"

    return write


def predict(unet, text_encoder):
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 16, 16, generator=draw)
    with torch.no_grad():
        embeds = text_encoder(torch.arange(77)[None]).last_hidden_state
        return unet(latents, torch.tensor([500]), embeds).sample


def merged(base, path):
    """The formulas of the papers, written out on copies of the weights."""
    parts = {"unet": deepcopy(base.unet), "text_encoder": deepcopy(base.text_encoder)}
    known = every_site(base.parts)
    for key, tensors in read_lora_file.read(path).sites.items():
        weight = parts[known[key].part].get_submodule(known[key].path).weight.data
        weight.copy_(formula(weight, tensors))
    return predict(**parts)


def formula(weight, tensors):
    """The changed weight; magnitudes as LyCORIS has them, of outputs or of inputs."""
    new = weight + low_rank_delta(tensors, weight.shape)
    if "dora_scale" not in tensors:
        return new
    scale = tensors["dora_scale"].float()
    kept = 0 if scale.shape[0] == weight.shape[0] else 1
    dims = [dim for dim in range(weight.dim()) if dim != kept]
    return new * scale / new.square().sum(dims, keepdim=True).sqrt()


def loaded(base, path):
    """What diffusers makes of the file, the base left as it was."""
    pipeline = picture_check.pipeline_of(base)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    try:
        return predict(pipeline.unet, pipeline.text_encoder)
    finally:
        pipeline.unload_lora_weights()


def is_query(site):
    return site.key.endswith(("_attn2_to_k", "_q_proj"))


def is_query_or_mlp(site):
    return site.key.endswith(("_q_proj", "_fc1"))


EXACT = {
    "own patterns": (lora, is_query, "converted"),
    "attention beside an MLP": (lora, is_query_or_mlp, "converted"),
    "lora": (lora, is_attention_or_mlp, "as it is"),
    "lora everywhere": (lora, everywhere, "as it is"),
    "mixed ranks and alphas": (mixed, everywhere, "converted"),
    "tucker": (tucker, everywhere, "converted"),
    "dora": (dora, everywhere, "converted"),
}


@pytest.mark.parametrize("kind", EXACT)
def test_diffusers_computes_what_the_formulas_give(kind, base, write, tmp_path):
    make, where, how = EXACT[kind]
    source = write(make, where)
    tensors, done, loss = diffusers_lora_tensors.convert(read_lora_file.read(source), base, None)
    assert (done, loss) == (how, None)
    checkpoint.write(tmp_path / "out.safetensors", tensors, {})
    expected = merged(base, source)
    bare = predict(base.unet, base.text_encoder)
    assert not torch.allclose(expected, bare, atol=1e-2)
    assert torch.allclose(loaded(base, tmp_path / "out.safetensors"), expected, atol=2e-5)
    assert torch.equal(predict(base.unet, base.text_encoder), bare)  # nothing stays loaded


def test_dora_on_some_sites_is_exact_and_the_pictures_agree(base, write, tmp_path):
    source = write(dora_here_and_there)
    done = diffusers_lora.lora_for_diffusers(source, tmp_path / "out.safetensors", base, None)
    assert torch.allclose(loaded(base, done.path), merged(base, source), atol=2e-5)
    assert "pictures before and after agree" in done.lines[-1]


def is_key(site):
    return site.path.endswith(("to_k", "k_proj", "proj_in"))


@pytest.mark.parametrize(("make", "rank"), [(loha, 2), (dora_of_inputs, 12), (dora_of_loha, 12)])
def test_the_error_that_is_told_of_an_approximation_is_true(make, rank, base, write):
    file = read_lora_file.read(write(make, is_key))
    tensors, how, loss = diffusers_lora_tensors.convert(file, base, rank)
    assert how == "approximated" and loss is not None
    known = every_site(base.parts)
    result = by_site(kohya_form(tensors, {}, base).tensors)
    lost = whole = 0.0
    for key, site in file.sites.items():
        change = formula(known[key].weight, site) - known[key].weight
        got = low_rank_delta(result[key], change.shape)
        lost += float((got - change).square().sum())
        whole += float(change.square().sum())
    assert loss.error == pytest.approx((lost / whole) ** 0.5, abs=1e-3)
    assert 0.01 < loss.error < loss.worst_error < 1


def test_weights_without_a_norm_are_approximated_as_they_are_computed(base, write):
    """Dead inputs: 0 / 0 of the paper's formula is 0 of ours."""
    own = replace(base, unet=deepcopy(base.unet))
    for site in every_site(own.parts).values():
        if is_key(site) and site.part == "unet":
            site.weight[:, 0] = 0

    def make(site, draw):
        tensors = dora_of_inputs(site, draw)
        tensors["lora_down.weight"][:, 0] = 0
        return tensors

    tensors, how, _ = diffusers_lora_tensors.convert(
        read_lora_file.read(write(make, is_key)), own, 12
    )
    assert how == "approximated"
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_magnitudes_in_fp32_beside_half_precision_are_loaded_as_they_are(base, write, tmp_path):
    def make(site, draw):
        tensors = dora_here_and_there(site, draw)
        return {
            name: tensor if name == "dora_scale" else tensor.to(torch.bfloat16)
            for name, tensor in tensors.items()
        }

    source = write(make, is_key, dtype=None)
    tensors, _, _ = diffusers_lora_tensors.convert(read_lora_file.read(source), base, None)
    checkpoint.write(tmp_path / "out.safetensors", tensors, {})
    assert {t.dtype for n, t in tensors.items() if "magnitude" in n} == {torch.float32}
    expected, bare = merged(base, source), predict(base.unet, base.text_encoder)
    lost = (loaded(base, tmp_path / "out.safetensors") - expected).norm() / (expected - bare).norm()
    assert lost < 0.01  # the folded scales are rounded to bf16's 8 bits


def test_an_approximation_says_so_and_is_read_as_it_was_written(base, write, tmp_path):
    source = write(loha, is_key)
    done = diffusers_lora.lora_for_diffusers(source, tmp_path / "out.safetensors", base, 2)
    _, _, loss = diffusers_lora_tensors.convert(read_lora_file.read(source), base, 2)
    assert loss is not None
    assert f"{loss.error:.2%}" in done.lines[0]


def test_lokr_of_a_rank_that_holds_it_all_is_exact(base, write, tmp_path):
    source = write(lokr, is_key)
    done = diffusers_lora.lora_for_diffusers(source, tmp_path / "out.safetensors", base, 128)
    _, _, loss = diffusers_lora_tensors.convert(read_lora_file.read(source), base, 128)
    assert loss is not None and loss.worst_error < 1e-3
    assert torch.allclose(loaded(base, done.path), merged(base, source), atol=1e-4)


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
def test_diffusers_own_reading_of_mixed_alphas_is_wrong(base, write):
    """Why such files are converted; when this fails diffusers has mended it."""
    source = write(mixed)
    assert not torch.allclose(loaded(base, source), merged(base, source), atol=1e-2)


def test_half_precision_stays_half_and_agrees(base, write, tmp_path):
    source = write(mixed, is_key, dtype=torch.float16)
    done = diffusers_lora.lora_for_diffusers(source, tmp_path / "out.safetensors", base, None)
    assert {t.dtype for t in checkpoint.read(done.path)[0].values()} == {torch.float16}
    assert checkpoint.read_metadata(done.path)["ss_seed"] == "5"


@pytest.mark.parametrize(
    ("make", "rank", "says"),
    [
        (loha, None, "--rank 64.*merged"),
        (lokr, None, "LoKr"),
        (dora_of_inputs, None, "DoRA of inputs"),
        (lora, 8, "--rank has no effect"),
        (lambda site, draw: {"oft_blocks": torch.ones(2, 2, 2)}, 8, "OFT.*merged"),
    ],
)
def test_what_cannot_be_right_is_refused(make, rank, says, base, write, tmp_path):
    source = write(make, is_key)
    with pytest.raises(ExportError, match=says) as caught:
        diffusers_lora.lora_for_diffusers(source, tmp_path / "out.safetensors", base, rank)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_a_lora_of_another_base_is_told_before_diffusers_is_asked(
    base, write, tmp_path, monkeypatch
):
    def narrower(site, draw):
        return {**lora(site, draw), "lora_down.weight": normal(draw, 4, 3)}

    monkeypatch.setattr(diffusers_lora, "convert", None)
    with pytest.raises(ExportError, match="trained on by model=") as caught:
        source = write(narrower, lambda site: site.path.endswith("to_k"))
        diffusers_lora.lora_for_diffusers(source, tmp_path / "out.safetensors", base, 8)
    assert "\n" not in str(caught.value)


def test_a_file_that_diffusers_reads_otherwise_never_leaves_the_house(
    base, write, tmp_path, monkeypatch
):
    source = write(mixed, is_key)
    honest = peft_names.to_peft

    def without_scales(tensors):
        return honest({n: t for n, t in tensors.items() if not n.endswith("alpha")})

    monkeypatch.setattr(peft_names, "to_peft", without_scales)
    with pytest.raises(ExportError, match="DISAGREE"):
        diffusers_lora.lora_for_diffusers(source, tmp_path / "out.safetensors", base, None)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_taken_target_is_left_alone(base, write, tmp_path):
    source = write(lora)
    with pytest.raises(TargetError, match="exists already"):
        diffusers_lora.lora_for_diffusers(source, source, base, None)
