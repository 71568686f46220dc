"""Probe of a checkout of sd-scripts, for `lorasweep doctor trainer=sd_scripts`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from lorasweep.config.run import Run
from lorasweep.core.settings import SettingsError
from lorasweep.models.devices import resolve_device
from lorasweep.runs.doctor_probes import Finding, problem_of
from lorasweep.training import sd_scripts_checkout as checkout
from lorasweep.training.training_run import SdScriptsTrainer

_SECONDS = 180  # in which sd-scripts must have loaded its libraries
_TWICE = "TimestepEmbedding"
_PIN = re.compile(r"^([\w-]+)(?:\[\w+\])?==([\w.]+)", re.MULTILINE)


def sd_scripts(run: Run) -> Iterator[Finding]:
    """Where it is, its Python, the packages there, and whether they load together."""
    trainer = run.trainer
    if not isinstance(trainer, SdScriptsTrainer):
        return
    try:
        checkout.check_folder(trainer)
    except SettingsError:
        return  # said by the check of the settings
    commit = checkout.commit(trainer) or "not from git, so its commit can't be told"
    yield Finding("trainer.path", f"{trainer.path}: {commit}")
    python = checkout.interpreter(trainer)
    try:
        there = checkout.ask(trainer)
        yield Finding("trainer.python", f"{python}: Python {there.python}")
        yield _packages(trainer, run, there)
        if not checkout.missing(trainer, run, there):
            yield _starts(trainer)
            if run.adapter.metadata()["ss_network_module"] == "lycoris.kohya":
                yield _lycoris(trainer, there.packages["lycoris"])
    except SettingsError as error:
        yield problem_of("trainer.python", error)


def _packages(trainer: SdScriptsTrainer, run: Run, there: checkout.Environment) -> Finding:
    """Are the packages there, in the versions that the checkout's requirements.txt asks for?"""
    if lacking := checkout.missing(trainer, run, there):
        remedy = f"{checkout.interpreter(trainer)} -m pip install {' '.join(lacking)}"
        return Finding("sd-scripts", f"no {', '.join(lacking)} there", "problem", remedy)
    requirements = trainer.path.expanduser() / "requirements.txt"
    text = requirements.read_text(errors="replace") if requirements.is_file() else ""
    pins = dict(_PIN.findall(text))
    names = {module: checkout.PACKAGES[module] for module in there.packages}
    listed = ", ".join(f"{names[module]} {there.packages[module]}" for module in names)
    other = [
        f"{name} {pins[name]}"
        for module, name in names.items()
        if pins.get(name, there.packages[module]) != there.packages[module]
    ]
    if not other:
        return Finding("sd-scripts", listed)
    remedy = f"if it fails, install {requirements} there"
    text = f"{listed}, and its requirements.txt asks for {', '.join(other)}"
    return Finding("sd-scripts", text, "warning", remedy)


def _starts(trainer: SdScriptsTrainer) -> Finding:
    """Do its libraries load, and does its torch see the device? Takes some seconds."""
    asked = "import torch; print(torch.__version__, torch.cuda.is_available())"
    version, _, has_cuda = checkout.run_there(trainer, ["-c", asked], _SECONDS).partition(" ")
    device = resolve_device(trainer.device)
    if device != "cpu" and has_cuda.strip() != "True":
        text = f"its torch {version} sees no CUDA device, and {device} is to be trained on"
        return Finding("sd-scripts", text, "problem", "install a torch with CUDA there")
    script = Path(trainer.path.expanduser().absolute(), checkout.SCRIPT)
    checkout.run_there(trainer, [str(script), "--help"], _SECONDS)
    return Finding("sd-scripts", f"{checkout.SCRIPT} starts with torch {version} on {device}")


def _lycoris(trainer: SdScriptsTrainer, version: str) -> Finding:
    """Does it load, and fit sd-scripts' UNet? 4.1.3 has presets that name modules of it twice."""
    asked = (
        "import lycoris.kohya; from lycoris.config import PRESET;"
        f" print({_TWICE!r} in PRESET['full']['unet_target_module'])"
    )
    if checkout.run_there(trainer, ["-c", asked], _SECONDS).split()[-1:] == ["True"]:
        text = f"LyCORIS {version} adapts SD1.5's time embedding twice with adapter.targets=full"
        remedy = f"{checkout.interpreter(trainer)} -m pip install lycoris-lora==3.2.0.post2"
        return Finding("sd-scripts", text, "warning", remedy)
    return Finding("sd-scripts", f"LyCORIS {version} loads")
