"""Standard LoRA (Hu et al., arXiv 2106.09685), with kohya's networks.lora names and options.

delta(x) = alpha / rank * up(down(x)) on Linear and 1x1 convolutions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import PositiveFloat

from lorasweep.adapters.adapter import Adapter, Site
from lorasweep.adapters.dropout import Dropout, module_survives, survivors
from lorasweep.adapters.initial_weights import start
from lorasweep.adapters.kohya_names import WITH_KERNELS, check_targets, lycoris_preset
from lorasweep.adapters.stack import FileStack, Members, padded
from lorasweep.adapters.unet_blocks import Ranked
from lorasweep.adapters.weight_deltas import Tensors
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.settings import Probability, SettingsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LoRA(Ranked, Adapter):
    """Settings of a standard LoRA; names and meanings are kohya's."""

    targets: str | tuple[str, ...]
    init: Literal["kaiming", "orthogonal", "pissa"]
    rslora: bool
    network_dropout: Probability
    rank_dropout: Probability
    module_dropout: Probability
    scale_weight_norms: PositiveFloat | None

    algo: ClassVar[str] = "lora"
    """LyCORIS's name of the type."""

    def __post_init__(self) -> None:
        check_targets(self.targets)
        self.check_kernels()
        odd = [rank for rank in self.all_ranks if rank % 2]
        if self.init == "orthogonal" and odd:
            raise SettingsError(
                f"adapter.init=orthogonal needs even ranks, not {odd[0]}: half of the rank is for"
                " each factor"
            )
        if self.init == "pissa" and (self.drops or self.scale_weight_norms is not None):
            raise SettingsError(
                "adapter.init=pissa starts from weights that dropouts and scale_weight_norms would"
                " cut away; set those to 0 and null, or adapter.init=kaiming"
            )

    def check_kernels(self) -> None:
        """Raise SettingsError for targets that this type can't adapt."""
        if self.targets in WITH_KERNELS:
            raise SettingsError(
                f"adapter.targets={self.targets} names convolutions larger than 1x1, which this"
                " type does not adapt; use adapter=locon"
            )

    @property
    def drops(self) -> bool:
        """Is anything dropped in training?"""
        return self.network_dropout > 0 or self.rank_dropout > 0 or self.module_dropout > 0

    @property
    def num_trained(self) -> Fraction:
        """Which share of a file's rank is trained: half with pissa, whose rest undoes its start."""
        return Fraction(1, 2) if self.init == "pissa" else Fraction(1)

    def carries(self, site: Site) -> bool:
        """Linear and 1x1 convolutions."""
        return not site.has_kernel

    def scale_at(self, site: Site) -> float:
        """alpha / rank, or with rslora alpha / sqrt(rank) (arXiv 2312.03732)."""
        scale = super().scale_at(site)
        return scale * math.sqrt(self.alpha / scale) if self.rslora else scale

    def initial(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Factors as `starts` draws them; alpha makes any program's alpha / rank our scale."""
        import torch

        scale = self.scale_at(site)
        down, up = start(self.init, site.weight, self.rank_at(site), scale, generator)
        return {
            "lora_down.weight": down.reshape(len(down), *site.weight.shape[1:]),
            "lora_up.weight": up.reshape(*up.shape, *[1] * (site.weight.dim() - 2)),
            "alpha": torch.tensor(scale * len(down)),
        }

    def metadata(self) -> dict[str, str]:
        """kohya's ss_network_* entries."""
        doubled = int(1 / self.num_trained)
        args = self.network_args()
        entry = json.dumps({**args, "dropout": self.network_dropout or None})  # kohya adds it
        return {
            "ss_network_module": "lycoris.kohya" if "algo" in args else "networks.lora",
            "ss_network_dim": str(doubled * self.rank),
            "ss_network_alpha": str(doubled * float(self.alpha)),
            "ss_network_dropout": str(self.network_dropout or None),
            "ss_scale_weight_norms": str(self.scale_weight_norms),
            **({"ss_network_args": entry} if args else {}),
        }

    def network_args(self) -> dict[str, str]:
        """The further settings as kohya's network_args; algo among them means LyCORIS's network."""
        args = {**self.block_args(int(1 / self.num_trained)), **self._dropout_args()}
        if self.is_kohyas:
            return args
        rs_lora = {"rs_lora": "True"} if self.rslora else {}
        return {"algo": self.algo, "preset": lycoris_preset(self.targets), **rs_lora, **args}

    @property
    def is_kohyas(self) -> bool:
        """Could kohya's own networks.lora have been told to make this network?"""
        return isinstance(self.targets, str) and self.targets != "full" and not self.rslora

    def _dropout_args(self) -> dict[str, str]:
        rates = {"rank_dropout": self.rank_dropout, "module_dropout": self.module_dropout}
        return {name: str(rate) for name, rate in rates.items() if rate > 0}


@dataclass(frozen=True, kw_only=True)
class LoRAStack(FileStack):
    """K LoRAs on one site. A padded rank has zero rows, which stay zero: nobody updates them."""

    down: Tensor  # (K, rank_max, in), a kernel's (K, rank_max, in / groups * kh * kw)
    up: Tensor  # (K, rank_max, out), transposed so that a run's own part is contiguous
    alphas: tuple[float, ...]
    ranks: tuple[int, ...]
    trained: tuple[int, ...]  # how many of the ranks, the first; pissa's others stand still

    @classmethod
    def check(cls, site: Site, tensors: Tensors) -> None:
        if set(tensors) != {"lora_down.weight", "lora_up.weight", "alpha"}:
            raise CheckpointError(
                f"{site.key}: {', '.join(sorted(tensors))} is not a standard LoRA's"
            )
        weight = site.weight
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        fits = down[0].numel() == weight[0].numel() and up.shape[0] == weight.shape[0]
        if not fits or down.shape[0] != up[0].numel():
            raise CheckpointError(
                f"{site.key}: factors {tuple(up.shape)} x {tuple(down.shape)} don't fit the base"
                f" model's {tuple(weight.shape)}"
            )

    @classmethod
    def of(cls, site: Site, members: Members) -> Self:
        """Zero-pad the ranks; shapes are (rank, in[, kh, kw]) and (out, rank[, 1, 1])."""
        files = [tensors for _, tensors in members]
        ranks = tuple(file["lora_down.weight"].shape[0] for file in files)
        device = site.weight.device
        return cls(
            site=site,
            adapters=tuple(adapter for adapter, _ in members),
            down=padded([file["lora_down.weight"].flatten(1) for file in files], device),
            up=padded([file["lora_up.weight"].flatten(1).mT for file in files], device),
            alphas=tuple(float(file["alpha"]) for file in files),
            ranks=ranks,
            trained=tuple(
                int(rank * adapter.num_trained) if isinstance(adapter, LoRA) else rank
                for rank, (adapter, _) in zip(ranks, members, strict=True)
            ),
        )

    def leaves(self) -> list[Tensor]:
        return [self.down, self.up]

    def are_ups(self) -> list[bool]:
        return [False, True]

    def own_sizes(self, index: int) -> list[int | None]:
        return [self.trained[index]] * 2

    def file_tensors(self, index: int) -> dict[str, Tensor]:
        import torch

        rank, shape = self.ranks[index], self.site.weight.shape
        down, up = self.down.detach()[index, :rank], self.up.detach()[index, :rank]
        return {
            "lora_down.weight": down.reshape(len(down), *shape[1:]),
            "lora_up.weight": up.mT.reshape(*up.mT.shape, *[1] * (len(shape) - 2)),
            "alpha": torch.tensor(self.alphas[index]),
        }

    @property
    def scales(self) -> tuple[float, ...]:
        """alpha / rank of each run."""
        return tuple(alpha / rank for alpha, rank in zip(self.alphas, self.ranks, strict=True))

    def forward(self, x: Tensor, y: Tensor, dropout: Dropout | None) -> Tensor:
        num_runs = len(self.ranks)
        if self.site.is_conv:
            return self._forward_conv(x, y, num_runs, dropout)
        hidden = x.reshape(num_runs, -1, x.shape[-1]).bmm(self.down.mT)  # (K, rows * tokens, rank)
        if dropout is not None:
            tokens = hidden.reshape(num_runs, x.shape[0] // num_runs, -1, hidden.shape[-1])
            hidden = self._drop(tokens, dropout).reshape(hidden.shape)
        up, scale = self._scaled_up()
        return (
            y.reshape(num_runs, -1, y.shape[-1]).baddbmm(hidden, up, alpha=scale).reshape(y.shape)
        )

    def _forward_conv(self, x: Tensor, y: Tensor, num_runs: int, dropout: Dropout | None) -> Tensor:
        rows = x.shape[0] // num_runs
        down = self.down.repeat_interleave(rows, 0)  # (K * rows, rank, in)
        hidden = down.bmm(x.flatten(2))  # (K * rows, rank, H * W)
        if dropout is not None:
            tokens = hidden.mT.unflatten(0, (num_runs, rows))
            hidden = self._drop(tokens, dropout).flatten(0, 1).mT
        up, scale = self._scaled_up()
        up = up.mT.repeat_interleave(rows, 0)
        return y.flatten(2).baddbmm(up, hidden, alpha=scale).reshape(y.shape)

    def _scaled_up(self) -> tuple[Tensor, float]:
        """`up`, and what its products are still to be multiplied by; one scale for all is free."""
        scales = self.scales
        if len(set(scales)) == 1:
            return self.up, scales[0]
        return self.up * self.up.new_tensor(scales)[:, None, None], 1.0

    def _drop(self, hidden: Tensor, dropout: Dropout) -> Tensor:
        """kohya's three dropouts on the rank activations (K, rows, tokens, rank)."""
        import torch

        masks = [
            _mask(adapter, hidden[index], rank, dropout, index)
            for index, (adapter, rank) in enumerate(zip(self.adapters, self.ranks, strict=True))
        ]
        return hidden * torch.stack(masks)


def _mask(
    adapter: Adapter | None, hidden: Tensor, rank: int, dropout: Dropout, index: int
) -> Tensor:
    """What run `index`'s activations (rows, tokens, rank_max) are multiplied by."""
    import torch

    assert isinstance(adapter, LoRA)
    mask = torch.ones_like(hidden)
    if not adapter.drops:
        return mask
    draw = dropout.generator(index, hidden.device)
    rows, tokens, _ = hidden.shape
    own = mask[..., :rank]
    if adapter.module_dropout > 0:
        own *= module_survives(adapter.module_dropout, draw)
    if adapter.network_dropout > 0:
        own *= survivors((rows, tokens, rank), adapter.network_dropout, draw)
    if adapter.rank_dropout > 0:
        own *= survivors((rows, 1, rank), adapter.rank_dropout, draw)
    return mask


def modules_kept(adapters: Sequence[Adapter | None], dropout: Dropout, like: Tensor) -> Tensor:
    """Which runs' adapters are computed on the site at all, (K,) of 0 and 1 beside `like`."""
    import torch

    kept = [
        module_survives(adapter.module_dropout, dropout.generator(index, like.device))
        if isinstance(adapter, LoRA)
        else torch.ones(1, device=like.device)
        for index, adapter in enumerate(adapters)
    ]
    return torch.cat(kept).to(like)
