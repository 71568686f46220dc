"""Another rank, and a LoRA of the difference of two models: exact where it can be, stated else."""

import json
from dataclasses import replace

import pytest
import torch

from lorasweep.adapters.kohya_names import sites
from lorasweep.adapters.weight_deltas import low_rank_delta
from lorasweep.core.atomic_write import TargetError
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.export import extract, resize, svd, whole_model
from lorasweep.export.exported import ExportError
from lorasweep.export.svd_ranks import SvdRanks
from lorasweep.lora_files import checkpoint, read_lora_file
from lorasweep.models.model_files import ModelError

pytestmark = pytest.mark.usefixtures("short_pictures")

LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
CONV = "lora_unet_mid_block_resnets_0_conv1"


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def lora(rank=6, alpha=3.0):
    return {
        "lora_down.weight": normal(rank, 20),
        "lora_up.weight": normal(12, rank),
        "alpha": torch.tensor(alpha),
    }


KINDS = {
    "lora": lora(),
    "negative alpha": lora(alpha=-3.0),
    "locon": {
        "lora_down.weight": normal(5, 4, 3, 3),
        "lora_up.weight": normal(12, 5, 1, 1),
        "alpha": torch.tensor(2.0),
    },
    "tucker locon": {
        "lora_down.weight": normal(3, 7, 1, 1),
        "lora_mid.weight": normal(3, 3, 3, 3),
        "lora_up.weight": normal(12, 3, 1, 1),
        "alpha": torch.tensor(2.0),
    },
    "loha": {
        "hada_w1_a": normal(16, 2),
        "hada_w1_b": normal(2, 18),
        "hada_w2_a": normal(16, 2, seed=1),
        "hada_w2_b": normal(2, 18, seed=1),
        "alpha": torch.tensor(1.0),
    },
    "loha of much rank": {
        "hada_w1_a": normal(6, 5),
        "hada_w1_b": normal(5, 8),
        "hada_w2_a": normal(6, 5, seed=1),
        "hada_w2_b": normal(5, 8, seed=1),
        "alpha": torch.tensor(1.0),
    },
    "tucker loha": {
        "hada_w1_a": normal(2, 16),
        "hada_w1_b": normal(2, 18),
        "hada_t1": normal(2, 2, 3, 3),
        "hada_w2_a": normal(2, 16, seed=1),
        "hada_w2_b": normal(2, 18, seed=1),
        "hada_t2": normal(2, 2, 3, 3, seed=1),
        "alpha": torch.tensor(1.0),
    },
    "lokr": {
        "lokr_w1": normal(3, 4),
        "lokr_w2_a": normal(5, 2),
        "lokr_w2_b": normal(2, 6),
        "alpha": torch.tensor(1.0),
    },
    "lokr of a convolution": {"lokr_w1": normal(3, 4), "lokr_w2": normal(5, 2, 3, 3)},
    "full": {"diff": normal(9, 14)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_spectrum_is_the_deltas_svd(kind):
    site = KINDS[kind]
    delta = (site["diff"] if kind == "full" else low_rank_delta(site)).flatten(1)
    found = svd.spectrum(site)
    expected = torch.linalg.svdvals(delta.double())
    got = found.values[: len(expected)].double()
    assert torch.allclose(got, expected[: len(got)], atol=1e-5 * float(expected[0]))
    rebuilt = found.left * found.values @ found.right
    assert torch.allclose(rebuilt, delta, atol=1e-5 * float(expected[0]))


def test_a_large_matrix_is_decomposed_by_its_square(monkeypatch):
    matrix = normal(30, 3) @ normal(3, 50)
    expected = svd.of_matrix(matrix)
    monkeypatch.setattr(svd, "SMALL", 8)
    for given, like in ((matrix, expected.values), (matrix.mT, expected.values)):
        found = svd.of_matrix(given)
        assert torch.allclose(found.values, like, atol=1e-5 * float(like[0]))
        assert torch.allclose(found.left * found.values @ found.right, given, atol=1e-4)
        assert not found.values[3:].any()


def written(path, *named, metadata=None):
    tensors = {f"{key}.{name}": tensor for key, site in named for name, tensor in site.items()}
    checkpoint.write(path, tensors, metadata or {})
    return path


def test_a_larger_or_equal_rank_keeps_everything(tmp_path):
    source = written(tmp_path / "a.safetensors", (LINEAR, lora()), (CONV, KINDS["locon"]))
    done = resize.resize(source, tmp_path / "b.safetensors", SvdRanks(8))
    assert done.kept.total == pytest.approx(1.0)
    before, after = read_lora_file.read(source), read_lora_file.read(done.path)
    for key, site in after.sites.items():
        assert site["lora_down.weight"].shape[0] == 8
        expected = low_rank_delta(before.sites[key])
        assert torch.allclose(low_rank_delta(site), expected, atol=1e-4)


def test_a_smaller_rank_is_the_best_there_is_and_says_what_it_kept(tmp_path):
    source = written(tmp_path / "a.safetensors", (LINEAR, lora()), (CONV, KINDS["locon"]))
    done = resize.resize(source, tmp_path / "b.safetensors", SvdRanks(2))
    before, after = read_lora_file.read(source), read_lora_file.read(done.path)
    shares = {}
    for key, site in after.sites.items():
        whole = low_rank_delta(before.sites[key]).flatten(1)
        values = torch.linalg.svdvals(whole) ** 2
        lost = (low_rank_delta(site).flatten(1) - whole).square().sum()
        assert float(lost) == pytest.approx(float(values[2:].sum()), rel=1e-3)
        shares[key] = float(values[:2].sum() / values.sum())
    assert done.kept.worst == pytest.approx(min(shares.values()), rel=1e-4)
    assert done.kept.worst_site == min(shares, key=lambda key: shares[key])
    assert f"{done.kept.total:.2%}" in "\n".join(done.lines())


@pytest.mark.parametrize(("rank", "warns"), [(1, True), (6, False)])
def test_a_rank_that_keeps_too_little_is_warned_of(rank, warns, tmp_path):
    source = written(tmp_path / "a.safetensors", (LINEAR, lora()))
    done = resize.resize(source, tmp_path / "b.safetensors", SvdRanks(rank))
    assert (done.kept.total < 0.9) == warns
    assert ("Warning: less than 90% of the LoRA is kept" in "\n".join(done.lines())) == warns


def test_energy_gives_each_module_its_own_rank(tmp_path):
    weak = lora()
    weak["lora_up.weight"] = weak["lora_up.weight"] * torch.tensor([1.0, *[1e-3] * 5])
    source = written(tmp_path / "a.safetensors", (LINEAR, weak), (CONV, KINDS["locon"]))
    done = resize.resize(source, tmp_path / "b.safetensors", SvdRanks(energy=0.95))
    after = read_lora_file.read(done.path)
    assert after.sites[LINEAR]["lora_down.weight"].shape[0] == 1
    assert after.sites[CONV]["lora_down.weight"].shape[0] > 1
    assert done.kept.worst >= 0.95
    assert after.metadata["ss_network_dim"] == "Dynamic"


def test_metadata_is_carried_and_corrected(tmp_path):
    source = written(
        tmp_path / "a.safetensors",
        (LINEAR, {name: tensor.half() for name, tensor in lora().items()}),
        metadata={"ss_network_dim": "6", "ss_seed": "7", "modelspec.title": "cat"},
    )
    done = resize.resize(source, tmp_path / "b.safetensors", SvdRanks(2))
    tensors, metadata = checkpoint.read(done.path)
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "2.0")
    assert (metadata["ss_seed"], metadata["modelspec.title"]) == ("7", "cat")
    assert metadata["sshs_model_hash"] == checkpoint.data_hash(done.path)
    assert {tensor.dtype for name, tensor in tensors.items() if "alpha" not in name} == {
        torch.float16
    }


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_alpha_is_the_rank_whatever_the_weights_type_can_hold(dtype, tmp_path):
    """In e4m3fn 17 is 16, in bf16 257 is 256: the LoRA would be too weak."""
    site = {
        "lora_down.weight": normal(300, 320).to(dtype),
        "lora_up.weight": (0.1 * normal(310, 300)).to(dtype),
        "alpha": torch.tensor(300.0),
    }
    source = written(tmp_path / "a.safetensors", (LINEAR, site))
    for rank in (17, 257):
        done = resize.resize(source, tmp_path / f"{rank}.safetensors", SvdRanks(rank))
        tensors, _ = checkpoint.read(done.path)
        assert tensors[f"{LINEAR}.alpha"].dtype == torch.float32
        assert float(tensors[f"{LINEAR}.alpha"]) == rank
        assert tensors[f"{LINEAR}.lora_up.weight"].dtype == dtype


@pytest.mark.parametrize(
    ("key", "site", "shape"),
    [
        ("lora_unet_mid_block_resnets_0_conv1", (18, 36), (2, 4, 3, 3)),
        ("lora_unet_mid_block_attentions_0_proj_in", (18, 36), (2, 36, 1, 1)),
        ("lora_unet_input_blocks_4_0_in_layers_2", (18, 36), (2, 4, 3, 3)),  # as kohya names SDXL's
        ("lora_unet_input_blocks_4_0_skip_connection", (18, 36), (2, 36, 1, 1)),
        ("lora_unet_input_blocks_4_0_emb_layers_1", (18, 36), (2, 36)),
        (LINEAR, (18, 36), (2, 36)),
    ],
)
def test_loha_becomes_a_lora_of_its_modules_shape(key, site, shape, tmp_path):
    """LyCORIS keeps kernels flat; a LoRA needs them, and SD1.x's proj_in is a convolution."""
    reader = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
    factors = {
        f"hada_w{n}_{side}": normal(*((site[0], 2) if side == "a" else (2, site[1])), seed=n)
        for n in (1, 2)
        for side in "ab"
    }
    sd15 = {"lora_down.weight": normal(1, 768), "lora_up.weight": normal(4, 1)}
    source = written(tmp_path / "a.safetensors", (key, factors), (reader, sd15))
    done = resize.resize(source, tmp_path / "b.safetensors", SvdRanks(2))
    assert read_lora_file.read(done.path).sites[key]["lora_down.weight"].shape == shape


def test_dora_keeps_its_magnitudes(tmp_path):
    site = {**lora(), "dora_scale": normal(12, 1)}
    source = written(tmp_path / "a.safetensors", (LINEAR, site))
    done = resize.resize(source, tmp_path / "b.safetensors", SvdRanks(2))
    assert torch.equal(
        read_lora_file.read(done.path).sites[LINEAR]["dora_scale"], site["dora_scale"]
    )


def test_what_has_no_rank_or_a_taken_target_is_refused(tmp_path):
    source = written(tmp_path / "a.safetensors", (LINEAR, {"oft_blocks": normal(2, 2, 2)}))
    with pytest.raises(CheckpointError, match="oft"):
        resize.resize(source, tmp_path / "b.safetensors", SvdRanks(2))
    with pytest.raises(TargetError, match="exists already"):
        resize.resize(source, source, SvdRanks(2))
    for given in ({}, {"rank": 0}, {"energy": 1.5}, {"rank": 4, "conv_rank": 0}, {"conv_rank": 4}):
        with pytest.raises(ExportError, match="--"):
            SvdRanks(**given)


def test_convolutions_are_resized_to_their_own_rank(tmp_path):
    source = written(tmp_path / "a.safetensors", (LINEAR, lora()), (CONV, KINDS["locon"]))
    done = resize.resize(source, tmp_path / "b.safetensors", SvdRanks(4, conv_rank=2))
    after = read_lora_file.read(done.path)
    ranks = {key: site["lora_down.weight"].shape[0] for key, site in after.sites.items()}
    assert ranks == {LINEAR: 4, CONV: 2}
    assert after.metadata["ss_network_dim"] == "4"
    assert json.loads(after.metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2.0"}


@pytest.fixture(scope="module")
def original(base):
    """The embedded model as its files hold it, in fp32."""
    return whole_model.read(base.settings.path).cast("fp32")


def tuned(base, original, rank, also=""):
    """The model with a LoRA of `rank` merged into it, and the deltas."""
    weights = {part: dict(tensors) for part, tensors in original.weights.items()}
    deltas = {}
    for number, site in enumerate(sites(base.parts, "attn-mlp")):
        if number % 7 == 0:
            continue  # left as it is
        before = original.weight_of(site)
        out, width = before.shape[:2]
        delta = 0.1 * normal(out, rank, seed=number) @ normal(rank, width, seed=number)
        after = before + delta.reshape(before.shape)
        weights[site.part][whole_model.parameter_name(site, "weight")] = after
        deltas[site.key] = after - before
    if also:
        weights["unet"][also] = weights["unet"][also] + 1
    return replace(original, weights=weights), deltas


def test_what_was_merged_is_extracted_again(base, original, tmp_path):
    model, deltas = tuned(base, original, rank=4)
    done = extract.extract(model, original, base, tmp_path / "a.safetensors", SvdRanks(4))
    found = read_lora_file.read(done.path)
    assert set(found.sites) == set(deltas)
    for key, delta in deltas.items():
        got = low_rank_delta(found.sites[key], delta.shape)
        assert float((got - delta).norm() / delta.norm()) < 1e-5
    assert done.kept.worst > 1 - 1e-9
    assert (done.identical, done.untouched) == (len(sites(base.parts, "attn-mlp")) - len(deltas), 0)
    assert "identical" in "\n".join(done.lines())


@pytest.mark.parametrize("saved", ["bf16", "fp16"])
@pytest.mark.parametrize("given", ["fp32", "fp16", "bf16"])
def test_a_tune_saved_in_another_type_than_its_base_differs_only_where_it_was_tuned(
    saved, given, base, original, tmp_path
):
    """Each of the two is rounded from the same fp32 weights, the tune's after its training."""
    draw = torch.Generator().manual_seed(0)
    weights = {
        part: {n: t * (1 + 1e-3 * torch.rand(t.shape, generator=draw)) for n, t in tensors.items()}
        for part, tensors in original.weights.items()
    }
    wide = replace(original, weights=weights)
    model, deltas = tuned(base, wide, rank=4)
    done = extract.extract(
        model.cast(saved), wide.cast(given), base, tmp_path / "a.safetensors", SvdRanks(4)
    )
    assert set(read_lora_file.read(done.path).sites) == set(deltas)
    assert done.untouched == 0


def test_what_differs_by_more_than_rounding_is_extracted(base, original, tmp_path):
    """One value of one weight, by one place of bf16."""
    site = sites(base.parts, "attn-mlp")[0]
    rounded = original.cast("bf16")
    weight = rounded.weight_of(site).clone()
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf, dtype=torch.bfloat16))
    name = whole_model.parameter_name(site, "weight")
    part = {**rounded.weights[site.part], name: weight}
    model = replace(rounded, weights={**rounded.weights, site.part: part})
    for like in (original, rounded):
        done = extract.extract(
            model, like, base, tmp_path / f"{like.precision}.safetensors", SvdRanks(1)
        )
        assert set(read_lora_file.read(done.path).sites) == {site.key}


def test_an_extracted_lora_has_the_energy_and_the_type_that_are_asked_for(base, original, tmp_path):
    model, _ = tuned(base, original, rank=8)
    out = tmp_path / "a.safetensors"
    done = extract.extract(model, original, base, out, SvdRanks(6, energy=0.8), precision="fp16")
    tensors, metadata = checkpoint.read(out)
    ranks = {t.shape[0] for n, t in tensors.items() if n.endswith("lora_down.weight")}
    assert len(ranks) > 1 and max(ranks) <= 6
    assert done.kept.worst > 0.5
    assert {t.dtype for n, t in tensors.items() if not n.endswith("alpha")} == {torch.float16}
    assert metadata["ss_network_dim"] == "Dynamic"


def test_what_a_lora_cannot_hold_is_said(base, original, tmp_path):
    model, _ = tuned(base, original, rank=8, also="conv_in.bias")
    done = extract.extract(model, original, base, tmp_path / "a.safetensors", SvdRanks(2))
    assert done.untouched == 1
    assert 0.2 < done.kept.worst < done.kept.total < 0.9
    assert f"{done.kept.total:.2%}" in "\n".join(done.lines())


def test_convolutions_are_extracted_at_their_own_rank(base, original, tmp_path):
    model, _ = tuned(base, original, rank=2, also="conv_in.weight")
    out = tmp_path / "a.safetensors"
    done = extract.extract(model, original, base, out, SvdRanks(3, conv_rank=1), targets="full")
    found = read_lora_file.read(done.path)
    assert found.sites["lora_unet_conv_in"]["lora_down.weight"].shape == (1, 4, 3, 3)
    assert json.loads(found.metadata["ss_network_args"]) == {"conv_dim": "1", "conv_alpha": "1.0"}
    assert done.kept.total == pytest.approx(1.0)


def test_models_that_do_not_fit_or_do_not_differ_are_refused(base, original, tmp_path):
    out = tmp_path / "a.safetensors"
    with pytest.raises(ModelError, match="same weights"):
        extract.extract(original.cast("bf16"), original, base, out, SvdRanks(4))
    cut = {**original.weights, "unet": {"conv_in.bias": torch.ones(3)}}
    with pytest.raises(ModelError, match="different architectures"):
        extract.extract(replace(original, weights=cut), original, base, out, SvdRanks(4))
    assert not list(tmp_path.iterdir())
