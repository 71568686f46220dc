"""A run of a sweep that an earlier command has trained: its folder is copied, and it isn't trained.

So a grid that is widened trains only its new points, and one with more epochs goes on from the
last states of the old ones (`RunFolder`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lorasweep.config.run import Run
from lorasweep.config.settings_digest import digests_with_fewer_epochs, settings_digest
from lorasweep.core.atomic_write import room_for
from lorasweep.core.foreign_files import ForeignFileError, refuse_links_out
from lorasweep.core.settings import SettingsError, name_for_files
from lorasweep.lora_files.checkpoint import checkpoint_path
from lorasweep.runs import provenance
from lorasweep.runs.run_folder import (
    RECORD,
    RunJson,
    lock,
    read_record,
    sweep_name,
    write_record,
)
from lorasweep.tracking import NewRun, Tracker
from lorasweep.tracking.records import RunRecords
from lorasweep.training import saved_states

_RENAMED = (".safetensors", ".png")
_AS_THEY_ARE = (provenance.ORIGIN, provenance.DIFF, "seconds.json", "contact_sheet.png")


def take_trained(run: Run, new: NewRun, tracker: Tracker) -> str | None:
    """Copy an equal run of another command into the folder of `run`; which, None if there is none.

    Equal are settings, images, captions, base model, libraries and code, of a run below
    output_root/NAME that has ended and is whole: no checkpoint was deleted. The newest is taken;
    if there is none, the longest that has fewer epochs, with its last state, to be trained further.
    Only for the jobs of sweeps: a run that someone asks for by itself is trained.
    """
    if run.number is None or run.output_dir.parent.parent.parent != run.output_root:
        return None
    held = lock(run.output_dir)
    try:
        if read_record(run.output_dir) is not None:
            return None
        for folder, theirs, epochs in _equal_runs(run, new.dataset_digest):
            if provenance.is_made_alike(folder, run.model, run.cache_dir, run.network_weights):
                _copy(folder, theirs, run, new, tracker)
                as_far = "" if epochs is None else f" to epoch {epochs}"
                return f"{run.name}{as_far} as {theirs.name} of {_whence(folder, run)}"
        return None
    finally:
        held.release()


def _equal_runs(run: Run, data: str) -> Iterator[tuple[Path, RunJson, int | None]]:
    """Folders of runs that can be taken, the longest first, then the newest.

    With each the epochs that it was begun with, if they are fewer; else None.
    """
    home = run.output_dir.parent.parent
    paths = [path for depth in ("*", "*/*") for path in home.glob(f"{depth}/{RECORD}")]
    paths.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    found: list[tuple[Path, RunJson]] = []
    for path in paths:
        if path.parent.parent == run.output_dir.parent:
            continue
        try:
            record = read_record(path.parent)
        except SettingsError:  # who trains there says so
            continue
        if record is not None and record.status == "finished" and record.data == data:
            found.append((path.parent, record))
    ours = settings_digest(run.params)
    for folder, record in found:
        if record.settings == ours and _is_whole(folder, record):
            yield folder, record, None
    if run.lr_scheduler.follows_the_end or all(record.settings == ours for _, record in found):
        return
    shorter = digests_with_fewer_epochs(run.params)
    found.sort(key=lambda one: shorter.get(one[1].settings, 0), reverse=True)
    for folder, record in found:
        epochs = shorter.get(record.settings)
        if epochs is None or not _is_whole(folder, record):
            continue
        if saved_states.together({record.name: folder}):
            yield folder, record, epochs


def _is_whole(folder: Path, record: RunJson) -> bool:
    """Is there each checkpoint that was scored, and no link out of the folder?"""
    try:
        name_for_files(record.name, RECORD)
        refuse_links_out(folder)
    except (SettingsError, ForeignFileError):
        return False
    records = RunRecords(folder)
    if (logged := records.run()) is None:
        return False
    known = [number for number in records.known_epochs(logged.uid) if number > 0]
    files = [checkpoint_path(folder, record.name, number) for number in known]
    return (
        known == list(range(1, len(known) + 1)) and bool(files) and all(f.is_file() for f in files)
    )


def _copy(folder: Path, theirs: RunJson, run: Run, new: NewRun, tracker: Tracker) -> None:
    """Files under our run's name, then the log, and last run.json: a kill leaves no half of it."""
    home, name = run.output_dir, theirs.name

    def ours(path: Path) -> Path:
        own = path.name.startswith((f"{name}-", f"{name}_")) and path.suffix in _RENAMED
        return path.with_name(run.name + path.name.removeprefix(name)) if own else path

    files = [*folder.glob("*.safetensors"), *folder.glob("samples/*.png")]
    files += [folder / one for one in _AS_THEY_ARE if (folder / one).is_file()]
    with room_for(f"the checkpoints of {run.name}", home):
        for file in files:
            _link(file, home / ours(file.relative_to(folder)))
    for state in saved_states.together({name: folder}).values():
        at = (run.name, state.snapshot.num_epochs, state.snapshot.num_steps)
        saved_states.write(home, replace(state, run=run.name, pack=(at,)))
    tracker.copy_run(folder, new, ours, trained_as=f"{name} of {_whence(folder, run)}")
    write_record(home, replace(theirs, name=run.name))


def _whence(folder: Path, run: Run) -> str:
    """The sweep of a run's folder; of one that was trained alone itself."""
    alone = folder.parent == run.output_dir.parent.parent
    return sweep_name(folder if alone else folder.parent)


def _link(source: Path, target: Path) -> None:
    """One more name of a file, which nothing writes into; a copy where the disk has no such thing.

    Files are replaced whole, so neither folder changes the other's.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
