"""Where a run's adapter begins: anew, or with a LoRA file of any program (kohya's network_weights).

kohya leaves out without a word what of a file finds no place in the network, and trains with
another scale than it saves where alphas differ. Here a file begins a run whole or not at all, but
for what the settings leave untrained, which is told.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lorasweep.adapters.pack import Pack, check_fit
from lorasweep.adapters.weight_deltas import Tensors
from lorasweep.core import rng, safetensors_header
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.settings import SettingsError
from lorasweep.core.text import listed
from lorasweep.lora_files import read_lora_file
from lorasweep.lora_files.read_lora_file import LoRAFile
from lorasweep.models.base_model import BaseModel
from lorasweep.training.training_run import TrainingRun

log = logging.getLogger(__name__)

_KOHYAS = ("lora_te_", "lora_unet_")
_OF_NETWORK = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")


def first_adapters(base: BaseModel, run: TrainingRun) -> tuple[Pack, Mapping[str, str]]:
    """The run's adapters before its first step; what their metadata says otherwise than settings.

    Raises SettingsError, naming module and setting, where the file is of another type or shape than
    the settings, and CheckpointError for a file that can't be read.
    """
    optimizer = run.optimizer
    fresh = Pack.new(
        base.parts, [(run.adapter, run.seed, optimizer.trained_parts)], [optimizer.trains]
    )
    if run.network_weights is None:
        return fresh, {}
    file = read_lora_file.read(Path(run.network_weights).expanduser(), base)
    if getattr(run.adapter, "init", None) == "pissa":
        raise SettingsError(
            "adapter.init=pissa begins with the base's own weights, and trainer.network_weights"
            " with a file's; set adapter.init=kaiming"
        )
    member = fresh.member(0)
    given = _trained(file, fresh, run)
    wanted = given if run.dim_from_weights else member.tensors
    begun: dict[str, Tensors] = {}
    for key in wanted:
        if key in given:
            _check_alike(file, key, fresh, run)
            begun[key] = {name: tensor.float() for name, tensor in given[key].items()}
        else:
            begun[key] = member.tensors[key]
    if not any(key in given for key in begun):
        raise SettingsError(
            f"trainer.network_weights={file.path}: nothing of it belongs to what is trained;"
            " trainer.dim_from_weights=true takes its modules"
        )
    if fewer := len(wanted) - sum(key in given for key in wanted):
        log.warning("%s has nothing for %d modules, which begin anew", file.path, fewer)
    pack = Pack(fresh.known, [replace(member, tensors=begun)])
    return pack, _network_of(file) if run.dim_from_weights else {}


def _trained(file: LoRAFile, fresh: Pack, run: TrainingRun) -> dict[str, Tensors]:
    """What of a file the run trains; a warning tells what it leaves out."""
    adapted = fresh.member(0).tensors.keys()
    found: dict[str, Tensors] = {}
    for key, tensors in file.sites.items():
        site = fresh.known.get(key)
        if site is None:
            raise _unlike(file, key, "which the base model doesn't have, or no adapter trains")
        is_trained = site.part in run.optimizer.trained_parts and run.optimizer.trains(site)
        if is_trained and (run.dim_from_weights or key in adapted):
            found[key] = tensors
    if left := len(file.sites) - len(found):
        log.warning(
            "%s: %d of its %d modules are not trained by these settings and left out",
            *(file.path, left, len(file.sites)),
        )
    return found


def _check_alike(file: LoRAFile, key: str, fresh: Pack, run: TrainingRun) -> None:
    """Is a module of the file what the settings would make it, but for its numbers?

    With dim_from_weights but for its rank and alpha.
    """
    given, site = file.sites[key], fresh.known[key]
    if not run.adapter.carries(site):
        raise _unlike(file, key, f"which {type(run.adapter).__name__} can't adapt")
    new = run.adapter.initial(site, rng.generator(run.seed, "init", key))
    if given.keys() != new.keys():
        names = listed(sorted(given))
        raise _unlike(file, key, f"of {names}: choose the adapter that has these")
    if run.dim_from_weights:
        try:
            check_fit(site, given)
        except CheckpointError as error:
            raise CheckpointError(f"{file.path}: {error}") from None
        return
    for name in sorted(given, reverse=True):  # ranks before alpha
        shapes = tuple(given[name].shape), tuple(new[name].shape)
        if shapes[0] != shapes[1]:
            raise _unlike(file, key, f"whose {name} is {shapes[0]}, and {shapes[1]} by adapter")
    if "alpha" in given and abs(float(given["alpha"]) - float(new["alpha"])) > 1e-4:
        alphas = f"{float(given['alpha']):g}, and {float(new['alpha']):g} by adapter"
        raise _unlike(file, key, f"whose alpha is {alphas}")


def _unlike(file: LoRAFile, key: str, why: str) -> SettingsError:
    return SettingsError(
        f"trainer.network_weights={file.path} has {key}, {why}; give the settings that it was"
        " trained with, or trainer.dim_from_weights=true for its own ranks and alphas"
    )


def _network_of(file: LoRAFile) -> dict[str, str]:
    """What a file's metadata says of its network; where it doesn't, ranks are its tensors'."""
    told = {key: file.metadata[key] for key in _OF_NETWORK if key in file.metadata}
    return {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic", **told}


def is_kohyas(path: Path) -> bool:
    """Are the names of a file those that sd-scripts reads?"""
    return all(name.startswith(_KOHYAS) for name in safetensors_header.read(path).shapes)
