"""Merged models equal attached adapters; what is written is checked; a word finds its LoRA."""

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapter_packs import predict, trained
from candidates import candidate
from conftest import options
from lorasweep.cli.main import main
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.settings import SettingsError
from lorasweep.export import find_lora, merge, picture_check, whole_model
from lorasweep.export.attach_loras import attachable, attached
from lorasweep.export.exported import Exported, ExportError
from lorasweep.export.find_lora import OriginError
from lorasweep.export.generic_diffusion_feature import offline_lora
from lorasweep.export.picture_check import EXACT
from lorasweep.lora_files import checkpoint, read_lora_file

pytestmark = pytest.mark.usefixtures("short_pictures")


@pytest.fixture(scope="module")
def source(base):
    """The base model's tensors as its files hold them."""
    return whole_model.read(base.settings.path)


@pytest.fixture
def lora(base, make_run, tmp_path):
    """Write a LoRA file, of the given type and seed, as if it had been trained."""

    def write(seed=0, name="lora"):
        pack = trained(base, (make_run(f"adapter={name}", "adapter.rank=4").adapter, seed))
        path = tmp_path / f"{name}-{seed}.safetensors"
        checkpoint.write(path, pack.file_tensors(0), {"ss_sd_model_name": "base_model"})
        return path

    return write


def read(base, *loras):
    return [(read_lora_file.read(path, base), weight) for path, weight in loras]


def with_weights(base, model):
    """The base with a model's tensors, in fp32."""
    unet, text_encoder = deepcopy(base.unet), deepcopy(base.text_encoder)
    unet.load_state_dict(model.weights["unet"])
    flat = {n.removeprefix("text_model."): t for n, t in model.weights["text_encoder"].items()}
    text_encoder.load_state_dict(flat)
    return replace(base, unet=unet, text_encoder=text_encoder)


def prediction_of(base, model):
    return predict(with_weights(base, model), None)


@pytest.mark.parametrize("name", options("adapter"))
def test_merged_equals_attached_for_every_type_of_adapter(name, base, source, lora):
    files = read(base, (lora(name=name), 1.0))
    [(pack, _)] = attachable(base, files)
    merged = prediction_of(base, merge.merge(base, source, files, "fp32"))
    expected = predict(base, pack)
    assert not torch.allclose(expected, predict(base, None), atol=1e-2)
    assert torch.allclose(merged, expected, atol=1e-5)


def test_half_the_strength_is_half_of_every_delta(base, source, lora):
    path = lora()
    tensors, _ = checkpoint.read(path)
    by_hand = {n: t * 0.5 if n.endswith(".alpha") else t for n, t in tensors.items()}
    checkpoint.write(path.with_name("half.safetensors"), by_hand, {})
    [(half, _)] = attachable(base, read(base, (path.with_name("half.safetensors"), 1.0)))
    weak = merge.merge(base, source, read(base, (path, 0.5)), "fp32")
    assert torch.allclose(prediction_of(base, weak), predict(base, half), atol=1e-5)


def test_several_loras_are_the_sum_of_their_weighted_deltas(base, source, lora):
    one, two = lora(0), lora(1)
    files = read(base, (one, 0.7), (two, -0.4))
    merged = merge.merge(base, source, files, "fp32")
    back = merge.merge(base, source, read(base, (two, -0.4), (one, 0.7)), "fp32")
    with attached(attachable(base, files)):
        expected = predict(base, None)
    assert torch.allclose(prediction_of(base, merged), expected, atol=1e-5)
    assert torch.allclose(prediction_of(base, back), expected, atol=1e-5)
    assert torch.equal(predict(base, None), prediction_of(base, source))  # the base stays bare


def test_a_merged_folder_keeps_the_bases_type_and_draws_what_the_lora_draws(base, lora, tmp_path):
    done = merge.merged(base.settings, [(lora(), 1.0)], tmp_path / "model")
    assert any("before and after agree" in line for line in done.lines)
    assert (tmp_path / "model-check.png").exists()
    model = whole_model.read(str(tmp_path / "model"))
    assert model.precision == "fp16"


def test_a_merged_file_holds_what_the_folder_holds(base, lora, tmp_path, make_run):
    path = lora()
    one, other = tmp_path / "m.safetensors", tmp_path / "m"
    done = merge.merged(base.settings, [(path, 0.5)], one, precision="fp32")
    merge.merged(base.settings, [(path, 0.5)], other, precision="fp32")
    assert any("predicts v" in line for line in done.lines)
    file = make_run(f"model.path={one}", f"model.config={base.settings.path}").model.load()
    folder = make_run(f"model.path={other}").model.load()
    assert torch.equal(predict(file, None), predict(folder, None))


def test_a_wrong_merge_is_an_error_and_leaves_nothing(base, lora, tmp_path, monkeypatch):
    path = lora()
    monkeypatch.setattr(merge, "merge", lambda base, model, *_: model)  # the LoRA is lost
    with pytest.raises(ExportError, match="DISAGREE"):
        merge.merged(base.settings, [(path, 1.0)], tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


def test_offline_lora_writes_a_folder_and_the_lines_that_load_it(base, lora, tmp_path):
    done = offline_lora(base.settings, [(lora(), 1.0)], tmp_path / "model")
    assert any("StableDiffusionImg2ImgPipeline" in line for line in done.lines)
    assert done.lines[-2:] == (
        "from diffusion_feature import FeatureExtractor",
        'df = FeatureExtractor(layer="feature/configs/config_15_practical.json", version="1-5",'
        f' device="cuda", img_size=512, offline_lora={str(tmp_path / "model")!r})',
    )


def test_offline_lora_as_a_file_names_folder_and_file(base, lora, tmp_path):
    done = offline_lora(base.settings, [(lora(), 1.0)], tmp_path / "x" / "my.safetensors")
    assert done.path.is_file()
    ending = f"offline_lora={str(tmp_path / 'x')!r}, offline_lora_filename='my.safetensors')"
    assert done.lines[-1].endswith(ending)
    assert any("holds its own base" in line for line in done.lines)  # this one's isn't SD1.5
    assert any("needs peft: pip install peft" in line for line in done.lines)


def test_equal_pictures_agree_and_a_lost_lora_does_not(base, lora):
    [adapter] = attachable(base, read(base, (lora(), 1.0)))
    bare, before = picture_check.draw(base), picture_check.draw(base, [adapter])
    assert picture_check.compare(before, before, bare).holds
    for tolerance in picture_check.TOLERANCES.values():
        assert not picture_check.compare(before, bare, bare, tolerance).holds


def test_a_weak_lora_that_is_lost_is_no_rounding():
    """In bf16 the mean alone would let pass what is the LoRA's whole effect."""
    lost = picture_check.Agreement(3.0, 9, effect=3.0, tolerance=picture_check.TOLERANCES["bf16"])
    kept = replace(lost, mean=0.5)
    assert (lost.holds, kept.holds) == (False, True)
    unseen = picture_check.Agreement(0.0, 0, effect=0.0, tolerance=EXACT)
    assert "too little for a picture to tell" in unseen.line("x")


def test_a_larger_rank_is_advised_only_where_it_is_needed():
    far = picture_check.Agreement(3.0, 9, effect=3.0, tolerance=EXACT)
    assert "NOT CLOSE" in far.approximate_line("x") and "larger --rank" in far.approximate_line("x")
    assert "--rank" not in replace(far, mean=0.5).approximate_line("x")


@pytest.mark.parametrize(
    ("to", "words", "says"),
    [
        ("merged", ["--rank=4"], "--rank has no effect"),
        ("merged", ["--with=b.safetensors"], "give FILE=WEIGHT"),
        ("merged", ["--strength=much"], "give a number, or numbers by part"),
        ("diffusers-lora", ["--dtype=fp16"], "--dtype has no effect"),
        ("diffusers-lora", ["--out=folder"], r"ends in \.safetensors"),
        ("offline-lora", ["--rank=4"], "--rank has no effect"),
        ("diffusers-lora", ["--vae=v.safetensors"], "--vae has no effect"),
    ],
)
def test_what_has_no_effect_is_refused(to, words, says, lora, capsys):
    with pytest.raises(SystemExit):
        main(["export", str(lora()), "--to", to, *words, "model=embedded"])
    assert re.search(says, capsys.readouterr().err)


def test_a_file_knows_its_base_by_the_config_beside_it(lora, tmp_path):
    path = lora()
    (tmp_path / "config.yaml").write_text(
        "model: {_target_: Model, path: '${embedded:base_model}',"
        " revision: null, config: null, allow_pickle: false, clip_skip: 2, prediction_type: null}"
    )
    found = find_lora.find(str(path), [])
    assert (found.name, found.model.clip_skip) == ("lora-0", 2)
    assert find_lora.find(str(path), ["model=embedded"]).model.clip_skip == 1  # overrides win


def test_a_file_knows_its_base_by_its_metadata(base, lora):
    found = find_lora.find(str(lora()), [])
    assert Path(found.model.path).name == "base_model"
    assert "by its metadata" in found.lines[0]


def test_a_file_of_an_unknown_base_asks_for_it(lora, tmp_path):
    path = lora()
    checkpoint.write(path, checkpoint.read(path)[0], {})
    with pytest.raises(OriginError, match="which base model is it for"):
        find_lora.find(str(path), [])
    with pytest.raises(SettingsError, match="say which"):
        find_lora.find(str(path), ["model.clip_skip=2"])


def test_a_run_means_its_best_checkpoint_in_its_newest_sweep(monkeypatch, tmp_path, base):
    file = tmp_path / "a.safetensors"
    checkpoint.write(file, {"lora_unet_x.alpha": torch.ones(())}, {})
    digest = checkpoint.read_metadata(file)["sshs_model_hash"]
    found = [
        replace(candidate(1, loss_rel=0.1), sweep="older"),
        *(
            replace(candidate(n, loss_rel=x), path=file, hash=digest)
            for n, x in ((2, 0.5), (3, 0.4), (4, 0.6))
        ),
        candidate(5, run="b", loss_rel=0.2),
    ]
    target = f"_target_: Model, path: {base.settings.path}"
    rest = "revision: null, config: null, allow_pickle: false, clip_skip: 1, prediction_type: null"
    monkeypatch.setattr(find_lora.tracking, "candidates", lambda *_: found)
    monkeypatch.setattr(find_lora.tracking, "config_of", lambda *_: f"model: {{{target}, {rest}}}")
    by_run = find_lora.find("a", [f"output_root={tmp_path}"])
    assert by_run.path == file
    assert "a-e003 of sweep s, the best of its 3 by val/loss_rel" in by_run.lines[0]
    found[1] = replace(found[1], chosen_by="person")
    picked = find_lora.find("a", [f"output_root={tmp_path}"])
    assert f"{found[1].name} of sweep s, chosen by a person" in picked.lines[0]
    assert "a-e002" in find_lora.find("a-e002", [f"output_root={tmp_path}"]).lines[0]
    with pytest.raises(OriginError, match="runs are: a, b"):
        find_lora.find("c", [f"output_root={tmp_path}"])


def test_words_and_options_may_stand_in_any_order(lora, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        merge,
        "merged",
        lambda model, loras, target, **rest: asked.update(l=loras, t=target) or DONE,
    )
    words = ["--to", "merged", "--strength", "0.8", str(lora()), "--with", "b.safetensors=0.5"]
    with pytest.raises(SystemExit) as ended:
        main(["export", *words, f"output_root={tmp_path}", "model=embedded"])
    assert ended.value.code == 0
    assert asked["l"] == [(tmp_path / "lora-0.safetensors", 0.8), (Path("b.safetensors"), 0.5)]
    assert asked["t"] == tmp_path / "exports" / "lora-0-merged"


DONE = Exported(Path("x"), ())


def test_a_config_beside_a_file_can_name_no_class_and_trust_no_pickle(lora, tmp_path):
    """A file may come from anywhere, and so may what lies beside it."""
    file = tmp_path / "theirs.safetensors"
    file.write_bytes(lora().read_bytes())
    mark = tmp_path / "ran"
    config_file = tmp_path / "config.yaml"
    config_file.write_text(f"model: {{_target_: subprocess.getoutput, cmd: 'touch {mark}'}}")
    with pytest.raises(ValueError, match=r"model\.cmd: there is no such setting"):
        find_lora.find(str(file), [])
    pickle = tmp_path / "evil.ckpt"
    pickle.write_bytes(b"not to be loaded")
    values = "revision: null, config: null, clip_skip: 1, prediction_type: null"
    config_file.write_text(f"model: {{path: {pickle}, allow_pickle: true, {values}}}")
    with pytest.raises(ValueError, match="pickled"):
        find_lora.find(str(file), [])
    assert not mark.exists()


def test_what_was_overwritten_comes_back_when_the_last_step_fails(tmp_path, monkeypatch):
    from lorasweep.core.atomic_write import staged

    target = tmp_path / "model"
    target.mkdir()
    (target / "model_index.json").write_text("old")
    rename = Path.rename

    def full(self, to):
        if self.parent.name.startswith(".model.") and self.name == "model":
            raise OSError("no space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="no space"), staged(target, overwrite=True) as place:
        place.mkdir()
    assert (target / "model_index.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_differences_of_norms_and_biases_are_added_to_the_models(base, source, lora, tmp_path):
    """An oracle: torch's own addition to the parameters, under the names that ComfyUI gives."""
    names = {
        "diffusion_model.input_blocks.1.0.in_layers.0": "down_blocks.0.resnets.0.norm1",
        "diffusion_model.input_blocks.1.1.norm": "down_blocks.0.attentions.0.norm",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_norm2": (
            "mid_block.attentions.0.transformer_blocks.0.norm2"
        ),
        "diffusion_model.input_blocks.0.0": "conv_in",
        "diffusion_model.out.2": "conv_out",
    }
    tensors, _ = checkpoint.read(lora())
    draw, unet = torch.Generator().manual_seed(0), deepcopy(base.unet)
    for theirs, path in names.items():
        module = unet.get_submodule(path)
        is_norm = "norm" in path
        for parameter, role in ((module.weight, "diff"), (module.bias, "diff_b")):
            if is_norm or role == "diff_b":
                difference = 0.3 * torch.randn(parameter.shape, generator=draw)
                parameter.data += difference
                named = {"diff": "w_norm", "diff_b": "b_norm"}[role] if "lora_" in theirs else role
                tensors[f"{theirs}.{named}"] = difference
    path = tmp_path / "with-norms.safetensors"
    checkpoint.write(path, tensors, {})
    expected = predict(replace(base, unet=unet), None)
    alone = tmp_path / "norms.safetensors"
    plain = set(checkpoint.read(lora())[0])
    checkpoint.write(alone, {n: t for n, t in tensors.items() if n not in plain}, {})
    files = read(base, (alone, 1.0))
    assert torch.allclose(
        prediction_of(base, merge.merge(base, source, files)), expected, atol=1e-3
    )
    [(pack, _)] = attachable(base, files)
    assert torch.allclose(predict(base, pack), expected, atol=1e-5)
    done = merge.merged(base.settings, [(path, 0.7)], tmp_path / "model")
    assert any("before and after agree" in line for line in done.lines)


def test_another_base_is_suspected_only_where_the_widths_say_so(base, lora, tmp_path):
    tensors, _ = checkpoint.read(lora())
    strange = {"lora_unet_conv_of_nobody.lora_down.weight": torch.ones(2, 3)} | {
        "lora_unet_conv_of_nobody.lora_up.weight": torch.ones(3, 2)
    }
    checkpoint.write(tmp_path / "strange.safetensors", {**tensors, **strange}, {})
    with pytest.raises(CheckpointError, match=r"no such module$"):
        attachable(base, read(base, (tmp_path / "strange.safetensors", 1.0)))
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    wide = {
        f"{key}.lora_down.weight": torch.ones(2, 768),
        f"{key}.lora_up.weight": torch.ones(640, 2),
    }
    checkpoint.write(tmp_path / "wide.safetensors", wide, {})
    with pytest.raises(CheckpointError, match="Is it of another base than"):
        attachable(base, read(base, (tmp_path / "wide.safetensors", 1.0)))
