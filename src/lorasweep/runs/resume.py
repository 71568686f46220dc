"""Where a run or a sweep that was broken off goes on: its folder, by settings, name or place.

What goes on there is found by `run_folder.RunFolder` (was this very run begun here?) and
`training/saved_states.py` (from which step of which epoch).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.core.foreign_files import ForeignFileError, read_json, refuse_links_out
from lorasweep.core.settings import SettingsError
from lorasweep.runs.run_folder import (
    MULTIRUN,
    RECORD,
    SWEEP_RECORD,
    RunJson,
    check_longer,
    is_free,
    read_record,
    sweep_name,
)

if TYPE_CHECKING:
    from lorasweep.training.lr_schedulers import LRScheduler

log = logging.getLogger(__name__)


def find_broken_off(parent: Path, record: str, settings: str) -> Path | None:
    """The newest folder in which a run or a multirun of these settings was broken off.

    `record` is the name of its record, RECORD or SWEEP_RECORD; `settings` their digest.
    """
    for path in sorted(parent.glob(f"*/{record}"), reverse=True):
        try:
            found = read_json(path)
        except (ForeignFileError, OSError):
            continue  # not ours, or torn: whoever trains there says so
        wanted = found.get("status") == "unfinished" and found.get("settings") == settings
        if wanted and is_free(path.parent):
            return path.parent
    return None


def broken_off(output_root: Path) -> list[Path]:
    """Folders of runs and sweeps that have not ended and that nobody trains in; newest first."""
    patterns = (f"*/*/{RECORD}", f"*/*/*/{RECORD}", f"*/*/{SWEEP_RECORD}")
    records = [path for pattern in patterns for path in output_root.glob(pattern)]
    records.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    found: dict[Path, None] = {}
    for path in records:
        try:
            status = read_json(path).get("status")
        except (ForeignFileError, OSError):
            continue  # not ours, or torn: whoever trains there says so
        if status == "unfinished" and is_free(path.parent):
            in_sweep = (path.parent.parent / MULTIRUN).is_file()
            found[path.parent.parent if in_sweep else path.parent] = None
    return [folder for folder in found if is_free(folder)]


def find(target: str, output_root: Path, *, also_ended: bool = False) -> Path:
    """The folder to go on in, of a run or a sweep by its name or its folder.

    With `also_ended` that of a run that has ended is found by its name too: the newest.

    A run of a multirun goes on with the others, for a pack rounds by its members. Raises
    SettingsError, and ForeignFileError for a folder with a link out of it.
    """
    folder = Path(target)
    if not folder.is_dir():
        folder = _named(target, output_root, also_ended=also_ended)
    if (folder.parent / MULTIRUN).is_file():
        folder = folder.parent
    if (folder / MULTIRUN).is_file() or (folder / RECORD).is_file():
        refuse_links_out(folder)  # before Hydra writes its files there
        return folder.absolute()
    raise SettingsError(f"{target} is no folder of a run or of a sweep: nothing was begun there")


def check_longer_runs(folder: Path, schedule: LRScheduler) -> None:
    """Raise SettingsError if a run of a run's or a multirun's folder can't get more epochs."""
    for path in sorted([*folder.glob(RECORD), *folder.glob(f"*/{RECORD}")]):
        if (record := read_record(path.parent)) is not None:
            check_longer(path.parent, record, schedule)


def _named(name: str, output_root: Path, *, also_ended: bool) -> Path:
    paths = [*output_root.glob(f"*/*/{RECORD}"), *output_root.glob(f"*/*/*/{RECORD}")]
    records = [path for path in paths if path.is_file()]
    records.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    found: dict[Path, RunJson | None] = {}
    for path in records:
        try:
            found[path.parent] = read_record(path.parent)
        except SettingsError as error:
            log.warning("%s", error)
    open_ones = {p: one.name for p, one in found.items() if one and one.status == "unfinished"}
    for folder, known in open_ones.items():
        if known == name:
            return folder
    sweeps = [path.parent for path in output_root.glob(f"*/*/{MULTIRUN}")]
    if named := [folder for folder in sweeps if sweep_name(folder) == name]:
        return max(named, key=lambda folder: (folder / MULTIRUN).stat().st_mtime)
    if ended := [folder for folder, one in found.items() if one and one.name == name]:
        if also_ended:
            return ended[0]
        raise SettingsError(
            f"{name} has ended: there is nothing to go on with; trainer.max_train_epochs=… trains"
            " it further"
        )
    known_names = ", ".join(dict.fromkeys(open_ones.values())) or "none"
    raise SettingsError(f"{name}: no such run or sweep in {output_root}; broken off: {known_names}")
