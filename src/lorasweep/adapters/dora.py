"""DoRA (Liu et al., arXiv 2402.09353): a LoRA or LoCon for the direction, a magnitude beside it.

W' = m * (W + delta) / norm(W + delta), with the norm of each output's weights, or of each input's.
As its section 4.3 proposes the norm counts as a constant in the backward pass. The file holds m as
`dora_scale`; names, shapes and the epsilon beside the norm are LyCORIS's.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lorasweep.adapters.adapter import Site
from lorasweep.adapters.dropout import Dropout
from lorasweep.adapters.locon import LoCon
from lorasweep.adapters.lora import LoRAStack, modules_kept
from lorasweep.adapters.stack import FileStack, Members, Stack
from lorasweep.adapters.weight_deltas import Tensors, algorithm
from lorasweep.core.safetensors_header import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DoRA(LoCon):
    """Settings of a DoRA: those of a LoCon, and which weights a magnitude is of."""

    wd_on_output: bool

    @property
    def is_kohyas(self) -> bool:
        """networks.lora has no magnitudes."""
        return False

    def initial(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """A LoCon's tensors, and the norms of the base's weights."""
        weight = site.weight.detach()
        norms = _norm(_squares(weight.float().square(), self.wd_on_output))
        shape = _shape(weight, self.wd_on_output)
        return {**super().initial(site, generator), "dora_scale": norms.reshape(shape).cpu()}

    def network_args(self) -> dict[str, str]:
        on_output = str(self.wd_on_output)
        return {**super().network_args(), "dora_wd": "True", "wd_on_output": on_output}


@dataclass(frozen=True, kw_only=True)
class DoRAStack(Stack):
    """K magnitudes on one site, around the stack of any type that changes the directions."""

    inner: FileStack
    magnitude: Tensor  # (K, out), or (K, in / groups)
    base_squares: Tensor  # the base's squared norms, (out,) or (in / groups,)
    on_output: bool

    @classmethod
    def check_magnitude(cls, site: Site, tensors: Tensors) -> None:
        """Raise CheckpointError unless a file's magnitudes are of the site's outputs or inputs."""
        magnitude = tensors["dora_scale"]
        shapes = [_shape(site.weight, on_output) for on_output in (True, False)]
        if tuple(magnitude.shape) not in shapes:
            raise CheckpointError(
                f"{site.key}: dora_scale of {tuple(magnitude.shape)} doesn't fit the base model's"
                f" {tuple(site.weight.shape)}; it must be {shapes[0]} or {shapes[1]}"
            )

    @classmethod
    def layout(cls, tensors: Tensors) -> Hashable:
        """What runs must have in common, besides the type of their directions, to be stacked."""
        on_output = _is_on_output(tensors["dora_scale"])
        if algorithm(tensors) == "lora":  # ranks are padded
            return on_output
        return on_output, *sorted((name, t.shape) for name, t in direction(tensors).items())

    @classmethod
    def around(cls, inner: FileStack, members: Members) -> Self:
        """The members' magnitudes, around the stack of their directions."""
        import torch

        site, on_output = inner.site, _is_on_output(members[0][1]["dora_scale"])
        magnitudes = [tensors["dora_scale"].flatten() for _, tensors in members]
        device = site.weight.device
        return cls(
            site=site,
            adapters=inner.adapters,
            inner=inner,
            magnitude=torch.stack([m.to(device, torch.float32) for m in magnitudes]),
            base_squares=_squares(site.weight.detach().float().square(), on_output),
            on_output=on_output,
        )

    def leaves(self) -> list[Tensor]:
        return [*self.inner.leaves(), self.magnitude]

    def are_ups(self) -> list[bool]:
        return [*self.inner.are_ups(), False]

    def own_sizes(self, index: int) -> list[int | None]:
        return [*self.inner.own_sizes(index), None]

    def file_tensors(self, index: int) -> dict[str, Tensor]:
        shape = _shape(self.site.weight, self.on_output)
        magnitude = self.magnitude.detach()[index].reshape(shape)
        return {**self.inner.file_tensors(index), "dora_scale": magnitude}

    def forward(self, x: Tensor, y: Tensor, dropout: Dropout | None) -> Tensor:
        """y + (s - 1) * (y - bias) + s * delta: at the start, where s is 1, exactly y."""
        import torch

        excess = self.magnitude / self._norms() - 1  # s - 1
        if dropout is not None:
            excess = excess * modules_kept(self.adapters, dropout, excess)[:, None]
        nothing = torch.zeros_like(y)
        if self.on_output:
            rows = self._by_row(excess, y)
            bias = self.site.bias
            plain = y if bias is None else y - bias.to(y.dtype).reshape(_channels(y))
            return y + rows * plain + (1 + rows) * self.inner.forward(x, nothing, dropout)
        rows = self._by_row(excess, x)
        delta = self.inner.forward(x + rows * x, nothing, dropout)
        return y + self.site.apply(rows * x, self.site.weight) + delta

    def _by_row(self, factors: Tensor, like: Tensor) -> Tensor:
        """Each run's factors (K, channels) for its own rows of `like`, in its type."""
        channels = like.shape[1] if self.site.is_conv else like.shape[-1]
        factors = factors.tile(1, channels // factors.shape[1])  # groups share theirs
        rows = factors.repeat_interleave(like.shape[0] // len(factors), 0).to(like.dtype)
        between = like.dim() - 2
        return rows.reshape(
            (len(rows), channels, *[1] * between)
            if self.site.is_conv
            else (len(rows), *[1] * between, channels)
        )

    def _norms(self) -> Tensor:
        """Norms of W + delta (K, channels), without a gradient; no delta is formed of LoRAs."""
        import torch

        with torch.no_grad(), torch.autocast(self.magnitude.device.type, enabled=False):
            if isinstance(self.inner, LoRAStack):
                cross, own = self._products(self.inner)
                return _norm(self.base_squares + 2 * cross + own)
            weight = self.site.weight.float()
            merged = (weight + self.inner.delta_weight(i) for i in range(len(self.adapters)))
            return torch.stack([_norm(_squares(m.square(), self.on_output)) for m in merged])

    def _products(self, inner: LoRAStack) -> tuple[Tensor, Tensor]:
        """<W, delta> and <delta, delta> by channel (K, channels), from Gram matrices."""
        down, up = inner.down, inner.up  # (K, rank, in * kh * kw), (K, rank, out)
        weight = self.site.weight.flatten(1).float()
        scales = down.new_tensor(inner.scales)[:, None]
        if self.on_output:
            cross = (up * (down @ weight.mT)).sum(1)
            own = (up * ((down @ down.mT) @ up)).sum(1)
        else:
            cross, own = (
                (down * other).sum(1).unflatten(1, (self.magnitude.shape[1], -1)).sum(2)
                for other in (up @ weight, (up @ up.mT) @ down)
            )
        return scales * cross, scales.square() * own

    def delta_weight(self, index: int) -> Tensor:
        shape = _shape(self.site.weight, self.on_output)
        excess = (self.magnitude.detach() / self._norms() - 1)[index].reshape(shape)
        delta = self.inner.delta_weight(index)
        return excess * self.site.weight.float() + (1 + excess) * delta

    def limit_norm(self, index: int, maximum: float) -> None:
        """Shrink W' - W; of a type other than LoRA what lies before the magnitudes."""
        import torch

        if not isinstance(self.inner, LoRAStack):
            self.inner.limit_norm(index, maximum)
            return
        with torch.no_grad():
            scale = (self.magnitude / self._norms())[index]
            cross, own = (product[index] for product in self._products(self.inner))
            excess = scale - 1
            squares = (
                excess.square() * self.base_squares + 2 * excess * scale * cross + scale**2 * own
            )
            factor = maximum / squares.sum().clamp(min=0).sqrt().clamp(min=maximum)
            # W + f (W' - W) = (1 + f (s - 1)) (W + f s / (1 + f (s - 1)) delta)
            kept = 1 + factor * excess
            shrink = torch.where(factor < 1, factor * scale / kept, 1.0)
            leaf = self.inner.up if self.on_output else self.inner.down
            leaf.detach()[index] *= shrink.repeat_interleave(leaf.shape[2] // len(shrink))
            magnitude = self.magnitude.detach()[index]
            magnitude.copy_(torch.where(factor < 1, kept * self._norms()[index], magnitude))


def direction(tensors: Tensors) -> dict[str, Tensor]:
    """A file's tensors without the magnitudes."""
    return {name: tensor for name, tensor in tensors.items() if name != "dora_scale"}


def _is_on_output(magnitude: Tensor) -> bool:
    return magnitude[0].numel() == 1


def _shape(weight: Tensor, on_output: bool) -> tuple[int, ...]:
    """LyCORIS's of dora_scale: (out, 1[, 1, 1]), or (1, in[, 1, 1])."""
    rest = [1] * (weight.dim() - 2)
    return (weight.shape[0], 1, *rest) if on_output else (1, weight.shape[1], *rest)


def _channels(y: Tensor) -> tuple[int, ...]:
    return (1, -1, 1, 1) if y.dim() == 4 else (-1,)


def _squares(squared: Tensor, on_output: bool) -> Tensor:
    """Sums of a squared weight (out, in[, kh, kw]) by output or input."""
    return squared.flatten(1).sum(1) if on_output else squared.transpose(0, 1).flatten(1).sum(1)


def _norm(squares: Tensor) -> Tensor:
    """LyCORIS's: the root, and an epsilon for what is divided by it."""
    import torch

    return squares.clamp(min=0).sqrt() + torch.finfo(torch.float32).eps
