"""A checkout of sd-scripts and its Python: where they are, and whether they have what is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasweep.core.settings import SettingsError
from lorasweep.core.text import harmless
from lorasweep.training.optimizers import KNOWN_PACKAGES
from lorasweep.training.training_run import SdScriptsTrainer, TrainingRun

SCRIPT = "train_network.py"
PACKAGES = {
    "torch": "torch",
    "accelerate": "accelerate",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "tensorboard": "tensorboard",
    "toml": "toml",
    "lycoris": "lycoris-lora",
    "xformers": "xformers",
    **KNOWN_PACKAGES,
}
"""Modules that a training may need there, and what pip calls them."""
NEEDED = ("torch", "accelerate", "tensorboard")
_SECONDS = 60
_QUESTION = """
import importlib.metadata as metadata, importlib.util as util, json, sys
found = {}
for module, package in json.loads(sys.argv[1]).items():
    if util.find_spec(module) is not None:
        try:
            found[module] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[module] = "of unknown version"
print(json.dumps({"python": sys.version.split()[0], "packages": found}))
"""


@dataclass(frozen=True)
class Environment:
    """What the interpreter of a checkout says of itself."""

    python: str
    packages: Mapping[str, str]
    """Those of PACKAGES that it has: module -> version."""


def check_folder(trainer: SdScriptsTrainer) -> None:
    """Raise SettingsError unless the checkout and its interpreter are there."""
    script = trainer.path.expanduser() / SCRIPT
    if not script.is_file():
        raise SettingsError(
            f"trainer.path={trainer.path}: there is no {SCRIPT}; give the folder of a checkout of"
            " kohya-ss/sd-scripts (in kohya_ss it is the folder sd-scripts)"
        )
    python = interpreter(trainer)
    if not python.is_file():
        raise SettingsError(
            f"trainer.python={python}: no such file; give the Python of sd-scripts' environment,"
            " such as trainer.python=VENV/bin/python"
        )


def interpreter(trainer: SdScriptsTrainer) -> Path:
    """The Python that runs sd-scripts: as said, or that of an environment beside it, or ours."""
    if trainer.python is not None:
        return trainer.python.expanduser().absolute()  # not resolved: a venv's is a link
    folder = trainer.path.expanduser().absolute()
    places = [root / name for root in (folder, folder.parent) for name in ("venv", ".venv")]
    found = [place / "bin" / "python" for place in places]
    return next((python for python in found if python.is_file()), Path(sys.executable))


def ask(trainer: SdScriptsTrainer) -> Environment:
    """What the interpreter has; a fraction of a second, for nothing is imported."""
    said = run_there(trainer, ["-c", _QUESTION, json.dumps(PACKAGES)], _SECONDS)
    try:
        answer = json.loads(said.splitlines()[-1])
        return Environment(answer["python"], answer["packages"])
    except (ValueError, LookupError, TypeError):
        raise SettingsError(
            f"trainer.python={interpreter(trainer)}: doesn't answer as a Python does; give that of"
            " sd-scripts' environment"
        ) from None


def run_there(trainer: SdScriptsTrainer, arguments: list[str], seconds: float) -> str:
    """What the interpreter prints when it is given these arguments, in the checkout.

    Raises SettingsError with its last line if it fails.
    """
    python = interpreter(trainer)
    try:
        done = subprocess.run(
            [str(python), *arguments],
            cwd=trainer.path.expanduser(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except OSError as error:
        raise SettingsError(
            f"trainer.python={python} can't be run: {error.strerror}; give the Python of"
            " sd-scripts' environment"
        ) from None
    except subprocess.TimeoutExpired:
        raise SettingsError(f"trainer.python={python}: no answer in {seconds:.0f} s") from None
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing was said"]
        raise SettingsError(
            f"trainer.python={python} failed: {harmless(lines[-1])}; install sd-scripts'"
            " requirements there, or give another trainer.python"
        )
    return done.stdout.decode(errors="replace")


def missing(trainer: SdScriptsTrainer, run: TrainingRun, there: Environment) -> list[str]:
    """The packages that a run needs and the interpreter lacks, by pip's names."""
    optimizer = run.optimizer.dotted_type.partition(".")[0]
    needed = {
        *NEEDED,
        *(["lycoris"] if run.adapter.metadata()["ss_network_module"] == "lycoris.kohya" else []),
        *(["xformers"] if trainer.attention == "xformers" else []),
        *([optimizer] if optimizer in PACKAGES else []),
    }
    return sorted(PACKAGES[module] for module in needed - there.packages.keys())


def commit(trainer: SdScriptsTrainer) -> str | None:
    """The commit of the checkout, if git can tell."""
    try:
        done = subprocess.run(
            ["git", "-C", str(trainer.path.expanduser()), "log", "-1", "--format=%h of %cs"],
            capture_output=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace").strip() or None
