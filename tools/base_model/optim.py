"""The optimizers: Muon on hidden matrices and convolutions, AdamW on the rest, and an EMA."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

EDGES = ("conv_in.", "conv_out.", "quant_conv.", "token_embedding", "position_embedding")
"""Inputs and outputs, which AdamW trains."""


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (Jordan et al., 2024) for weights of two or more dimensions."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
            for p, update in zip(params, orthogonalised(nesterov), strict=True):
                scale = max(1.0, p.shape[0] / p[0].numel()) ** 0.5
                p.add_(update, alpha=-group["lr"] * scale)


def orthogonalised(tensors: Sequence[Tensor]) -> list[Tensor]:
    """UVᵀ of each tensor's SVD as a matrix (M, rest), nearly, in the tensor's own shape.

    The quintic Newton-Schulz iteration only multiplies by polynomials of the Gram matrix, so it
    runs on those small squares, all of a size in one batch, and touches the matrices twice.
    """
    wide = [as_wide(t) for t in tensors]
    units = [x / (x.norm() + 1e-7) for x in wide]
    results: list[Tensor] = [torch.empty(0)] * len(units)
    for size in sorted({len(x) for x in units}):
        mine = [i for i, x in enumerate(units) if len(x) == size]
        roots = inverse_roots(torch.stack([units[i] @ units[i].T for i in mine]))
        for i, root in zip(mine, roots, strict=True):
            results[i] = root @ units[i]
    return [back(x, t) for x, t in zip(results, tensors, strict=True)]


def inverse_roots(grams: Tensor, steps: int = 5) -> Tensor:
    """(K, M, M) factors that turn X into nearly UVᵀ, from XXᵀ."""
    total = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device).expand_as(grams)
    for _ in range(steps):
        factor = torch.baddbmm(grams, grams, grams, beta=-4.7750, alpha=2.0315)
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)
        total = factor @ total
        grams = factor @ grams @ factor
    return total


def as_wide(tensor: Tensor) -> Tensor:
    """A tensor as a matrix with no more rows than columns."""
    matrix = tensor.flatten(1)
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def back(matrix: Tensor, like: Tensor) -> Tensor:
    """Undo `as_wide`."""
    tall = like.shape[0] > like[0].numel()
    return (matrix.T if tall else matrix).reshape(like.shape)


def optimizers(model: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon and AdamW over a model's parameters."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        is_hidden = p.ndim >= 2 and not any(edge in name for edge in EDGES)
        (hidden if is_hidden else rest).append(p)
    adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    return [Muon(hidden, lr=muon_lr), adam]


def zero_outputs(model: nn.Module) -> None:
    """Start every residual branch, and the output, at zero."""
    for name, module in model.named_modules():
        if name.endswith((".conv2", ".proj_out", "mid_block.attentions.0.to_out.0")) or name in (
            "conv_out",
            "decoder.conv_out",
        ):
            assert isinstance(module, nn.Conv2d | nn.Linear), name
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, step: int) -> None:
    """Exponential moving average whose horizon is a tenth of the steps so far."""
    names, params = zip(*model.named_parameters(), strict=True)
    weight = 10.0 / (10.0 + step)
    torch._foreach_lerp_([average[name] for name in names], [p.detach() for p in params], weight)
