"""Names of adapters in files, and which modules of a base model can carry one.

kohya joins the dotted path of a module with underscores below a prefix for its part, and picks
modules by the class of the block that holds them (networks/lora.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lorasweep.adapters import Site
from lorasweep.settings import SettingsError

if TYPE_CHECKING:
    import torch

PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    "attn-mlp": {
        "text_encoder": ("CLIPAttention", "CLIPMLP"),
        "unet": ("Transformer2DModel",),
    },
    "unet-only": {"unet": ("Transformer2DModel",)},
}
"""Which blocks' Linear and 1x1 convolutions carry adapters, by part."""


def check_targets(targets: str) -> None:
    """Raise SettingsError unless `targets` names a preset."""
    if targets not in PRESETS:
        known = ", ".join(sorted(PRESETS))
        raise SettingsError(f"adapter.targets={targets}: choose one of {known}")


def sites(parts: Mapping[str, tuple[str, torch.nn.Module]], targets: str) -> list[Site]:
    """The sites that `targets` names, in the order text encoder, UNet, and kohya's within.

    `parts` gives for text_encoder and unet the prefix in files and the module.
    """
    return [
        Site(key=f"{prefix}_{path.replace('.', '_')}", part=part, path=path, module=module)
        for part, (prefix, root) in parts.items()
        for path, module in _members(root, PRESETS[targets].get(part, ()))
    ]


def every_site(parts: Mapping[str, tuple[str, torch.nn.Module]]) -> dict[str, Site]:
    """Every Linear and convolution of the parts by its name in files."""
    import torch

    return {
        key: Site(key=key, part=part, path=path, module=module)
        for part, (prefix, root) in parts.items()
        for path, module in root.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        for key in [f"{prefix}_{path.replace('.', '_')}"]
    }


def _members(
    root: torch.nn.Module, block_classes: Iterable[str]
) -> Iterable[tuple[str, torch.nn.Module]]:
    wanted = tuple(block_classes)
    for block_path, block in root.named_modules():
        if type(block).__name__ not in wanted:
            continue
        for path, module in block.named_modules():
            if _is_linear_or_1x1(module):
                yield f"{block_path}.{path}", module


def _is_linear_or_1x1(module: torch.nn.Module) -> bool:
    import torch

    if isinstance(module, torch.nn.Conv2d):
        return module.kernel_size == (1, 1)
    return isinstance(module, torch.nn.Linear)


def by_site(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Group a file's tensors by site: {site key: {name below it: tensor}}."""
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, rest = name.partition(".")
        grouped.setdefault(key, {})[rest] = tensor
    return grouped
