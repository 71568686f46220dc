"""LyCORIS's own forward is the oracle of every type: the same weights give the same output.

Its merge isn't asked: in 4.1.3 that applies alpha / rank twice for LoHa and LoKr.
"""

import json
from copy import deepcopy
from dataclasses import replace
from functools import cache
from importlib import metadata

import pytest
import torch
from lycoris.modules import NormModule
from torch import nn

from conftest import options
from lorasweep.adapters import lycoris_module as oracle
from lorasweep.adapters.adapter import Site
from lorasweep.adapters.differences import bias_delta
from lorasweep.adapters.dropout import Dropout
from lorasweep.adapters.kohya_names import by_site
from lorasweep.adapters.lokr import factorization
from lorasweep.adapters.pack import Pack, check_fit, file_delta, make_stack
from lorasweep.config.compose import compose
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.settings import SettingsError, build
from lorasweep.lora_files.kohya_form import kohya_form

torch.manual_seed(0)
SITES = {
    "Linear": Site("lora_unet_linear", "unet", "linear", nn.Linear(36, 64)),
    "1x1": Site("lora_unet_1x1", "unet", "1x1", nn.Conv2d(36, 64, 1)),
    "3x3": Site("lora_unet_3x3", "unet", "3x3", nn.Conv2d(36, 64, 3, padding=1)),
    "3x3, stride 2": Site("lora_unet_down", "unet", "down", nn.Conv2d(36, 64, 3, 2, padding=1)),
}
for site in SITES.values():
    site.module.requires_grad_(False)

VARIANTS = {
    **{name: (f"adapter={name}",) for name in options("adapter")},
    "lokr, both decomposed": ("adapter=lokr", "adapter.decompose_both=true", "adapter.rank=2"),
    "lokr, full matrix": ("adapter=lokr", "adapter.full_matrix=true"),
    "lokr, factor 4": ("adapter=lokr", "adapter.factor=4"),
    "loha, conv rank": ("adapter=loha", "adapter.conv_rank=2", "adapter.conv_alpha=3"),
    "dora of a locon": ("adapter=dora", "adapter.targets=full"),
    "dora on inputs": ("adapter=dora", "adapter.targets=full", "adapter.wd_on_output=false"),
    "oft": ("adapter=lycoris", "adapter.algo=diag-oft", "adapter.args={rescaled: true}"),
    "full": ("adapter=lycoris", "adapter.algo=full"),
}


@cache
def adapter(*overrides):
    cfg = compose(["experiment=demo", "adapter.rank=3", "adapter.alpha=2", *overrides])
    return build(cfg.adapter, "adapter")


def trained(adapter, site, seed=0):
    """A stack of one run whose tensors have moved from their start."""
    draw = torch.Generator().manual_seed(seed)
    tensors = adapter.initial(site, draw)
    stack = make_stack(site, [(adapter, tensors)])
    for view in stack.views(0):
        view += 0.1 * torch.randn(view.shape, generator=draw)
    return stack


def batch(site, rows=2):
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(*((rows, 36, 7, 7) if site.is_conv else (rows, 5, 36)), generator=draw)
    return x, site.module(x)


def theirs(site, adapter, tensors):
    """LyCORIS's module of the same weights: by its loader, but for what that can't read."""
    if "dora_scale" not in tensors or tensors["dora_scale"].shape[0] > 1:
        return oracle.reloaded(site, tensors)
    # its loader takes all magnitudes for those of outputs
    rank = tensors["lora_down.weight"].shape[0]
    own = {"weight_decompose": True, "wd_on_out": False}
    module = oracle.new_module(site, "locon", rank, float(tensors["alpha"]), own)
    module.load_state_dict(dict(tensors))
    return module


CASES = [
    pytest.param(overrides, site, id=f"{name}-{kind}")
    for name, overrides in VARIANTS.items()
    for kind, site in SITES.items()
]


@pytest.mark.parametrize(("overrides", "site"), CASES)
def test_forward_and_gradients_are_lycoris_own(overrides, site):
    chosen = adapter(*overrides)
    if not chosen.carries(site):
        return  # a plain LoRA has no kernels
    stack = trained(chosen, site)
    x, y = batch(site)
    module = theirs(site, chosen, stack.file_tensors(0))
    expected = oracle.outcome(module, x, y)
    assert not torch.allclose(expected, y, atol=1e-2)
    for leaf in stack.leaves():
        leaf.requires_grad_(True)
    ours = stack.forward(x.requires_grad_(True), y, None)
    assert torch.allclose(ours, expected, atol=1e-5)
    delta = site.apply(x, stack.delta_weight(0))
    assert torch.allclose(y + delta, expected, atol=1e-5)

    weights = torch.linspace(-1, 1, ours.numel()).reshape(ours.shape)
    (ours * weights).sum().backward()
    by_ours, x.grad = x.grad.clone(), None
    parameters = [p.requires_grad_(True) for p in module.parameters()]
    (oracle.outcome(module, x, y) * weights).sum().backward()
    if "dora_scale" not in stack.file_tensors(0):  # LyCORIS differentiates DoRA's norm too
        assert torch.allclose(by_ours, x.grad, atol=1e-4)
        ours = sum(float(g.square().sum()) for g in stack.gradients(0))
        assert ours == pytest.approx(
            sum(float(p.grad.square().sum()) for p in parameters), rel=1e-4
        )


def in_type(site, dtype):
    """The site with its weights rounded to bf16, held in `dtype`."""
    return replace(site, module=deepcopy(site.module).to(torch.bfloat16).to(dtype))


def stacked(chosen, site, tensors):
    return make_stack(site, [(chosen, tensors)])


def backward(stack, dropout=None):
    """The output, and all gradients in one."""
    for leaf in stack.leaves():
        leaf.requires_grad_(True)
    x = batch(stack.site)[0].to(stack.site.weight.dtype)
    y = stack.site.module(x)
    output = stack.forward(x, y, dropout)
    assert output.dtype == y.dtype
    (output.float() * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    return output.detach(), torch.cat([gradient.flatten() for gradient in stack.gradients(0)])


def rounding(ours, exact):
    return float((ours - exact).norm() / exact.norm())


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
"""Of the base's weights, in bf16 autocast."""


@DTYPES
@pytest.mark.parametrize(("overrides", "site"), CASES)
def test_in_half_precision_it_computes_the_same_to_rounding(overrides, site, dtype):
    chosen = adapter(*overrides)
    if not chosen.carries(site):
        return
    exact = trained(chosen, in_type(site, torch.float32))
    tensors = exact.file_tensors(0)
    stack = stacked(chosen, in_type(site, dtype), tensors)
    expected, by_exact = backward(exact)
    with torch.autocast("cpu", torch.bfloat16):
        output, gradient = backward(stack)
    assert gradient.dtype == torch.float32
    assert rounding(output, expected) < 0.02  # bf16 has 8 bits of mantissa
    assert rounding(gradient, by_exact) < 0.05


@pytest.mark.parametrize(("overrides", "site"), CASES)
def test_on_a_half_precision_base_tensors_and_deltas_stay_fp32(overrides, site):
    chosen = adapter(*overrides)
    if not chosen.carries(site):
        return
    exact = trained(chosen, in_type(site, torch.float32))
    tensors, half = exact.file_tensors(0), in_type(site, torch.bfloat16)
    fresh = chosen.initial(half, torch.Generator().manual_seed(0))
    assert {tensor.dtype for tensor in fresh.values()} == {torch.float32}
    stack = stacked(chosen, half, tensors)
    again = stack.file_tensors(0)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert torch.allclose(stack.delta_weight(0), exact.delta_weight(0), atol=1e-5)
    limit = float(exact.delta_weight(0).norm()) / 2
    stack.limit_norm(0, limit)
    assert float(stack.delta_weight(0).norm()) == pytest.approx(limit, rel=1e-3)
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    assert {leaf.dtype for leaf in stacked(None, half, rounded).leaves()} == {torch.float32}


@DTYPES
@pytest.mark.parametrize("kind", ["Linear", "3x3"])
@pytest.mark.parametrize("name", ["locon", "dora", "loha", "lokr"])
def test_dropout_keeps_the_type_of_the_activations(name, kind, dtype):
    chosen = adapter(f"adapter={name}", "adapter.rank_dropout=0.5", "adapter.module_dropout=0.1")
    stack = trained(chosen, in_type(SITES[kind], dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = backward(stack, Dropout([0], [0], "site"))
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", list(SITES))
@pytest.mark.parametrize("algo", ["loha", "lokr"])
def test_foreign_forms_compute_as_lycoris(algo, kind):
    """Magnitudes, and LoHa's Tucker kernels, which our own settings don't make."""
    site = SITES[kind]
    for args in ({"weight_decompose": True}, {"use_tucker": algo == "loha"}):
        torch.manual_seed(3)
        module = oracle.new_module(site, algo, 2, 1.0, args)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        tensors = oracle.saved(module)
        check_fit(site, tensors)
        x, y = batch(site)
        with torch.no_grad():
            ours = make_stack(site, [(None, tensors)]).forward(x, y, None)
            assert torch.allclose(ours, oracle.outcome(module, x, y), atol=1e-5)


@pytest.mark.parametrize("kind", list(SITES))
@pytest.mark.parametrize("name", ["loha", "lokr", "lokr, both decomposed"])
def test_runs_of_different_ranks_are_stacked_and_compute_as_alone(name, kind):
    site = SITES[kind]
    ranks = [("adapter.rank=1",), ("adapter.rank=2", "adapter.alpha=3")]
    members, alone = [], []
    for seed, own in enumerate([*ranks, ranks[0]]):
        chosen = adapter(*VARIANTS[name], *own)
        stack = trained(chosen, site, seed)
        members.append((chosen, stack.file_tensors(0)))
        alone.append(stack)
    layouts = {type(one).layout(own) for one, (_, own) in zip(alone, members, strict=True)}
    assert len(layouts) == 1
    together = make_stack(site, members)
    x, y = batch(site, rows=6)
    with torch.no_grad():
        own = zip(alone, x.chunk(3), y.chunk(3), strict=True)
        expected = [stack.forward(rows, outputs, None) for stack, rows, outputs in own]
        assert torch.allclose(together.forward(x, y, None), torch.cat(expected), atol=1e-5)
    for index, (_, tensors) in enumerate(members):
        again = together.file_tensors(index)
        assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in tensors.items()}
        assert all(torch.equal(again[n], tensors[n]) for n in tensors)


@pytest.mark.parametrize("name", ["loha", "lokr"])
@pytest.mark.parametrize("kind", ["Linear", "3x3"])
def test_dropout_of_output_channels_keeps_the_expectation_and_is_repeatable(name, kind):
    site = SITES[kind]
    stack = trained(adapter(*VARIANTS[name], "adapter.rank_dropout=0.5"), site)
    x, y = batch(site)
    with torch.no_grad():
        delta = stack.forward(x, y, None) - y
        draws = [stack.forward(x, y, Dropout([4], [step], "s")) - y for step in range(400)]
        again = stack.forward(x, y, Dropout([4], [0], "s")) - y
    assert torch.equal(draws[0], again)
    channels = draws[0].abs().amax((0, 2, 3) if site.is_conv else (0, 1))
    assert 0 < int((channels == 0).sum()) < len(channels)
    assert torch.allclose(torch.stack(draws).mean(0), delta, atol=0.3 * float(delta.abs().max()))


def test_loha_keeps_no_product_for_the_backward_pass():
    site = SITES["Linear"]
    stack = trained(adapter("adapter=loha"), site)
    for leaf in stack.leaves():
        leaf.requires_grad_(True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        stack.forward(*batch(site), None)
    assert (1, 64, 36) not in saved


def test_factors_are_lycoris_own():
    from lycoris.functional import factorization as expected

    for factor in (-1, 1, 2, 3, 4, 5, 8, 10, 16, 64):
        for size in range(1, 700):
            assert factorization(size, factor) == expected(size, factor), (size, factor)


@pytest.mark.parametrize("overrides", [("adapter=loha",), ("adapter=lokr",)])
def test_metadata_tells_other_programs_what_it_is(overrides):
    metadata = adapter(*overrides, "adapter.targets=unet-only").metadata()
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert metadata["ss_network_dim"] == "3"
    args = json.loads(metadata["ss_network_args"])
    assert args["algo"] == overrides[0].split("=")[1]
    assert args["preset"] == "unet-transformer-only"
    assert args["conv_dim"] == "3"
    assert all(isinstance(value, str) for value in args.values())


TRAINABLE = {"lora", "locon", "loha", "glora", "full", "diag-oft", "boft"}
"""Of 4.1.3. Of a lokr's convolutions its loader misreads some sizes; adapter=lokr has its own."""


@pytest.mark.parametrize("algo", sorted(oracle.algorithms()))
def test_every_algorithm_is_accepted_or_refused_by_trying_it(algo):
    if algo not in TRAINABLE:
        with pytest.raises(SettingsError, match=f"adapter.algo={algo} with .* can't be trained: "):
            adapter("adapter=lycoris", f"adapter.algo={algo}")
        return
    chosen = adapter("adapter=lycoris", f"adapter.algo={algo}", "adapter.rank=4")
    for site in SITES.values():
        fresh = chosen.initial(site, torch.Generator().manual_seed(5))
        assert all(
            torch.equal(tensor, fresh[name])
            for name, tensor in chosen.initial(site, torch.Generator().manual_seed(5)).items()
        )
        stack = trained(chosen, site)
        x, y = batch(site)
        with torch.no_grad():
            before = stack.forward(x, y, None)
            check_fit(site, stack.file_tensors(0))
            loaded = make_stack(site, [(None, stack.file_tensors(0))])
            assert torch.allclose(loaded.forward(x, y, None), before, atol=1e-5)
            stack.limit_norm(0, 0.5)
            assert float(stack.delta_weight(0).norm()) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("adapter.algo=lorra", "LyCORIS has boft"),
        ("adapter.args={rank_dropout: 0.1}", "no seed repeats it"),
        ("adapter.args={use_tuker: true}", "no such argument; it has .*use_tucker"),
        ("adapter.args={use_scalar: true}", "trains something else once it is reloaded"),
        ("adapter.args={rs_lora: true}", "computes something else once it is reloaded"),
    ],
)
def test_what_can_not_be_trained_is_refused_with_the_reason(overrides, says):
    with pytest.raises(SettingsError, match=says):
        adapter("adapter=lycoris", overrides)


def test_a_full_difference_holds_no_copy_of_the_bases_weight():
    """By `FullModule._org_weight`, private to LyCORIS: another release may have moved it."""
    assert metadata.version("lycoris-lora") == "4.1.3", "is `_org_weight` what it was?"
    for site in SITES.values():
        fresh = oracle.new_module(site, "full", 4, 4.0, {})
        assert torch.equal(fresh._org_weight[0], site.weight)
        assert fresh.org_weight is fresh._org_weight[0]
        module = oracle.reloaded(site, {"diff": torch.randn(site.weight.shape)})
        assert module.org_weight.data_ptr() == site.weight.data_ptr()


NORMS = {
    "LayerNorm": (nn.LayerNorm(36), (4, 5, 36)),
    "GroupNorm": (nn.GroupNorm(4, 36), (4, 36, 7, 7)),
}


@pytest.mark.parametrize("kind", NORMS)
def test_differences_of_norms_are_added_as_lycoris_adds_them(kind):
    module, shape = NORMS[kind]
    module.requires_grad_(False)
    site = Site("lora_unet_norm", "unet", "norm", module)
    draw = torch.Generator().manual_seed(0)
    files = [
        {name: torch.randn(36, generator=draw) for name in ("w_norm", "b_norm")} for _ in range(2)
    ]
    x = torch.randn(shape, generator=draw)
    for file in files:
        check_fit(site, file)
    ours = make_stack(site, [(None, file) for file in files]).forward(x, module(x), None)
    for rows, file, got in zip(x.chunk(2), files, ours.chunk(2), strict=True):
        with torch.no_grad():
            theirs = NormModule.make_module_from_state_dict("a", module, **file)
        theirs.org_forward = module.forward
        assert torch.allclose(got, theirs(rows), atol=1e-5)


BIASED = {
    "a full difference": lambda site: {"diff": torch.ones(site.weight.shape)},
    "a LoRA": lambda site: trained(adapter("adapter=locon"), site).file_tensors(0),
    "a DoRA": lambda site: trained(adapter("adapter=dora"), site).file_tensors(0),
    "nothing": lambda site: {},
}


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("beside", BIASED)
def test_a_difference_of_a_bias_is_added_to_it(beside, name):
    """An oracle: the module of torch itself, its weight and bias changed."""
    site, draw = SITES[name], torch.Generator().manual_seed(0)
    file = {**BIASED[beside](site), "diff_b": torch.randn(64, generator=draw)}
    x, y = batch(site)
    check_fit(site, file)
    changed = deepcopy(site.module)
    changed.weight += file_delta(site, file)
    changed.bias += bias_delta(file)
    ours = make_stack(site, [(None, file)]).forward(x, y, None)
    assert torch.allclose(ours, changed(x), atol=1e-4)


def test_runs_with_and_without_a_difference_of_a_bias_are_told_apart():
    site = SITES["1x1"]
    plain = trained(adapter("adapter=locon"), site).file_tensors(0)
    biased = {**plain, "diff_b": torch.arange(64.0)}
    root = nn.Sequential(site.module)
    key = "lora_unet_0"
    files = [{f"{key}.{n}": t for n, t in own.items()} for own in (plain, biased, plain)]
    x, y = batch(site, rows=3)
    pack = Pack.from_files({"unet": ("lora_unet", root)}, files)
    with pack.attached():
        together = root(x)
    alone = make_stack(site, [(None, plain)]).forward(x, y, None)
    alone[1] += torch.arange(64.0)[:, None, None]
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_difference_of_a_bias_that_the_base_lacks_is_refused():
    site = Site("lora_unet_plain", "unet", "plain", nn.Linear(36, 64, bias=False))
    tensors = {"diff": torch.zeros(64, 36), "diff_b": torch.zeros(64)}
    with pytest.raises(CheckpointError, match="a bias, which the base model hasn't"):
        check_fit(site, tensors)
    with pytest.raises(CheckpointError, match=r"diff_b of \(3,\) doesn't fit"):
        check_fit(SITES["Linear"], {"diff_b": torch.zeros(3)})


def test_what_lycoris_can_not_load_is_said_without_its_code():
    """IA3: its loader is called with more than it takes."""
    tensors = {"weight": torch.zeros(64), "on_input": torch.tensor(False)}
    with pytest.raises(CheckpointError, match=r"LyCORIS \S+ can't load its own ia3$"):
        check_fit(SITES["Linear"], tensors)


@pytest.mark.parametrize("args", [{}, {"decompose_both": True}])
def test_tucker_lokr_is_read_as_lycoris_trained_it(args):
    """Its loader can't read it: the module that is trained is the oracle."""
    site = SITES["3x3"]
    module = oracle.new_module(site, "lokr", 2, 1.0, {"use_tucker": True, **args})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    file = {f"{site.key}.{name}": tensor for name, tensor in oracle.saved(module).items()}
    tensors = by_site(kohya_form(file, {}).tensors)[site.key]
    check_fit(site, tensors)
    x, y = batch(site)
    ours = make_stack(site, [(None, tensors)]).forward(x, y, None)
    assert torch.allclose(ours, oracle.outcome(module, x, y), atol=1e-4)


def test_tucker_lokr_is_not_trained_for_lycoris_can_not_reload_it():
    with pytest.raises(SettingsError, match="a 3x3 convolution: LyCORIS can't load it"):
        adapter("adapter=lycoris", "adapter.algo=lokr", "adapter.args={use_tucker: true}")


@pytest.mark.parametrize("name", ["loha", "lokr", "oft"])
def test_a_file_that_does_not_fit_is_refused(name):
    tensors = trained(adapter(*VARIANTS[name]), SITES["Linear"]).file_tensors(0)
    other = Site("lora_unet_other", "unet", "other", nn.Linear(26, 36))
    with pytest.raises(CheckpointError, match="lora_unet_other"):
        check_fit(other, tensors)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    import sys

    tensors = trained(adapter(*VARIANTS["oft"]), SITES["Linear"]).file_tensors(0)
    monkeypatch.setitem(sys.modules, "lycoris.wrapper", None)
    with pytest.raises(CheckpointError, match=r"pip install 'lorasweep\[lycoris\]'"):
        oracle.check_file(SITES["Linear"], tensors)
    with pytest.raises(SettingsError, match=r"pip install 'lorasweep\[lycoris\]'"):
        oracle.check_algorithm("glora", {})
