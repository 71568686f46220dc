"""What every type of adapter must hold, over all of conf/adapter."""

import json
from copy import deepcopy

import pytest
import torch

from adapter_packs import BOTH, predict, trained
from conftest import options
from lorasweep.adapters.adapter import Site
from lorasweep.adapters.dropout import Dropout
from lorasweep.adapters.initial_weights import start
from lorasweep.adapters.locon import LoConStack
from lorasweep.adapters.pack import Pack
from lorasweep.core.settings import SettingsError
from lorasweep.lora_files import checkpoint
from small_training import load, relative_difference, tensors, train

# lycoris trains one run at a time, through its package's own forward: tests/test_lycoris.py
TYPES = [name for name in options("adapter") if name != "lycoris"]


@pytest.fixture(params=TYPES)
def adapter(request, make_run):
    return make_run(f"adapter={request.param}", "adapter.rank=4").adapter


KERNELS = "adapter.targets=[unet.*.resnets.0.conv?, unet.*samplers*, unet.*.to_q]"
"""Convolutions with kernels, strided ones among them, and Linears: few, for speed."""
VARIANTS = {
    "lora orthogonal": ["adapter=lora", "adapter.init=orthogonal"],
    "locon orthogonal": ["adapter=locon", "adapter.init=orthogonal", KERNELS],
    "lora pissa": ["adapter=lora", "adapter.init=pissa"],
    "locon pissa": ["adapter=locon", "adapter.init=pissa", KERNELS],
    "dora on kernels": ["adapter=dora", KERNELS],
    "dora by input": ["adapter=dora", "adapter.wd_on_output=false", KERNELS],
    "dora pissa": ["adapter=dora", "adapter.init=pissa", KERNELS],
    "lora rslora": ["adapter=lora", "adapter.rslora=true"],
}


@pytest.fixture(params=VARIANTS)
def variant(request, make_run):
    return make_run(*VARIANTS[request.param], "adapter.rank=4").adapter


def test_a_new_adapter_changes_nothing(adapter, base):
    pack = Pack.new(base.parts, [(adapter, 0, BOTH)])
    assert torch.equal(predict(base, pack), predict(base, None))


def test_each_start_changes_nothing(variant, base):
    started = predict(base, Pack.new(base.parts, [(variant, 0, BOTH)]))
    bare = predict(base, None)
    if variant.init == "pissa":  # the frozen rows' products cancel up to the sums' rounding
        assert torch.allclose(started, bare, atol=2e-5)  # of values up to 3.6
    else:
        assert torch.equal(started, bare)


def test_attached_equals_merged_into_the_weights(adapter, base):
    check_merged(base, trained(base, (adapter, 0)))


def test_each_variant_equals_merged(variant, base):
    check_merged(base, trained(base, (variant, 0)))


def check_merged(base, pack):
    attached = predict(base, pack)
    saved = deepcopy((base.unet.state_dict(), base.text_encoder.state_dict()))
    deltas = list(pack.delta_weights(0))  # some depend on the base's weights
    try:
        for site, delta in deltas:
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


@pytest.mark.parametrize("name", TYPES)
def test_in_a_pack_each_run_computes_as_alone(name, base, make_run):
    """Two of one type and of different ranks, which share stacks, and one of another type."""
    targets = [] if name == "lora" else [KERNELS]
    small = make_run(f"adapter={name}", "adapter.rank=4", *targets).adapter
    large = make_run(f"adapter={name}", "adapter.rank=9", "adapter.alpha=2", *targets).adapter
    other = make_run(f"adapter={'lora' if name == 'loha' else 'loha'}", "adapter.rank=2").adapter
    pack = trained(base, (small, 0), (large, 1), (other, 2))
    shared = [entry.site for entry in pack.entries if (entry.start, entry.stop) == (0, 2)]
    assert {site.has_kernel for site in shared} >= ({False} if name == "lora" else {True, False})
    together = predict(base, pack, runs=3).unflatten(0, (3, 2))
    for index in range(3):
        alone = predict(base, pack.select([index]))
        assert torch.allclose(together[index], alone, atol=1e-5)


def test_runs_of_all_types_share_a_pack(base, make_run):
    runs = [make_run(f"adapter={name}", "adapter.rank=4", UNET).adapter for name in TYPES]
    pack = trained(base, *[(adapter, seed) for seed, adapter in enumerate(runs)])
    together = predict(base, pack, runs=len(runs)).unflatten(0, (len(runs), 2))
    for index in range(len(runs)):
        alone = predict(base, pack.select([index]))
        assert torch.allclose(together[index], alone, atol=1e-5)


UNET = "adapter.targets=[unet.*.to_v, unet.*.proj_in]"


def test_variants_pack_and_stack_again_without_a_change(base, make_run):
    runs = [make_run(*VARIANTS[name], "adapter.rank=4").adapter for name in VARIANTS]
    pack = trained(base, *[(adapter, seed) for seed, adapter in enumerate(runs)])
    for index in range(len(runs)):
        alone = pack.select([index])
        again, before = alone.file_tensors(0), pack.file_tensors(index)
        assert all(torch.equal(again[name], before[name]) for name in before)
        assert shapes(alone.views(0)) == shapes(pack.views(index))


def shapes(views):
    return [tensor.shape for tensors in views.values() for tensor in tensors]


def test_every_tensor_gets_a_gradient(adapter, base):
    check_gradients(base, adapter)


def test_every_tensor_of_a_variant_gets_a_gradient(variant, base):
    check_gradients(base, variant)


def check_gradients(base, adapter):
    pack = trained(base, (adapter, 0))
    pack.prepare_gradients()
    with pack.attached():
        embeds = base.encode_prompt(["a cat"])
        base.predict(torch.randn(1, 4, 16, 16), torch.tensor([500]), embeds).sum().backward()
    gradients = [g for tensors in pack.gradients(0).values() for g in tensors]
    assert gradients
    assert all(float(g.abs().sum()) > 0 for g in gradients)


def test_pissa_trains_the_first_half_of_its_files_rank(base, make_run):
    adapter = make_run("adapter.rank=4", "adapter.init=pissa").adapter
    pack = Pack.new(base.parts, [(adapter, 0, BOTH)])
    files, before = pack.file_tensors(0), pack.views(0)["unet"]
    site = next(entry.site for entry in pack.entries if entry.site.part == "unet")
    down, up = files[f"{site.key}.lora_down.weight"], files[f"{site.key}.lora_up.weight"]
    assert down.shape[0] == 8
    assert before[0].shape[0] == 4
    scale = float(files[f"{site.key}.alpha"]) / 8
    assert scale == adapter.alpha / adapter.rank
    own = scale * up[:, :4].flatten(1) @ down[:4].flatten(1)
    left, values, right = torch.linalg.svd(site.weight.flatten(1), full_matrices=False)
    best = left[:, :4] * values[:4] @ right[:4]
    assert torch.allclose(own, best, atol=1e-4)


def test_large_weights_have_the_same_pissa_start_each_time():
    weight = torch.randn(600, 500, generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    starts = [start("pissa", weight, 4, 0.5, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(starts[0][0], starts[1][0])
    assert torch.equal(state, torch.random.get_rng_state())
    assert starts[0][0].shape == (8, 500)


def test_rslora_is_a_larger_alpha_in_files(base, make_run):
    plain = make_run("adapter.rank=16").adapter
    scaled = make_run("adapter.rank=16", "adapter.rslora=true").adapter
    site = Pack.new(base.parts, [(plain, 0, BOTH)]).entries[0].site
    alphas = [float(a.initial(site, torch.Generator())["alpha"]) for a in (plain, scaled)]
    assert alphas == [8.0, 8.0 * 4]  # the square root of 16


def test_pissas_doubled_rank_is_in_the_metadata_of_each_block(make_run):
    blocks = "adapter.block_ranks={down: 4, mid: 0, up: 2}"
    overrides = ["adapter=locon", "adapter.rank=4", "adapter.conv_rank=6", blocks]
    plain, pissa = (
        make_run(*overrides, f"adapter.init={init}").adapter.metadata()
        for init in ("kaiming", "pissa")
    )
    assert (plain["ss_network_dim"], pissa["ss_network_dim"]) == ("4", "8")
    before, after = (json.loads(metadata["ss_network_args"]) for metadata in (plain, pissa))
    for name in ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"):
        doubled = [2 * float(value) for value in before[name].split(",")]
        assert [float(value) for value in after[name].split(",")] == doubled


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["adapter.rank=5", "adapter.init=orthogonal"], "even ranks"),
        (["adapter.init=pissa", "adapter.rank_dropout=0.1"], "pissa"),
        (["adapter.init=pissa", "adapter.scale_weight_norms=1"], "pissa"),
        (["adapter.targets=conv"], "use adapter=locon"),
        (["adapter=locon", "adapter.conv_rank=null", "adapter.conv_alpha=1"], "belong together"),
        (["adapter=locon", "adapter.conv_rank=null", "adapter.conv_alpha=null"], "must be given"),
        (["adapter.block_ranks={down:[4,4],mid:4,up:4}"], "block_ranks.down"),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides, says, make_run):
    with pytest.raises(SettingsError, match=says):
        make_run(*overrides)


def test_padded_ranks_stay_zero_and_out_of_files(base, make_run):
    small, large = make_run("adapter.rank=2").adapter, make_run("adapter.rank=8").adapter
    pack = trained(base, (small, 0), (large, 1))
    downs = [t for name, t in pack.file_tensors(0).items() if "lora_down" in name]
    assert {t.shape[0] for t in downs} == {2}
    assert all(bool((entry.stack.down[0, 2:] == 0).all()) for entry in pack.entries)


def test_a_tucker_locon_of_another_program_is_computed(base, make_run):
    run = make_run("adapter=locon", "adapter.rank=4", KERNELS).adapter
    pack = trained(base, (run, 0))
    entry = next(entry for entry in pack.entries if entry.site.has_kernel)
    draw = torch.Generator().manual_seed(0)
    kernel = entry.site.weight.shape
    file = {
        "lora_down.weight": torch.randn(3, kernel[1], 1, 1, generator=draw),
        "lora_mid.weight": torch.randn(3, 3, *kernel[2:], generator=draw),
        "lora_up.weight": torch.randn(kernel[0], 3, 1, 1, generator=draw),
        "alpha": torch.tensor(1.0),
    }
    check_merged(base, Pack.from_files(base.parts, [named(entry.site, file)]))
    wrong = {**file, "lora_mid.weight": file["lora_mid.weight"][:, :2]}
    with pytest.raises(ValueError, match="doesn't fit"):
        Pack.from_files(base.parts, [named(entry.site, wrong)])


def test_magnitudes_of_another_type_are_computed(base, make_run):
    """LyCORIS trains DoRA over LoHa too; the file alone says so."""
    run = make_run("adapter=loha", "adapter.rank=4", UNET).adapter
    pack = trained(base, (run, 0))
    tensors = pack.file_tensors(0)
    for site, delta in pack.delta_weights(0):
        norms = (site.weight + delta).flatten(1).norm(dim=1)
        tensors[f"{site.key}.dora_scale"] = 1.5 * norms.reshape(-1, *[1] * (delta.dim() - 1))
    check_merged(base, Pack.from_files(base.parts, [tensors]))


def named(site, tensors):
    return {f"{site.key}.{name}": tensor for name, tensor in tensors.items()}


def test_grouped_convolutions_equal_their_delta(make_run):
    adapter = make_run("adapter=locon", "adapter.rank=4").adapter
    module = torch.nn.Conv2d(6, 10, 3, stride=2, padding=2, dilation=2, groups=2)
    site = Site("key", "unet", "path", module.requires_grad_(False))
    tensors = adapter.initial(site, torch.Generator())
    tensors["lora_up.weight"].normal_(generator=torch.Generator().manual_seed(0))
    stack = LoConStack.of(site, [(adapter, tensors)] * 2)
    x = torch.randn(2, 6, 9, 9)
    merged = module(x) + site.apply(x, stack.delta_weight(0))
    assert torch.allclose(stack.forward(x, module(x), None), merged, atol=1e-5)


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
@pytest.mark.parametrize("name", TYPES)
def test_dropout_is_repeatable_by_seed_and_step_and_only_in_training(name, kind, base, make_run):
    overrides = [f"adapter={name}", "adapter.rank=4"]
    if not hasattr(make_run(*overrides).adapter, kind):
        pytest.skip(f"{name} has no {kind}")
    pack = trained(base, (make_run(*overrides, f"adapter.{kind}=0.5").adapter, 3))

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


@pytest.mark.parametrize("name", ["lora", "locon", "dora"])
def test_a_dropped_module_computes_as_the_base(name, base, make_run):
    adapter = make_run(f"adapter={name}", "adapter.rank=4", "adapter.module_dropout=0.5").adapter
    pack = trained(base, (adapter, 0))
    site, stack = pack.entries[0].site, pack.entries[0].stack
    x, y = torch.randn(1, 4, site.weight.shape[1]), torch.randn(1, 4, site.weight.shape[0])
    draws = [stack.forward(x, y, Dropout([0], [step], "site")) for step in range(40)]
    bare = [draw for draw in draws if torch.equal(draw, y)]
    whole = stack.forward(x, y, None)
    assert 5 < len(bare) < 35
    assert len(bare) + sum(torch.equal(draw, whole) for draw in draws) == 40


def test_dropout_keeps_the_expected_strength(base, make_run):
    """Survivors are scaled up: over many draws the delta is that without dropout."""
    adapter = make_run("adapter.rank=8", "adapter.rank_dropout=0.5").adapter
    pack = trained(base, (adapter, 0))
    site, stack = pack.entries[0].site, pack.entries[0].stack
    x, y = torch.randn(1, 4, site.weight.shape[1]), torch.zeros(1, 4, site.weight.shape[0])
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


FEW = ("dataset.num_images=2", "trainer.max_train_epochs=1", "adapter.rank=4", UNET)


def test_runs_of_all_types_train_together_as_alone(base, make_run):
    runs = [make_run(f"adapter={name}", *FEW, number=n) for n, name in enumerate(TYPES)]
    data = load(runs[0], base)
    losses, last, _ = train(base, data, *runs)
    for run in runs:
        alone_losses, alone, _ = train(base, data, run)
        assert losses[run.name] == pytest.approx(alone_losses[run.name], rel=1e-5)
        difference = relative_difference(tensors(last[run.name]), tensors(alone[run.name]))
        assert difference < 1e-5


def test_half_precision_files_of_dora_round_its_delta_no_more_than_its_factors(base, make_run):
    files = []
    for dtype in ("fp32", "bf16"):
        run = make_run("adapter=dora", *FEW, f"trainer.save_dtype={dtype}")
        _, last, _ = train(base, load(run, base), run)
        files.append(tensors(last[run.name]))
    assert {t.dtype for n, t in files[1].items() if ".lora_" in n} == {torch.bfloat16}
    exact, rounded = (
        {site.key: delta for site, delta in Pack.from_files(base.parts, [file]).delta_weights(0)}
        for file in files
    )
    assert relative_difference(rounded, exact) < 0.01  # bf16 has 8 bits of mantissa
