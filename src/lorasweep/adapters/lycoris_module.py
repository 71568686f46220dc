"""Single modules of the lycoris-lora package on our sites: made, saved, reloaded, and tried.

None of its networks, presets or merges is used. An algorithm is accepted when a module of it, tried
on small layers, starts at a delta of zero, reloads to what it saved, and adds what `delta` says.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

from lorasweep.adapters.adapter import Site
from lorasweep.adapters.weight_deltas import Tensors, algorithm
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.settings import SettingsError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

INSTALL = "pip install 'lorasweep[lycoris]'"

OURS = {
    "lora_name": "it is the site's",
    "org_module": "it is the site's",
    "multiplier": "a strength belongs to inference",
    "lora_dim": "give adapter.rank",
    "alpha": "give adapter.alpha",
    "dropout": "LyCORIS draws it from torch's global generator, so that no seed repeats it",
    "rank_dropout": "LyCORIS draws it from torch's global generator, so that no seed repeats it",
    "module_dropout": "LyCORIS draws it from torch's global generator, so that no seed repeats it",
    "rank_dropout_scale": "it belongs to rank_dropout, which can't be repeated by a seed",
    "bypass_mode": "the delta of the weight is computed, which is what a merge adds",
}
"""Arguments of LyCORIS's modules that can't be given, and why."""

_FAILURES = (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError)
"""How LyCORIS's modules refuse what they can't do; there is no class of their own."""

_MAX_ROWS = 512  # one-hot inputs at a time: 20 MB for the largest kernel of SD1.5


def algorithms() -> dict[str, type[Module]]:
    """LyCORIS's modules by algorithm. Raises SettingsError where the package isn't installed."""
    try:
        from lycoris.wrapper import network_module_dict
    except ModuleNotFoundError as error:
        raise SettingsError(f"adapter=lycoris needs {error.name}: {INSTALL}") from None
    logging.getLogger("LyCORIS").setLevel(logging.WARNING)  # else a line for every size of OFT's
    return dict(network_module_dict)


def check_algorithm(algo: str, args: Mapping[str, Any]) -> None:
    """Raise SettingsError for an algorithm or arguments that can't be trained, saying why."""
    known = algorithms()
    if algo not in known:
        raise SettingsError(f"adapter.algo={algo}: LyCORIS has {', '.join(sorted(known))}")
    names = set(inspect.signature(known[algo]).parameters) - {"self", "kwargs"}
    for name in args:
        if name in OURS:
            raise SettingsError(f"adapter.args.{name} can't be given: {OURS[name]}")
        if name not in names:
            own = ", ".join(sorted(names - set(OURS)))
            raise SettingsError(f"adapter.args.{name}: {algo} has no such argument; it has {own}")
    reason = failure(algo, tuple(sorted(args.items())))
    if reason is not None:
        raise SettingsError(f"adapter.algo={algo} with {dict(args)} can't be trained: {reason}")


def new_module(site: Site, algo: str, rank: int, alpha: float, args: Mapping[str, Any]) -> Module:
    """A fresh module, from torch's global generator. Raises SettingsError if the site can't be."""
    try:
        return algorithms()[algo](site.key, _stand_in(site), 1.0, rank, alpha, **args)
    except _FAILURES as error:
        raise SettingsError(f"adapter.algo={algo} on {site.key}: {error}") from None


def saved(module: Module) -> dict[str, Tensor]:
    """A module's tensors under LyCORIS's names; they may share its memory."""
    from lycoris.modules import FullModule

    if isinstance(module, FullModule):
        # Its own saving takes the weight for the base's plus the delta, which it is only after
        # `apply_to`, and that would take the weight off the base.
        return {"diff": module.weight.detach()}
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def reloaded(site: Site, tensors: Tensors) -> Module:
    """The module of a file's tensors, by LyCORIS's loader. Raises CheckpointError if it can't."""
    import torch
    from lycoris.modules import FullModule, get_module, make_module

    named = {f"{site.key}.{name}": tensor.cpu() for name, tensor in tensors.items()}
    kind, values = get_module(named, site.key)
    if kind is None:
        raise CheckpointError(f"{site.key}: {', '.join(sorted(tensors))} is of no known type")
    try:
        module: Module = make_module(kind, values, site.key, _stand_in(site))
    except TypeError:  # its loader was called as its own class can't be
        raise CheckpointError(
            f"{site.key}: LyCORIS {metadata.version('lycoris-lora')} can't load its own {kind.name}"
        ) from None
    except _FAILURES as error:
        raise CheckpointError(f"{site.key}: LyCORIS can't load it: {error}") from None
    if isinstance(module, FullModule):
        # LyCORIS keeps a copy of the base's weight on the CPU and fetches it in every forward; its
        # public setter writes into the base, so this private name of 4.1.3 is the only way to hand
        # it the weight itself (tests/adapters/test_lycoris.py tells of a release that changes it).
        module._org_weight = [site.weight.detach()]
        diff = tensors["diff"].detach().to(torch.float32, copy=True)  # not in the base's type
        module.weight = torch.nn.Parameter(diff, requires_grad=False)
    shapes = {name: tensor.shape for name, tensor in saved(module).items()}
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise CheckpointError(
            f"{site.key}: LyCORIS reads {', '.join(sorted(tensors))} in other names or shapes"
        )
    return module.to(site.weight.device)


def outcome(
    module: Module, x: Tensor, y: Tensor, parameters: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The base's output `y` plus what the module adds to it, by its own forward."""
    import torch

    module.org_forward = lambda *_: y  # type: ignore[assignment]
    return torch.func.functional_call(module, dict(parameters or {}), (x,))


def delta(module: Module, site: Site) -> Tensor:
    """What the module's forward adds to the site's weight, read off its answers to one-hot inputs.

    In fp32, whatever the base's type. Its `get_diff_weight` isn't asked: for LoHa and LoKr that has
    the scale twice.
    """
    import torch

    if site.weight.dtype != torch.float32:
        site = _in_fp32(site)
        module = reloaded(site, saved(module))
    weight = site.weight
    rows = weight[0].numel()
    geometry: Any = module.kw_dict
    if site.is_conv:  # a kernel that meets a patch of its own size, without padding
        module.kw_dict = {**site.geometry, "stride": 1, "padding": 0, "dilation": 1}  # type: ignore[assignment]
    try:
        columns = []
        for start in range(0, rows, _MAX_ROWS):
            ones = torch.eye(rows, device=weight.device)[start : start + _MAX_ROWS]
            patches = ones.reshape(-1, *weight.shape[1:])
            zeros = torch.zeros(len(ones), weight.shape[0], device=weight.device)
            y = zeros[..., None, None] if site.is_conv else zeros
            columns.append(outcome(module, patches, y).flatten(1))
        return torch.cat(columns).mT.reshape(weight.shape)
    finally:
        module.kw_dict = geometry


def check_file(site: Site, tensors: Tensors) -> None:
    """Raise CheckpointError unless a file's tensors can be computed by LyCORIS."""
    try:
        known = algorithms()
    except SettingsError:
        kind = algorithm(tensors) or ", ".join(sorted(tensors))
        raise CheckpointError(f"{site.key} ({kind}) needs LyCORIS: {INSTALL}") from None
    module = reloaded(site, tensors)
    algo = next(name for name, kind in known.items() if type(module) is kind)
    reason = failure(algo, ())
    if reason is not None:
        raise CheckpointError(f"{site.key}: LyCORIS's {algo} can't be used: {reason}")


@cache
def failure(algo: str, args: tuple[tuple[str, Any], ...]) -> str | None:
    """Why an algorithm with these arguments can't be trained, by trying it; None: it can."""
    import torch

    # the global generator is LyCORIS's, and the trial must not move another's
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for site in _trial_sites():
            try:
                _try(site, algo, dict(args))
            except (SettingsError, CheckpointError) as error:
                return str(error)
    return None


def _try(site: Site, algo: str, args: Mapping[str, Any]) -> None:
    """Raise SettingsError or CheckpointError for what is wrong on a site."""
    import torch

    module = new_module(site, algo, 4, 2.0, args)
    x = torch.randn(2, 144, 4, 4) if site.is_conv else torch.randn(2, 144)
    y = site.apply(x, site.weight)
    if not torch.allclose(_answer(module, x, y), y, atol=1e-6):
        raise SettingsError(f"on {site.key} its delta is not zero at the start")
    parameters = dict(module.named_parameters())
    if not parameters:
        raise SettingsError("it has nothing to train")
    for parameter in parameters.values():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    answer = _answer(module, x, y)
    again = reloaded(site, saved(module))
    if {n: p.shape for n, p in again.named_parameters()} != {
        n: p.shape for n, p in parameters.items()
    }:
        raise SettingsError(f"on {site.key} it trains something else once it is reloaded")
    if not torch.allclose(_answer(again, x, y), answer, atol=1e-4):
        raise SettingsError(f"on {site.key} it computes something else once it is reloaded")
    if not torch.allclose(y + site.apply(x, delta(again, site)), answer, atol=1e-4):
        raise SettingsError(f"on {site.key} what it adds is no change of the weight")


def _answer(module: Module, x: Tensor, y: Tensor) -> Tensor:
    """The module's answer in training, which must be certain and that of its use."""
    import torch

    try:
        answers = [outcome(module.train(mode), x, y) for mode in (True, True, True, False)]
    except _FAILURES as error:
        raise SettingsError(f"on {module.lora_name} its forward fails: {error}") from None
    if not all(torch.equal(answer, answers[0]) for answer in answers):
        raise SettingsError("in training its forward is random, and no seed repeats it")
    return answers[0]


def _trial_sites() -> Iterator[Site]:
    """Layers on which a rank of 4 is low for every factor."""
    from torch import nn

    for key, module in (
        ("a Linear", nn.Linear(144, 256)),
        ("a 1x1 convolution", nn.Conv2d(144, 256, 1)),
        ("a 3x3 convolution", nn.Conv2d(144, 256, 3, stride=2, padding=1)),
    ):
        yield Site(key=key, part="unet", path=key, module=module)


def _in_fp32(site: Site) -> Site:
    from torch import nn

    module = _stand_in(site)
    module.weight = nn.Parameter(site.weight.detach().float(), requires_grad=False)
    return replace(site, module=module)


def _stand_in(site: Site) -> Module:
    """The site's module without its bias, which no delta of a weight may train; weights shared."""
    import torch
    from torch import nn

    out_features, in_features = site.weight.shape[:2]
    with torch.device("meta"):
        if not site.is_conv:
            module: Module = nn.Linear(in_features, out_features, bias=False)
        else:
            conv = site.module
            assert isinstance(conv, nn.Conv2d)
            kernel: Any = conv.kernel_size
            module = nn.Conv2d(conv.in_channels, out_features, kernel, bias=False, **site.geometry)
    module.weight = site.weight  # type: ignore[assignment]
    return module
