"""A run goes on from a LoRA file of any program; others are merged into its base beforehand."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import renamed_loras
from adapter_packs import predict, trained
from conftest import FEW
from lorasweep.adapters.pack import Pack
from lorasweep.core.settings import SettingsError
from lorasweep.export.whole_model import base_for_loras
from lorasweep.lora_files import checkpoint
from lorasweep.reproduce.original_run import ReproduceError
from lorasweep.reproduce.trusted_settings import refuse_other_weights
from lorasweep.runs import provenance
from lorasweep.runs.picked_readme import merged_note
from lorasweep.runs.session import load_base
from lorasweep.training.network_weights import first_adapters
from small_training import load, relative_difference, tensors, train


@pytest.fixture
def make_run(make_run):
    return lambda *overrides, **more: make_run(FEW, *overrides, **more)


def file_of(folder, base, run, change=renamed_loras.as_kohya, metadata=None, name="theirs"):
    """A trained LoRA of a run's settings, under the names of a program; what it holds, ours."""
    own = trained(base, (run.adapter, 5)).file_tensors(0)
    path = folder / f"{name}.safetensors"
    save_file({n: t.clone().contiguous() for n, t in change(own, base).items()}, path, metadata)
    return path, own


def started(base, run):
    return first_adapters(base, run)[0].file_tensors(0)


def test_a_run_begins_with_the_file(make_run, base, tmp_path):
    for number, change in enumerate((renamed_loras.as_kohya, renamed_loras.as_peft)):
        own_alpha = ("adapter.rank=4", "adapter.alpha=4")  # PEFT's file says none: the rank
        path, own = file_of(tmp_path, base, make_run(*own_alpha), change, name=f"n{number}")
        begun = started(base, make_run(*own_alpha, f"trainer.network_weights={path}"))
        assert begun.keys() == own.keys()
        assert all(torch.equal(begun[name], tensor) for name, tensor in own.items())


@pytest.mark.parametrize("adapter", ["locon", "loha", "lokr", "dora"])
def test_every_type_goes_on(adapter, make_run, base, tmp_path):
    options = (f"adapter={adapter}", "adapter.rank=2")
    path, own = file_of(tmp_path, base, make_run(*options))
    for more in ("false", "true"):
        start = f"trainer.network_weights={path}"
        begun = started(base, make_run(*options, start, f"trainer.dim_from_weights={more}"))
        assert begun.keys() == own.keys()
        assert all(torch.allclose(begun[name], tensor) for name, tensor in own.items())


def test_ranks_and_modules_of_the_file_train_beside_others_as_alone(make_run, base, tmp_path):
    """Its rank is 3, its alpha 1.5, and it has other modules than the targets."""
    others = "adapter.targets=[unet.*.attn1.to_q,text_encoder.*.q_proj]"
    shape = {"ss_network_dim": "3", "ss_network_alpha": "1.5", "ss_output_name": "theirs"}
    path, own = file_of(
        tmp_path, base, make_run(others, "adapter.rank=3", "adapter.alpha=1.5"), metadata=shape
    )
    short = ("trainer.max_train_epochs=1", "trainer.batch_size=6", "adapter.rank=8")
    start = (f"trainer.network_weights={path}", "trainer.dim_from_weights=true")
    runs = [make_run(*short, *start, number=0), make_run(*short, number=1)]
    data = load(runs[0], base)
    losses, last, _ = train(base, data, *runs)
    alone, file, _ = train(base, data, runs[0])
    name = runs[0].name
    assert losses[name] == pytest.approx(alone[name], rel=1e-5)
    written = tensors(last[name])
    assert relative_difference(written, tensors(file[name])) < 1e-5
    assert {key: tensor.shape for key, tensor in written.items()} == {
        key: tensor.shape for key, tensor in own.items()
    }
    metadata = checkpoint.read_metadata(last[name].path)
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("3", "1.5")
    assert metadata["ss_output_name"] == name


def test_what_is_not_trained_and_what_begins_anew_is_told(make_run, base, tmp_path, caplog):
    path, _ = file_of(tmp_path, base, make_run("adapter.rank=4"))
    start = f"trainer.network_weights={path}"
    begun = started(base, make_run("adapter.rank=4", "optimizer.text_encoder_lr=0", start))
    assert begun and not any(name.startswith("lora_te") for name in begun)
    assert "are not trained by these settings and left out" in caplog.text
    more = "adapter.targets=[unet.*.attn2.*,unet.*.attn1.to_q]"
    begun = started(base, make_run(more, "adapter.rank=4", start))
    assert any("attn1_to_q" in name for name in begun)
    assert "modules, which begin anew" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("adapter.rank=8", r"lora_up.weight is \(\d+, 4\), and \(\d+, 8\) by adapter"),
        ("adapter.rank=4 adapter.alpha=1", "alpha is 2, and 1 by adapter"),
        ("adapter=loha adapter.rank=4", "choose the adapter that has these"),
        ("adapter.init=pissa", "set adapter.init=kaiming"),
        ("adapter.targets=[unet.*.attn1.to_k]", "nothing of it belongs to what is trained"),
    ],
)
def test_a_file_that_does_not_fit_the_settings_is_named(overrides, says, make_run, base, tmp_path):
    path, _ = file_of(tmp_path, base, make_run("adapter.rank=4"))
    run = make_run(f"trainer.network_weights={path}", *overrides.split())
    with pytest.raises(SettingsError, match=says):
        first_adapters(base, run)


def test_files_that_are_not_there_are_named(make_run, tmp_path):
    with pytest.raises(SettingsError, match=r"network_weights=no\.safetensors: no such file"):
        make_run("trainer.network_weights=no.safetensors")
    with pytest.raises(SettingsError, match=r"trainer\.dim_from_weights takes"):
        make_run("trainer.dim_from_weights=true")
    with pytest.raises(SettingsError, match=r"model.base_weights=a\.pt: give a LoRA"):
        make_run("model.base_weights=[a.pt]")
    with pytest.raises(SettingsError, match="has 2 numbers for 0 files"):
        make_run("model.base_weights_multiplier=[1,2]")


def test_base_weights_are_merged_before_anything_is_computed(make_run, base, tmp_path):
    first, _ = file_of(tmp_path, base, make_run("adapter.rank=4"), name="first")
    second, _ = file_of(tmp_path, base, make_run("adapter=locon", "adapter.rank=2"), name="second")
    run = make_run(f"model.base_weights=[{first},{second}]", "model.base_weights_multiplier=[0.5]")
    merged = load_base(run, "cpu")
    expected = {}
    for file, times in ((first, 0.5), (second, 1.0)):
        pack = Pack.from_files(base.parts, [checkpoint.read(file)[0]])
        for site, delta in pack.delta_weights(0):
            expected[site.key] = expected.get(site.key, site.weight) + times * delta
    found = {site.key: site.weight for site in Pack.new(merged.parts, []).known.values()}
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight)
    assert not torch.allclose(predict(merged, None), predict(base, None), atol=1e-3)
    drawn_by_export = predict(base_for_loras(run.model), None)
    torch.testing.assert_close(drawn_by_export, predict(merged, None))
    config = {"model": {"base_weights": [str(first)], "base_weights_multiplier": [0.5]}}
    assert "first" in merged_note(config) and "times 0.5" in merged_note(config)
    assert merged_note({"model": {}}) == ""


def test_what_a_run_begins_with_is_part_of_how_it_was_made(make_run, base, tmp_path):
    path, _ = file_of(tmp_path, base, make_run("adapter.rank=4"))
    start, cache = str(path), tmp_path / "cache"
    provenance.record(tmp_path, make_run().model, cache, "cpu", start)
    origin = json.loads((tmp_path / "origin.json").read_text())
    assert origin["network_weights"]["path"] == start
    assert provenance.is_made_alike(tmp_path, make_run().model, cache, start)
    assert not provenance.is_made_alike(tmp_path, make_run().model, cache, None)
    merged = replace(make_run().model, base_weights=(start,))
    assert not provenance.is_made_alike(tmp_path, merged, cache, start)
    file_of(tmp_path, base, make_run("adapter.rank=2"))
    assert not provenance.is_made_alike(tmp_path, make_run().model, cache, start)


def test_a_log_can_not_name_another_file_of_this_machine(make_run, base, tmp_path, cache_dir):
    path, _ = file_of(tmp_path, base, make_run("adapter.rank=4"))
    begun = make_run("adapter.rank=4", f"trainer.network_weights={path}")
    merged = make_run(f"model.base_weights=[{path}]")
    for run, key in ((begun, "trainer.network_weights"), (merged, "model.base_weights")):
        provenance.record(tmp_path, run.model, cache_dir, "cpu", run.network_weights)
        origin = json.loads((tmp_path / "origin.json").read_text())
        refuse_other_weights(origin, run, set())
        refuse_other_weights(None, run, {key})
        with pytest.raises(ReproduceError, match=f"its {key} names a file that is another here"):
            refuse_other_weights({"model": {"files": {}}}, run, set())
    refuse_other_weights(None, make_run(), set())
