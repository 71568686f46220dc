"""What every type of adapter must hold, over all of conf/adapter."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from conftest import options
from lorasweep import checkpoint
from lorasweep.adapters.keys import sites
from lorasweep.adapters.pack import Pack

DATA = Path(__file__).parent / "data"
BOTH = frozenset({"text_encoder", "unet"})


@pytest.fixture(params=options("adapter"))
def adapter(request, make_run):
    return make_run(f"adapter={request.param}", "adapter.rank=4").adapter


def trained(base, *runs):
    """A pack whose deltas are not zero: as if it had been trained."""
    pack = Pack.new(base.parts, [(adapter, seed, BOTH) for adapter, seed in runs])
    draw = torch.Generator().manual_seed(0)
    for index in range(len(pack)):
        for tensors in pack.views(index).values():
            for tensor in tensors:
                tensor += 0.05 * torch.randn(tensor.shape, generator=draw)
    return pack


def predict(base, pack, rows=2, runs=1):
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, 4, 16, 16, generator=draw).repeat(runs, 1, 1, 1)
    timesteps = torch.tensor([100, 900][:rows]).repeat(runs)
    with torch.no_grad(), base.computing_with(pack):
        embeds = base.encode_prompt(["a cat", "a rocket"][:rows] * runs)
        return base.predict(latents, timesteps, embeds)


def test_a_new_adapter_changes_nothing(adapter, base):
    pack = Pack.new(base.parts, [(adapter, 0, BOTH)])
    assert torch.equal(predict(base, pack), predict(base, None))


def test_attached_equals_merged_into_the_weights(adapter, base):
    pack = trained(base, (adapter, 0))
    attached = predict(base, pack)
    saved = deepcopy((base.unet.state_dict(), base.text_encoder.state_dict()))
    try:
        for site, delta in pack.delta_weights(0):
            site.weight.data += delta
        merged = predict(base, None)
    finally:
        base.unet.load_state_dict(saved[0])
        base.text_encoder.load_state_dict(saved[1])
    assert not torch.allclose(attached, predict(base, None), atol=1e-2)
    assert torch.allclose(attached, merged, atol=1e-4)  # fp32 sums in another order


def test_a_saved_file_loads_to_the_same_predictions(adapter, base, tmp_path):
    pack = trained(base, (adapter, 0))
    checkpoint.write(tmp_path / "a.safetensors", pack.file_tensors(0), {})
    tensors, _ = checkpoint.read(tmp_path / "a.safetensors")
    loaded = Pack.from_files(base.parts, [tensors])
    assert torch.equal(predict(base, loaded), predict(base, pack))


def test_in_a_pack_each_run_computes_as_alone(adapter, base, make_run):
    other = make_run("adapter.rank=9", "adapter.alpha=2").adapter
    pack = trained(base, (adapter, 0), (other, 1), (adapter, 2))
    together = predict(base, pack, runs=3).unflatten(0, (3, 2))
    for index in range(3):
        alone = predict(base, pack.select([index]))
        assert torch.allclose(together[index], alone, atol=1e-5)


def test_every_tensor_gets_a_gradient(adapter, base):
    pack = trained(base, (adapter, 0))
    pack.prepare_gradients()
    with pack.attached():
        embeds = base.encode_prompt(["a cat"])
        base.predict(torch.randn(1, 4, 16, 16), torch.tensor([500]), embeds).sum().backward()
    gradients = [g for tensors in pack.gradients(0).values() for g in tensors]
    assert gradients
    assert all(float(g.abs().sum()) > 0 for g in gradients)


def test_padded_ranks_stay_zero_and_out_of_files(base, make_run):
    small, large = make_run("adapter.rank=2").adapter, make_run("adapter.rank=8").adapter
    pack = trained(base, (small, 0), (large, 1))
    downs = [t for name, t in pack.file_tensors(0).items() if "lora_down" in name]
    assert {t.shape[0] for t in downs} == {2}
    assert all(bool((entry.stack.down[0, 2:] == 0).all()) for entry in pack.entries)


def test_runs_of_different_targets_share_a_pack(base, make_run):
    everywhere = make_run("adapter.rank=4").adapter
    unet = make_run("adapter.rank=4", "adapter.targets=unet-only").adapter
    pack = trained(base, (everywhere, 0), (unet, 1))
    together = predict(base, pack, runs=2).unflatten(0, (2, 2))
    for index in range(2):
        alone = predict(base, pack.select([index]))
        assert torch.allclose(together[index], alone, atol=1e-5)
    assert not any(name.startswith("lora_te") for name in pack.file_tensors(1))


@pytest.mark.parametrize("kind", ["network_dropout", "rank_dropout", "module_dropout"])
def test_dropout_is_repeatable_by_seed_and_step_and_only_in_training(kind, base, make_run):
    pack = trained(base, (make_run("adapter.rank=4", f"adapter.{kind}=0.5").adapter, 3))

    def train_pass(step):
        with torch.no_grad(), pack.attached(dropout_steps=[step]):
            embeds = base.encode_prompt(["a cat"])
            return base.predict(torch.ones(1, 4, 16, 16), torch.tensor([500]), embeds)

    assert torch.equal(train_pass(1), train_pass(1))
    assert not torch.equal(train_pass(1), train_pass(2))
    assert torch.equal(predict(base, pack), predict(base, pack))


def test_dropout_in_a_pack_is_the_runs_own(base, make_run):
    dropping = make_run("adapter.rank=4", "adapter.rank_dropout=0.5").adapter
    plain = make_run("adapter.rank=6").adapter
    pack = trained(base, (plain, 0), (dropping, 3))

    def train_pass(pack, runs):
        with torch.no_grad(), pack.attached(dropout_steps=[7] * runs):
            embeds = base.encode_prompt(["a cat"] * runs)
            latents, timesteps = torch.ones(runs, 4, 16, 16), torch.tensor([500] * runs)
            return base.predict(latents, timesteps, embeds)

    together = train_pass(pack, 2)
    assert torch.allclose(together[1], train_pass(pack.select([1]), 1)[0], atol=1e-5)
    assert torch.allclose(together[0], predict_ones(base, pack.select([0])), atol=1e-5)


def predict_ones(base, pack):
    with torch.no_grad(), pack.attached():
        embeds = base.encode_prompt(["a cat"])
        return base.predict(torch.ones(1, 4, 16, 16), torch.tensor([500]), embeds)[0]


def test_dropout_keeps_the_expected_strength(base, make_run):
    """Survivors are scaled up: over many draws the delta is that without dropout."""
    adapter = make_run("adapter.rank=8", "adapter.rank_dropout=0.5").adapter
    pack = trained(base, (adapter, 0))
    site, stack = pack.entries[0].site, pack.entries[0].stack
    x, y = torch.randn(1, 4, site.weight.shape[1]), torch.zeros(1, 4, site.weight.shape[0])
    from lorasweep.adapters import Dropout

    draws = [stack.forward(x, y, Dropout([0], [step], "site")) for step in range(2000)]
    expected = stack.forward(x, y, None)
    error = (torch.stack(draws).mean(0) - expected).norm() / expected.norm()
    assert error < 0.1  # 2,000 draws of 8 channels: a standard error of some percent


def test_norm_limit_shrinks_only_deltas_that_exceed_it(adapter, base):
    pack = trained(base, (adapter, 0))
    before = [float(delta.norm()) for _, delta in pack.delta_weights(0)]
    limit = sorted(before)[len(before) // 2]
    pack.limit_norm(0, limit)
    after = [float(delta.norm()) for _, delta in pack.delta_weights(0)]
    for old, new in zip(before, after, strict=True):
        assert new == pytest.approx(min(old, limit), rel=1e-4)


def test_names_and_shapes_are_kohyas_on_sd15(make_run):
    expected = json.loads((DATA / "kohya_lora_dim8.json").read_text())
    adapter = make_run("adapter.rank=8").adapter
    draw = torch.Generator()
    ours = {
        f"{site.key}.{name}": list(tensor.shape)
        for site in sites(sd15_parts(), "attn-mlp")
        for name, tensor in adapter.initial(site, draw).items()
    }
    assert ours == expected
    assert len(expected) == 3 * 264


def sd15_parts():
    """SD1.5's UNet and text encoder without weights, on torch's meta device."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from lorasweep.models import parts_of

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        config = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        return parts_of(CLIPTextModel(config), unet)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {**t, "lora_unet_nowhere.alpha": torch.ones(())}, "no such module"),
        (lambda t: {k: v for k, v in t.items() if not k.endswith("alpha")}, "not a standard LoRA"),
        (lambda t: {k: v[..., :1] if v.dim() == 2 else v for k, v in t.items()}, "don't fit"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_reason(change, says, base, make_run):
    pack = Pack.new(base.parts, [(make_run("adapter.rank=4").adapter, 0, BOTH)])
    with pytest.raises(ValueError, match=says):
        Pack.from_files(base.parts, [change(pack.file_tensors(0))])
