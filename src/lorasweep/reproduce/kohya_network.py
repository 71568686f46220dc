"""sd-scripts' networks as adapters: module, ranks, targets and the network's own arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lorasweep.core.foreign_files import ForeignFileError, parse_json
from lorasweep.core.settings import SettingsError
from lorasweep.core.text import shown
from lorasweep.reproduce.found_settings import NEUTRAL, FoundSettings, Options, Said
from lorasweep.training.sd_scripts_options import (
    Reader,
    boolean,
    is_off,
    number,
    optional,
    plain,
    whole,
)

MODULES = ("networks.lora", "lycoris.kohya")
"""Networks of sd-scripts that lorasweep has."""
_MAX_RANK = 4096  # of adapter.rank
PRESETS = {"full": "full", "attn-mlp": "attn-mlp", "unet-transformer-only": "unet-only"}
"""LyCORIS's preset -> adapter.targets."""
_FACTORED = ("lora", "locon", "dora")
_NETWORK_ARGS: Mapping[str, tuple[str, Reader, tuple[str, ...]]] = {
    "rank_dropout": ("adapter.rank_dropout", number, (*_FACTORED, "loha", "lokr")),
    "module_dropout": ("adapter.module_dropout", number, (*_FACTORED, "loha", "lokr")),
    "dropout": ("adapter.network_dropout", number, _FACTORED),
    "rs_lora": ("adapter.rslora", boolean, ("locon", "dora")),
    "wd_on_output": ("adapter.wd_on_output", boolean, ("dora",)),
    "factor": ("adapter.factor", whole, ("lokr",)),
    "full_matrix": ("adapter.full_matrix", boolean, ("lokr",)),
    # LyCORIS doesn't read the text, and any text is true
    "decompose_both": ("adapter.decompose_both", lambda said: bool(str(said)), ("lokr",)),
    **{
        name: (f"optimizer.{name}", optional, _FACTORED)
        for name in (
            "loraplus_lr_ratio",
            "loraplus_unet_lr_ratio",
            "loraplus_text_encoder_lr_ratio",
        )
    },
}
"""Argument of a network -> our setting, how it is read, and the options of conf/adapter with it."""
_IDLE_ARGS = {
    "bypass_mode": "it is about how LyCORIS computes, not what",
    "rank_dropout_scale": "lorasweep scales the rest up in any case, as networks.lora",
    "train_on_input": "it is of iA3's alone",
    "block_size": "it is of DyLoRA's alone",
}


def read_network(options: Options, found: FoundSettings) -> None:
    """Adapter, rank, alpha, targets and the network's arguments."""
    module = options.pop("network_module", "networks.lora")
    assert module is not None  # metadata without one has it from the tensors
    if module.value not in MODULES:
        raise SettingsError(
            f"{shown(module.where)}: lorasweep has no such network; it has those of"
            f" {' and '.join(MODULES)}, for Stable Diffusion"
        )
    is_lycoris = module.value == "lycoris.kohya"
    args = _network_args(options, found)
    algo = str(args["algo"].value).lower() if "algo" in args else "lora"
    adapter = _adapter(is_lycoris, algo, args)
    named = [args.pop(name).where for name in ("algo", "dora_wd") if name in args]
    found.choose("adapter", adapter, "; ".join(dict.fromkeys([module.where, *named])))
    if adapter == "lycoris":
        found.take("adapter.algo", algo, named[0])
    _ranks(options, found, args, is_lycoris=is_lycoris)
    _targets(options, found, args, is_lycoris=is_lycoris)
    dropout = options.pop("network_dropout")
    if dropout is not None and not (is_off(dropout.value) and "dropout" in args):
        args["dropout"] = dropout
    own = {}
    for name, said in args.items():
        setting, read, adapters = _NETWORK_ARGS.get(name, ("", plain, ()))
        if adapter in adapters:
            found.read(setting, said, read)
        elif str(said.value).lower() in NEUTRAL:
            found.idle(said.where, "it is off")
        elif name in _IDLE_ARGS:
            found.idle(said.where, _IDLE_ARGS[name])
        elif adapter == "lycoris" and re.fullmatch(r"\w+", name):
            own[name] = said
        else:
            found.leave(said.where, f"adapter={adapter} has no such setting here")
    if own:
        where = "; ".join(said.where for said in own.values())
        found.take("adapter.args", {name: _text(said.value) for name, said in own.items()}, where)
    if adapter == "lokr" and str(args.get("decompose_both", Said("", "")).value) == "False":
        found.notes.append(
            f"{args['decompose_both'].where}: LyCORIS takes the text False for true, so that is how"
            " it trains; adapter.decompose_both=false is what was meant"
        )


def _network_args(options: Options, found: FoundSettings) -> dict[str, Said]:
    """The network's arguments by name, from a list of NAME=VALUE or an object."""
    said = options.pop("network_args")
    if said is None or is_off(said.value):
        return {}
    value, label = said.value, said.where.partition("=")[0]
    if isinstance(value, str):
        try:
            value = parse_json(value, label)
        except ForeignFileError:
            found.leave(said.where, "not understood")
            return {}
    if isinstance(value, Mapping):
        pairs = [(str(name), one) for name, one in value.items()]
    elif isinstance(value, list):
        pairs = [tuple(str(one).partition("=")[::2]) for one in value]  # type: ignore[misc]
    else:
        pairs = []
    if not pairs:
        found.idle(said.where, "it is empty")
    return {
        name: one if isinstance(one, Said) else Said(one, shown(f"{label}: {name}={one}", 200))
        for name, one in pairs
    }


def _adapter(is_lycoris: bool, algo: str, args: Mapping[str, Said]) -> str:
    """The option of conf/adapter."""
    if not is_lycoris:
        return "locon" if "conv_dim" in args else "lora"
    if algo not in ("lora", "locon"):
        return algo if algo in ("loha", "lokr") else "lycoris"
    is_dora = "dora_wd" in args and str(args["dora_wd"].value).lower() in ("true", "1")
    return "dora" if is_dora else "locon"


def _ranks(
    options: Options, found: FoundSettings, args: dict[str, Said], *, is_lycoris: bool
) -> None:
    """Ranks and alphas; alpha 0 is the rank, as sd-scripts and LyCORIS have it."""
    rank, alpha = options.pop("network_dim", 4), options.pop("network_alpha", 1)
    if rank is not None and is_off(rank.value):
        rank = Said(4, rank.where)
    for setting, said, read in (("rank", rank, whole), ("alpha", alpha, number)):
        if said is None:
            found.leave(f"adapter.{setting}", "the default stands")
        else:
            found.read(f"adapter.{setting}", said, read)
    conv_rank, conv_alpha = args.pop("conv_dim", None), args.pop("conv_alpha", None)
    if found.choices["adapter"] == "lora":
        for one in filter(None, (conv_rank, conv_alpha)):
            found.idle(one.where, "networks.lora reads it with conv_dim alone")
    elif rank is not None and alpha is not None:
        not_said = "{}, which is not said".format
        if conv_rank is None:
            conv_rank = Said(found.settings.get("adapter.rank", 4), not_said("conv_dim"))
        if conv_alpha is None:  # LyCORIS's default is network_alpha, networks.lora's 1
            value = found.settings.get("adapter.alpha", 1.0) if is_lycoris else 1.0
            conv_alpha = Said(value, not_said("conv_alpha"))
        found.read("adapter.conv_rank", conv_rank, whole)
        found.read("adapter.conv_alpha", conv_alpha, number)
    _mend_alphas(found, (rank, alpha, conv_rank, conv_alpha))


def _mend_alphas(found: FoundSettings, said: tuple[Said | None, ...]) -> None:
    """What ranks and alphas mean that stand for something else."""
    for prefix, (rank, alpha) in (("", said[:2]), ("conv_", said[2:])):
        rank_key, alpha_key = f"adapter.{prefix}rank", f"adapter.{prefix}alpha"
        of_rank, of_alpha = found.settings.get(rank_key), found.settings.get(alpha_key)
        if rank is None or alpha is None or of_rank is None or of_alpha is None:
            continue
        if prefix and of_rank == 0:
            found.change(rank_key, None)
            found.change(alpha_key, None)
            found.notes.append(f"{rank.where}: kernels larger than 1x1 get no adapters")
        elif of_alpha == 0:
            found.change(alpha_key, float(of_rank))
            found.notes.append(f"{alpha.where}: alpha 0 is the rank, so that the scale is 1")
        elif found.choices["adapter"] == "lokr" and of_rank > _MAX_RANK:
            found.change(rank_key, _MAX_RANK)
            found.notes.append(f"{rank.where}: from rank {_MAX_RANK} on matrices are full, too")
        elif prefix and of_alpha < of_rank / 8:
            found.notes.append(
                f"{rank.where}; {alpha.where}: kernels larger than 1x1 work at"
                f" {of_alpha:g}/{of_rank} of their strength"
            )


def _targets(
    options: Options, found: FoundSettings, args: dict[str, Said], *, is_lycoris: bool
) -> None:
    """By LyCORIS's preset, else by the names of the tensors where a file has some."""
    preset, by_names = args.pop("preset", None), options.pop("targets")
    if is_lycoris and preset is None and by_names is None:
        preset = Said("full", "LyCORIS's preset, which is not said")
    if preset is not None and str(preset.value) in PRESETS:
        found.take("adapter.targets", PRESETS[str(preset.value)], preset.where)
        return
    if preset is not None:
        found.leave(preset.where, "lorasweep doesn't know this preset; adapter.targets says which")
    if by_names is not None:
        found.take("adapter.targets", by_names.value, by_names.where)


def _text(value: Any) -> Any:
    """An argument of LyCORIS's: a number, true or false where it reads as one."""
    text = str(value)
    try:
        parsed = json.loads(text.lower())
    except ValueError:
        return text
    return parsed if isinstance(parsed, bool | int | float) else text
