"""LoRAs at other strengths and as one: what diffusers and the formulas make of several."""

import pytest
import torch
from safetensors import safe_open

from lora_tensors import dora, loha, lokr, lora, mixed, tucker
from lorasweep.adapters.kohya_names import every_norm, every_site
from lorasweep.adapters.pack import file_delta
from lorasweep.adapters.unet_blocks import block_index
from lorasweep.cli.main import main
from lorasweep.export import combine_loras, merge, picture_check, whole_model
from lorasweep.export.attach_loras import attachable
from lorasweep.export.combine_loras import combine
from lorasweep.export.diffusers_lora import write_for_diffusers
from lorasweep.export.exported import ExportError
from lorasweep.export.kohya_lora import write_for_kohya
from lorasweep.export.lora_weights import PartWeights, parsed, unet_alone, weight_at
from lorasweep.lora_files import checkpoint, peft_names, read_lora_file

pytestmark = pytest.mark.usefixtures("short_pictures")


@pytest.fixture
def write(base, tmp_path):
    """Write a LoRA file of a type, on attention and MLP, from a seed of its own."""

    def write(make, seed=0, where=lambda site: True):
        draw = torch.Generator().manual_seed(seed)
        tensors = {
            f"{key}.{name}": tensor
            for key, site in every_site(base.parts).items()
            if (site.part == "text_encoder" or "attentions" in site.path) and where(site)
            for name, tensor in make(site, draw).items()
        }
        path = tmp_path / f"{make.__name__}-{seed}.safetensors"
        checkpoint.write(path, tensors, {"ss_seed": "5", "ss_sd_model_name": "base_model"})
        return path

    return write


def read(base, path):
    return read_lora_file.read(path, base)


def deltas(base, *files):
    """By site: the sum of the files' changes, each times its weight."""
    known = every_site(base.parts)
    total = {}
    for file, weight in files:
        for key, tensors in file.sites.items():
            number = weight(known[key]) if callable(weight) else weight
            total[key] = total.get(key, 0) + number * file_delta(known[key], tensors)
    return total


def assert_same(found, expected, atol=1e-6):
    kept = {key: delta for key, delta in expected.items() if bool(delta.any())}
    assert set(found) == set(kept)
    for key, delta in kept.items():
        assert torch.allclose(found[key], delta, atol=atol), key


@pytest.mark.parametrize("make", [lora, mixed, tucker, loha, lokr])
def test_half_the_strength_is_half_of_every_change(make, base, write):
    file = read(base, write(make))
    done = combine(base, [(file, -0.5)])
    assert_same(deltas(base, (done.file, 1.0)), deltas(base, (file, -0.5)))


def test_loras_of_any_ranks_are_added_exactly_where_they_meet_and_where_not(base, write):
    one = read(base, write(mixed))
    two = read(base, write(lora, 1, where=lambda site: site.part == "unet"))
    done = combine(base, [(one, 0.7), (two, -0.4)])
    assert_same(deltas(base, (done.file, 1.0)), deltas(base, (one, 0.7), (two, -0.4)))
    assert done.loss is None
    assert done.file.metadata["ss_network_dim"] == "Dynamic"
    assert "ss_seed" not in done.file.metadata
    assert "mixed-0.safetensors at 0.7" in done.file.metadata["ss_training_comment"]


@pytest.mark.parametrize("rank", [None, 8])
def test_differences_of_biases_and_norms_are_weighted_and_added_too(rank, base, tmp_path):
    draw = torch.Generator().manual_seed(0)
    site = next(one for one in every_site(base.parts).values() if one.bias is not None)
    norm = next(iter(every_norm(base.parts).values()))
    files = []
    for name in ("a", "b"):
        tensors = {f"{site.key}.{key}": tensor for key, tensor in lora(site, draw).items()}
        for key, one in (("diff_b", site), ("w_norm", norm), ("b_norm", norm)):
            shape = one.bias.shape if key != "w_norm" else one.weight.shape
            tensors[f"{one.key}.{key}"] = torch.randn(shape, generator=draw)
        checkpoint.write(tmp_path / f"{name}.safetensors", tensors, {})
        files.append(read(base, tmp_path / f"{name}.safetensors"))
    one, two = files
    both = combine(base, [(one, 0.5), (two, -2.0)], rank).file
    alone = combine(base, [(one, 0.5)], rank).file
    for name in (f"{site.key}.diff_b", f"{norm.key}.w_norm", f"{norm.key}.b_norm"):
        expected = 0.5 * one.tensors[name] - 2 * two.tensors[name]
        assert torch.allclose(both.tensors[name], expected)
        assert torch.equal(alone.tensors[name], 0.5 * one.tensors[name])


def test_a_rank_gives_the_best_approximation_of_the_sum(base, write):
    one, two = read(base, write(lora)), read(base, write(loha, 1))
    done = combine(base, [(one, 1.0), (two, 0.5)], rank=3)
    found, expected = deltas(base, (done.file, 1.0)), deltas(base, (one, 1.0), (two, 0.5))
    assert set(found) == set(expected)
    for key in list(expected)[::9]:
        whole = expected[key].flatten(1)
        lost = float((found[key].flatten(1) - whole).square().sum())
        left = float(torch.linalg.svdvals(whole.double())[3:].square().sum())
        assert lost == pytest.approx(left, rel=1e-3, abs=1e-6)
    assert done.loss is not None and done.loss.total < 1
    assert done.file.metadata["ss_network_dim"] == "3"


@pytest.mark.parametrize("makes", [(dora,), (lora, loha), (dora, lora)])
def test_what_has_no_exact_sum_asks_for_a_rank(makes, base, write):
    files = [(read(base, write(make, n)), 0.5) for n, make in enumerate(makes)]
    with pytest.raises(ExportError, match="--rank"):
        combine(base, files)
    expected = deltas(base, *files)
    found = deltas(base, (combine(base, files, rank=128).file, 1.0))
    assert_same(found, expected, atol=1e-4)


def test_parts_and_blocks_have_weights_of_their_own(base, write):
    file = read(base, write(lora))
    weights = parsed("unet:0.8,te:0,up:0.5,up3:2", "--strength")

    def by_hand(site):
        if site.part == "text_encoder":
            return 0.0
        index = block_index(site)
        return {None: 0.8, 16: 2.0}.get(index, 0.5 if (index or 0) >= 13 else 0.8)

    assert {by_hand(site) for site in every_site(base.parts).values()} >= {0.0, 0.5, 0.8}
    done = combine(base, [(file, weights)])
    assert_same(deltas(base, (done.file, 1.0)), deltas(base, (file, by_hand)))


def test_weights_of_parts_hold_attached_and_merged_too(base, write):
    file = read(base, write(lora))
    weights = parsed("te:0.3,mid:0,down1:2", "--strength")
    given = attachable(base, [(file, weights)])
    one = attachable(base, [(combine(base, [(file, weights)]).file, 1.0)])
    source = whole_model.read(base.settings.path)
    merged = merge.merge(base, source, [(file, weights)], "fp32")
    for key, delta in deltas(base, (file, lambda site: weight_at(weights, site))).items():
        site = every_site(base.parts)[key]
        assert torch.allclose(merged.weight_of(site), site.weight + delta, atol=1e-6)
    same = picture_check.compare(picture_check.draw(base, given), picture_check.draw(base, one))
    assert same.holds
    assert not picture_check.compare(
        picture_check.draw(base, given), picture_check.draw(base, attachable(base, [(file, 1.0)]))
    ).holds


def test_unet_alone_keeps_blocks():
    assert unet_alone(0.5) == PartWeights(unet=0.5, te=0.0)
    assert unet_alone(PartWeights(te=2.0, blocks={12: 0.0})) == PartWeights(te=0.0, blocks={12: 0})


@pytest.mark.parametrize("text", ["strong", "nan", "unet:x", "down12:1", "vae:1", "te", "te:", ""])
def test_what_is_no_weight_is_refused_with_the_forms(text):
    with pytest.raises(ExportError, match="give a number, or numbers by part"):
        parsed(text, "--strength")


def test_nothing_left_is_refused(base, write):
    with pytest.raises(ExportError, match="every weight is 0"):
        combine(base, [(read(base, write(lora)), 0.0)])


def predict(pipeline):
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 16, 16, generator=draw)
    with torch.no_grad():
        embeds = pipeline.text_encoder(torch.arange(77)[None]).last_hidden_state
        return pipeline.unet(latents, torch.tensor([500]), embeds).sample


def by_diffusers(base, weights):
    """diffusers' prediction with LoRA files, each at its weight, added by its own means."""
    pipeline = picture_check.pipeline_of(base)
    names = [f"a{number}" for number in range(len(weights))]
    for name, path in zip(names, weights, strict=True):
        pipeline.load_lora_weights(
            str(path.parent), weight_name=path.name, adapter_name=name, use_safetensors=True
        )
    try:
        pipeline.set_adapters(names, list(weights.values()))
        return predict(pipeline)
    finally:
        pipeline.unload_lora_weights()


def test_one_file_is_what_diffusers_makes_of_several(base, write, tmp_path):
    one, two = write(lora), write(lora, 1)
    expected = by_diffusers(base, {one: 0.7, two: -0.4})
    bare = predict(picture_check.pipeline_of(base))
    assert not torch.allclose(expected, bare, atol=1e-2)
    for write_for, name in ((write_for_kohya, "k"), (write_for_diffusers, "d")):
        target = tmp_path / f"{name}.safetensors"
        done = write_for(base.settings, [(one, 0.7), (two, -0.4)], target, None)
        assert "2 LoRAs are one, exactly" in done.lines
        assert torch.allclose(by_diffusers(base, {target: 1.0}), expected, atol=1e-5)


def export(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, words), "model=embedded"])
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


def test_any_file_goes_to_kohyas_names(base, write, tmp_path, capsys):
    file = read(base, write(lora))
    peft = tmp_path / "peft.safetensors"
    checkpoint.write(peft, peft_names.to_peft(file.tensors), {})
    target = tmp_path / "kohya.safetensors"
    code, out, err = export(capsys, peft, "--to", "kohya", "--out", target)
    assert (code, err) == (0, "")
    assert "The pictures before and after agree" in out
    with safe_open(target, "pt") as found:
        assert set(found.keys()) == set(file.tensors)
    assert_same(deltas(base, (read(base, target), 1.0)), deltas(base, (file, 1.0)))


def test_unet_only_leaves_the_text_encoder_out_of_every_file(base, write, tmp_path, capsys):
    path = write(lora)
    for to in ("kohya", "offline-lora"):
        target = tmp_path / f"{to}.safetensors"
        code, _, err = export(capsys, path, "--to", to, "--unet-only", "--out", target)
        assert (code, err) == (0, "")
        parts = {key.split("_")[1] for key in read(base, target).sites}
        assert parts == {"unet"}


def test_a_type_casts_weights_and_no_alpha(base, write, tmp_path, capsys):
    target = tmp_path / "half.safetensors"
    code, _, err = export(
        capsys, write(mixed), "--to", "kohya", "--dtype=bf16", "--strength=0.3", "--out", target
    )
    assert (code, err) == (0, "")
    tensors, _ = checkpoint.read(target)
    kinds = {name.partition(".")[2]: tensor.dtype for name, tensor in tensors.items()}
    assert kinds["alpha"] == torch.float32
    assert kinds["lora_up.weight"] == kinds["lora_down.weight"] == torch.bfloat16


def test_a_wrong_sum_is_an_error_and_leaves_nothing(base, write, tmp_path, monkeypatch):
    right = combine_loras._concatenated
    monkeypatch.setattr(combine_loras, "_concatenated", lambda members: right(members[:1]))
    loras = [(write(lora), 1.0), (write(lora, 1), 1.0)]
    with pytest.raises(ExportError, match="DISAGREE"):
        write_for_kohya(base.settings, loras, tmp_path / "out" / "sum.safetensors")
    assert list((tmp_path / "out").iterdir()) == []
