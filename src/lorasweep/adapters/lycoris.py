"""Any further algorithm of the lycoris-lora package (arXiv 2309.14859), by its own forward.

An optional extra. Such runs train in packs like all others, but each is computed by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lorasweep.adapters.adapter import Site
from lorasweep.adapters.dropout import Dropout
from lorasweep.adapters.lycoris_module import (
    check_algorithm,
    check_file,
    delta,
    new_module,
    outcome,
    reloaded,
    saved,
)
from lorasweep.adapters.lycoris_options import LycorisNetwork
from lorasweep.adapters.stack import FileStack, Members
from lorasweep.adapters.weight_deltas import Tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module

_BISECTIONS = 25


@dataclass(frozen=True, kw_only=True)
class LyCORIS(LycorisNetwork):
    """Settings of one of LyCORIS's algorithms; `args` are its own arguments by its own names.

    Raises SettingsError without the package, and for what its release can't train and reload.
    """

    algo: str
    args: Mapping[str, bool | int | float | str] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_algorithm(self.algo, self.args or {})

    def initial(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """As LyCORIS starts it, from the generator's seed."""
        fresh = saved(self._module(site, generator.initial_seed()))
        # full's difference comes in the base's type
        return {name: tensor.float() for name, tensor in fresh.items()}

    def starts(self, site: Site) -> dict[str, float]:
        """The parameters that start as a constant, and that constant: there the delta is zero."""
        module = self._module(site, 0)
        fresh = {name: p.detach().flatten() for name, p in module.named_parameters()}
        return {name: float(p[0]) for name, p in fresh.items() if bool((p == p[0]).all())}

    def _module(self, site: Site, seed: int) -> Module:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            rank, alpha = self.rank_at(site), self.alpha_at(site)
            return new_module(site, self.algo, rank, alpha, self.args or {})

    def metadata(self) -> dict[str, str]:
        """kohya's ss_network_* entries."""
        return self.lycoris_metadata(self.algo, self.args or {})


@dataclass(frozen=True, kw_only=True)
class LycorisStack(FileStack):
    """One run's module on one site: LyCORIS computes no more than that at once."""

    module: Module
    parameters: Mapping[str, Tensor]
    """The trained tensors by LyCORIS's names, each (1, ...); the module's share their memory."""

    @classmethod
    def layout(cls, tensors: Tensors) -> Hashable:
        return object()  # equal to no other: every run is a stack of its own

    @classmethod
    def check(cls, site: Site, tensors: Tensors) -> None:
        check_file(site, tensors)

    @classmethod
    def of(cls, site: Site, members: Members) -> Self:
        import torch

        ((adapter, tensors),) = members
        module = reloaded(site, tensors)
        parameters = {}
        for name, parameter in module.named_parameters():
            parameters[name] = parameter.detach().to(torch.float32, copy=True)[None]
            parameter.requires_grad_(False)
            parameter.data = parameters[name][0]
        return cls(site=site, adapters=(adapter,), module=module, parameters=parameters)

    def leaves(self) -> list[Tensor]:
        return list(self.parameters.values())

    def file_tensors(self, index: int) -> dict[str, Tensor]:
        return saved(self.module)

    def forward(self, x: Tensor, y: Tensor, dropout: Dropout | None) -> Tensor:
        own = {name: leaf[0] for name, leaf in self.parameters.items()}
        return outcome(self.module, x, y, own)

    def delta_weight(self, index: int) -> Tensor:
        import torch

        with torch.no_grad():
            return delta(self.module, self.site)

    def limit_norm(self, index: int, maximum: float) -> None:
        """Move what starts as a constant back towards it, until the delta's norm is `maximum`.

        Where the delta is linear in them one step is exact; else (OFT) the share is bisected.
        """
        norm = float(self.delta_weight(index).norm())
        if norm <= maximum:
            return
        (adapter,) = self.adapters
        assert isinstance(adapter, LyCORIS)
        constants = adapter.starts(self.site)
        moved = {name: self.parameters[name].detach() for name in constants}
        trained = {name: tensor.clone() for name, tensor in moved.items()}

        def norm_at(share: float) -> float:
            for name, tensor in moved.items():
                tensor.copy_(constants[name] + share * (trained[name] - constants[name]))
            return float(self.delta_weight(index).norm())

        low, high = 0.0, 1.0
        share = maximum / norm
        for _ in range(_BISECTIONS):
            found = norm_at(share)
            if abs(found - maximum) < 1e-6 * maximum:
                return
            low, high = (share, high) if found < maximum else (low, share)
            share = (low + high) / 2
        norm_at(low)
