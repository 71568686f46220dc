"""Names of adapters in files, and which modules of a base model can carry one.

kohya joins the dotted path of a module with underscores below a prefix for its part, and picks
modules by the class of the block that holds them (networks/lora.py; `full` is
LyCORIS's, config.py).
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from lorasweep.adapters.adapter import Site
from lorasweep.core.settings import SettingsError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""The parts through which prompts go; only SDXL has the second."""
_TEXT_ENCODERS = dict.fromkeys(TEXT_ENCODERS, ("CLIPAttention", "CLIPMLP"))
_CONVOLUTIONS = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
_AROUND = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")

PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    "attn-mlp": {**_TEXT_ENCODERS, "unet": ("Transformer2DModel",)},
    "conv": {**_TEXT_ENCODERS, "unet": _CONVOLUTIONS},
    "full": {**_TEXT_ENCODERS, "unet": (*_CONVOLUTIONS, *_AROUND)},
    "unet-only": {"unet": ("Transformer2DModel",)},
}
"""By part: classes of the blocks whose Linear and convolutions carry adapters, or dotted paths."""

WITH_KERNELS = ("conv", "full")
"""The presets that name convolutions with larger kernels than 1x1."""

PARTS = (*TEXT_ENCODERS, "unet")

Targets = str | tuple[str, ...]
"""A preset's name, or patterns over part.path, such as unet.*.attn2.to_k."""

Parts = Mapping[str, tuple[str, "torch.nn.Module"]]
"""unet and TEXT_ENCODERS: the prefix of their names in files, and the module."""


def check_targets(targets: Targets) -> None:
    """Raise SettingsError unless `targets` names a preset, or patterns that begin with a part."""
    if isinstance(targets, str):
        if targets not in PRESETS:
            raise SettingsError(
                f"adapter.targets={targets}: choose one of {', '.join(sorted(PRESETS))}, or give a"
                " list of patterns, e.g. adapter.targets=[unet.*.attn2.to_k]"
            )
        return
    if not targets:
        raise SettingsError("adapter.targets is empty: give a preset's name or patterns")
    for pattern in targets:
        if not _parts_of(pattern):
            raise SettingsError(
                f"adapter.targets: {pattern} begins with no part of the model; begin with unet. or"
                " text_encoder., as in unet.*.attn2.to_k"
            )


def adapted_parts(targets: Targets) -> set[str]:
    """The parts that `targets` speaks of: unet, and TEXT_ENCODERS as far as a model has them."""
    if isinstance(targets, str):
        return set(PRESETS[targets])
    return {part for pattern in targets for part in _parts_of(pattern)}


def lycoris_preset(targets: Targets) -> str:
    """What LyCORIS calls these targets; patterns as they are, for it wants a file of its own."""
    if isinstance(targets, str):
        return "unet-transformer-only" if targets == "unet-only" else targets
    return " ".join(targets)


def _parts_of(pattern: str) -> list[str]:
    first, dot, _ = pattern.partition(".")
    return [part for part in PARTS if dot and fnmatch.fnmatchcase(part, first)]


def sites(
    parts: Parts, targets: Targets, carries: Callable[[Site], bool] = lambda site: True
) -> list[Site]:
    """The sites that `targets` names and an adapter `carries`, in the model's order.

    Raises SettingsError for a pattern that matches nothing, or nothing that can be carried; a
    warning tells how many of a pattern's modules can't.
    """
    known = list(every_site(parts).values())
    if isinstance(targets, str):
        return [site for site in _of_preset(parts, known, targets) if carries(site)]
    matching = [site for pattern in targets for site in _matching(known, pattern, carries)]
    keys = {site.key for site in matching if carries(site)}
    left_out = {site.key for site in matching} - keys
    if left_out:
        log.warning(
            "adapter.targets names %d convolutions larger than 1x1 among its %d modules, which this"
            " type leaves out; adapter=locon adapts them too",
            len(left_out),
            len(left_out) + len(keys),
        )
    return [site for site in known if site.key in keys]


def _of_preset(parts: Parts, known: Sequence[Site], preset: str) -> list[Site]:
    wanted = {
        (part, f"{path}.{below}".strip("."))
        for part, (_, root) in parts.items()
        for path, block in root.named_modules()
        if {type(block).__name__, path} & set(PRESETS[preset].get(part, ()))
        for below, _ in block.named_modules()
    }
    return [site for site in known if (site.part, site.path) in wanted]


def _matching(known: Sequence[Site], pattern: str, carries: Callable[[Site], bool]) -> list[Site]:
    names = {f"{site.part}.{site.path}": site for site in known}
    found = [site for name, site in names.items() if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        near = get_close_matches(pattern, names, n=3, cutoff=0)
        raise SettingsError(
            f"adapter.targets: {pattern} matches no Linear or convolution of the base model; near"
            f" it are {', '.join(near)}"
        )
    if not any(carries(site) for site in found):
        raise SettingsError(
            f"adapter.targets: {pattern} matches only convolutions larger than 1x1, which this type"
            " does not adapt; use adapter=locon"
        )
    return found


def every_site(parts: Parts) -> dict[str, Site]:
    """Every Linear and convolution of the parts by its name in files."""
    import torch

    return {
        key: Site(key=key, part=part, path=path, module=module)
        for part, (prefix, root) in parts.items()
        for path, module in root.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        for key in [f"{prefix}_{path.replace('.', '_')}"]
    }


def every_norm(parts: Parts) -> dict[str, Site]:
    """Every LayerNorm and GroupNorm of the parts by its name in files: only files change them."""
    import torch

    return {
        key: Site(key=key, part=part, path=path, module=module)
        for part, (prefix, root) in parts.items()
        for path, module in root.named_modules()
        if isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm)
        for key in [f"{prefix}_{path.replace('.', '_')}"]
    }


def by_site(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Group a file's tensors by site: {site key: {name below it: tensor}}."""
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, rest = name.partition(".")
        grouped.setdefault(key, {})[rest] = tensor
    return grouped
