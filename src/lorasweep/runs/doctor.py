"""`lorasweep doctor`: does this machine have what the configured run needs? Downloads nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep import __version__
from lorasweep.config.build_run import build_run
from lorasweep.config.checks import CHECKS, places_can_be_written
from lorasweep.core.settings import SettingsError
from lorasweep.core.text import harmless
from lorasweep.models.model_files import ModelError
from lorasweep.runs import doctor_probes
from lorasweep.runs.doctor_probes import Finding, Level, problem_of
from lorasweep.runs.sd_scripts_probe import sd_scripts

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.text import Text

    from lorasweep.config.run import Run


def examine(cfg: DictConfig, overrides: Sequence[str] = ()) -> int:
    """Print what is found for a composed config; 1 when something that its run needs is missing.

    Raises SettingsError in one line for a wrong value; an image folder need not be given.
    """
    from rich.console import Console

    found = findings(cfg, overrides)
    console = Console()
    console.print(f"lorasweep {__version__}", highlight=False)
    for line in _lines(found, console.width):
        console.print(line, soft_wrap=line.plain.startswith("    "))  # a command is copied whole
    num_problems = sum(finding.level == "problem" for finding in found)
    if num_problems:
        console.print(f"{num_problems} to fix before this configuration can run.")
    else:
        console.print("This configuration has what it needs.")
    return 1 if num_problems else 0


def findings(cfg: DictConfig, overrides: Sequence[str] = ()) -> list[Finding]:
    """All that is found: this machine, and the checks that `train` begins with.

    `overrides` are the command line's, which some checks look at.
    """
    has_images = "image_dir" in cfg.dataset  # false for a mandatory value that is not given
    if not has_images:
        cfg = copy.deepcopy(cfg)
        cfg.dataset.image_dir = "lorasweep"  # a name for what is named after the folder
    run = build_run(cfg, output_dir=Path(), overrides=overrides, checks=())
    hub = doctor_probes.Hub()
    return [
        *doctor_probes.versions(),
        *doctor_probes.devices(run, cfg.launcher),
        *_checked(run),
        *sd_scripts(run),
        doctor_probes.disk("output_root", run.output_root),
        doctor_probes.disk("cache_dir", run.cache_dir),
        doctor_probes.base_model(run, hub),
        *doctor_probes.captioners(run, hub),
        hub.finding(),
        doctor_probes.images(run) if has_images else doctor_probes.NO_IMAGES,
        doctor_probes.tracking_store(run),
        *doctor_probes.optional_packages(),
    ]


def _checked(run: Run) -> Iterator[Finding]:
    """A line for each check of `train` that finds something, under the group of its key."""
    # `disk` has lines of its own
    of_settings = [check for check in CHECKS if check is not places_can_be_written]
    checks: list[Callable[[], Iterator[str] | None]] = [partial(one, run) for one in of_settings]
    checks += [run.model.check, run.check_optimizer, run.sampling.check]
    passed = 0
    for check in checks:
        try:
            for warning in check() or ():
                text, _, remedy = warning.partition("; ")
                yield Finding(_group(warning), text, "warning", remedy)
            passed += 1
        except (SettingsError, ModelError) as error:
            yield problem_of(_group(str(error)), error)
    yield Finding("settings", f"{passed} of {len(checks)} checks passed")


def _group(message: str) -> str:
    """The group of the key that a message begins with."""
    found = re.match(r"\w+", message)
    return found[0] if found else "settings"


def _lines(found: Sequence[Finding], width: int) -> Iterator[Text]:
    """Problems first, what to do on a line of its own; what is well has one line each, cut."""
    from rich.text import Text

    colours: Mapping[Level, str] = {"problem": "red", "warning": "yellow", "OK": "green"}
    for level, colour in colours.items():
        for one in found:
            if one.level == level:
                text = Text(f"{level:8}", style=colour)
                text.append(harmless(f"{one.check}: {one.text}"), style="default")
                if level == "OK" and one.check != "dataset.image_dir":  # of which all is wanted
                    text.truncate(width, overflow="ellipsis")
                yield text
                if one.remedy and level != "OK":
                    yield Text(f"    {harmless(one.remedy)}")
