"""The short names by which conf/ and the logs call a component, whatever file it lives in.

`_target_: LoRA` in a YAML names a class of this table; a dotted path names a class of your own.
Runs that were trained before the names were short logged a dotted path: `short_name` reads both,
and `first_name` gives the one that digests of settings have counted from the beginning.
"""

from __future__ import annotations

MODULES = {
    "DoRA": "lorasweep.adapters.dora",
    "Dataset": "lorasweep.data.dataset",
    "Empty": "lorasweep.data.captions.empty",
    "KohyaDataset": "lorasweep.data.dataset",
    "Kosmos2": "lorasweep.data.captions.kosmos2",
    "LRScheduler": "lorasweep.training.lr_schedulers",
    "LoCon": "lorasweep.adapters.locon",
    "LoHa": "lorasweep.adapters.loha",
    "LoKr": "lorasweep.adapters.lokr",
    "LoRA": "lorasweep.adapters.lora",
    "LyCORIS": "lorasweep.adapters.lycoris",
    "Model": "lorasweep.models.load_model",
    "NativeTrainer": "lorasweep.training.training_run",
    "Optimizer": "lorasweep.training.optimizers",
    "PriorDrift": "lorasweep.judging.metrics.prior_drift",
    "Sampling": "lorasweep.judging.sampling",
    "SdScriptsTrainer": "lorasweep.training.training_run",
    "Sidecar": "lorasweep.data.captions.sidecar",
    "StudySettings": "lorasweep.sweeps.study.study_settings",
    "Tracking": "lorasweep.tracking.store",
    "Validation": "lorasweep.judging.metrics.held_out_loss",
    "WD14": "lorasweep.data.captions.wd14",
}
"""Where each component lives now. Moving a class changes this line and nothing that was logged."""

_FIRST_MODULES = {
    "DoRA": "lorasweep.adapters.dora",
    "Dataset": "lorasweep.dataset",
    "Empty": "lorasweep.captions.empty",
    "Kosmos2": "lorasweep.captions.kosmos2",
    "LRScheduler": "lorasweep.optimizers",
    "LoCon": "lorasweep.adapters.locon",
    "LoHa": "lorasweep.adapters.loha",
    "LoKr": "lorasweep.adapters.lokr",
    "LoRA": "lorasweep.adapters.lora",
    "LyCORIS": "lorasweep.adapters.lycoris",
    "Model": "lorasweep.models",
    "NativeTrainer": "lorasweep.trainers.native",
    "Optimizer": "lorasweep.optimizers",
    "PriorDrift": "lorasweep.metrics.prior_drift",
    "Sampling": "lorasweep.sampling",
    "Sidecar": "lorasweep.captions.sidecar",
    "StudySettings": "lorasweep.study.settings",
    "Tracking": "lorasweep.tracking",
    "Validation": "lorasweep.metrics.validation",
    "WD14": "lorasweep.captions.wd14",
}
"""Where they lived when their dotted paths were logged; closed: new components have short names."""


def short_name(target: str) -> str:
    """LoRA, of LoRA or of `lorasweep.adapters.lora.LoRA`; a path that is not ours as it is."""
    module, _, name = target.rpartition(".")
    ours = name in MODULES and module in ("", MODULES[name], _FIRST_MODULES.get(name))
    return name if ours else target


def dotted_path(target: str) -> str:
    """The dotted path of the class that a `_target_` names."""
    name = short_name(target)
    return f"{MODULES[name]}.{name}" if name in MODULES else target


def first_name(target: str) -> str:
    """The name under which a component was first logged."""
    name = short_name(target)
    return f"{_FIRST_MODULES[name]}.{name}" if name in _FIRST_MODULES else name


def with_short_names(text: str) -> str:
    """A text of settings, such as JSON, with the short names of components in it."""
    for name, module in _FIRST_MODULES.items():
        text = text.replace(f'"{module}.{name}"', f'"{name}"')
    return text
