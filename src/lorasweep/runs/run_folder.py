"""A run's folder: one process at a time trains there, and a run that was begun there goes on."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import FileLock, Timeout

from lorasweep.config.settings_digest import digests_with_fewer_epochs, settings_digest
from lorasweep.core.atomic_write import delete_temporaries, write_atomically
from lorasweep.core.foreign_files import (
    ForeignFileError,
    parse_shaped,
    read_bytes,
    refuse_links_out,
)
from lorasweep.core.interrupts import Interrupts
from lorasweep.core.settings import SettingsError
from lorasweep.lora_files.checkpoint import checkpoint_path
from lorasweep.tracking.records import forget_run, read_epoch
from lorasweep.tracking.store import TrackingError
from lorasweep.training import saved_states
from lorasweep.training.training_run import NativeTrainer

if TYPE_CHECKING:
    from lorasweep.config.run import Run
    from lorasweep.judging.metrics.metric import Scores, Terms
    from lorasweep.training.lr_schedulers import LRScheduler

log = logging.getLogger(__name__)

Status = Literal["unfinished", "finished", "failed", "dropped"]

RECORD, SWEEP_RECORD = "run.json", "sweep.json"
LOCK, LOCK_SECONDS = ".lock", 5.0
OLD_SCORES = "scores"  # where an older version kept what checkpoints scored
MULTIRUN = "multirun.yaml"  # Hydra's, in a multirun's folder


class TakenError(SettingsError):
    """Another process works in the folder; it may be on its way out."""


@dataclass(frozen=True, kw_only=True)
class RunJson:
    """What a folder's `run.json` says."""

    name: str
    status: Status
    settings: str
    """Digest of all settings that the result depends on."""
    data: str
    """Digest of the images and captions."""


class RunFolder:
    """The folder of a run that trains now; locked until `release`."""

    def __init__(self, run: Run, data: str) -> None:
        """Take the folder for `run` on `data`, a digest of images and captions.

        A run that was begun there with fewer epochs goes on, also where it had trained them all.
        Raises SettingsError if another process trains there, or if what was begun there can't go
        on with these settings or images; ForeignFileError for a link out of the folder.
        """
        self.path, self._run = run.output_dir, run
        self.had_ended = False
        """Had it trained all epochs that it was begun with, of which there are more now?"""
        refuse_links_out(self.path)
        self._lock = lock(self.path)
        settings = settings_digest(run.params)
        self._record = RunJson(name=run.name, status="unfinished", settings=settings, data=data)
        try:
            self.found = self._found()
        except BaseException:
            self._lock.release()
            raise
        for folder in (self.path, saved_states.folder_of(self.path), self.path / "samples"):
            delete_temporaries(folder)
        if self.found in ("finished", "dropped"):
            _forget_states(run, self.found)  # a kill may have come between the record and it
            return
        if self.found is None:
            saved_states.delete(self.path)
            forget_run(self.path)
            for path in (self.path / OLD_SCORES).glob("*.json"):
                path.unlink()
        self._write("unfinished")

    def _found(self) -> Status | None:
        """This run's state in the folder: unfinished, finished or dropped; None for a new run."""
        ours, found = self._record, read_record(self.path)
        if found is None or found.status == "failed":
            return None
        if replace(found, status=ours.status) == ours:
            return found.status
        begun_with = digests_with_fewer_epochs(self._run.params).get(found.settings)
        if begun_with and replace(found, status=ours.status, settings=ours.settings) == ours:
            if found.status == "dropped":
                return None
            check_longer(self.path, found, self._run.lr_scheduler)
            self.had_ended = found.status == "finished"
            log.info(
                "%s was begun with trainer.max_train_epochs=%d: it goes on to %d",
                *(ours.name, begun_with, self._run.max_train_epochs),
            )
            return "unfinished"
        if found.status != "unfinished":
            return None
        if replace(found, status=ours.status, data=ours.data) == ours:
            raise SettingsError(
                f"{self.path}: the images or captions have changed since {ours.name} was begun;"
                " delete the folder to train anew"
            )
        raise SettingsError(
            f"{self.path} holds a run that was begun with other settings; give another"
            " hydra.run.dir, or delete the folder"
        )

    def end(self, status: Status) -> None:
        """The run has come to its end here; from its last state it may be trained further."""
        self._write(status)
        _forget_states(self._run, status)
        self.release()

    def release(self) -> None:
        """Let others have the folder."""
        self._lock.release()

    def _write(self, status: Status) -> None:
        write_record(self.path, replace(self._record, status=status))


@contextmanager
def stoppable(folder: Path) -> Iterator[Interrupts]:
    """Within, Ctrl-C and SIGTERM stop what works in the folder; it is said how to go on."""
    with Interrupts(signal.SIGINT, signal.SIGTERM) as interrupts:
        try:
            yield interrupts
        except KeyboardInterrupt:
            again = f"lorasweep resume {as_typed(folder)}"
            print(f"lorasweep: stopped. Go on with: {again}", file=sys.stderr)
            raise


def as_typed(folder: Path) -> str:
    """The folder as a person at the prompt would write it."""
    path = folder.absolute()
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Be the only process that works in the folder."""
    held = lock(folder)
    try:
        yield
    finally:
        held.release()


def lock(folder: Path, seconds: float | None = None) -> FileLock:
    """Be the only process that works in the folder. Raises TakenError if another does.

    It is waited for a little (LOCK_SECONDS): a process that was stopped may be on its way out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / LOCK)
    try:
        held.acquire(timeout=LOCK_SECONDS if seconds is None else seconds)
    except Timeout:
        raise TakenError(
            f"{folder}: another process trains here; wait for it, or give another hydra.run.dir"
        ) from None
    return held


def is_free(folder: Path) -> bool:
    """Does no process work in the folder?"""
    try:
        lock(folder, seconds=0).release()
    except TakenError:
        return False
    return True


def delete_if_nothing_began(folder: Path, output_root: Path) -> None:
    """Delete the folder that Hydra made for a command which was refused before any work.

    Nothing goes on in such a folder; one that holds anything else stays. Folders above it that are
    empty then are deleted too, as far as they lie below output_root or below where we are.
    """
    hydras = {".hydra", "lorasweep.log", MULTIRUN, LOCK}
    if not folder.is_dir() or any(path.name not in hydras for path in folder.iterdir()):
        return
    shutil.rmtree(folder)
    tops = (output_root.absolute(), Path.cwd())
    with suppress(OSError):  # one that holds other things stays
        for parent in folder.absolute().parents:
            if any(parent != top and parent.is_relative_to(top) for top in tops):
                parent.rmdir()


@contextmanager
def nothing_left_if_refused(folder: Path, output_root: Path) -> Iterator[None]:
    """Delete a multirun's folder if the command is refused while its settings are checked."""
    try:
        yield
    except (ValueError, OSError, TrackingError):
        delete_if_nothing_began(folder, output_root)
        raise


def write_sweep(folder: Path, settings: str, status: Status) -> None:
    """Note that a multirun was begun in the folder, or has come to its end."""
    content = {"status": status, "settings": settings}
    write_atomically(folder / SWEEP_RECORD, json.dumps(content, indent=1).encode())


def read_record(folder: Path) -> RunJson | None:
    """What was begun in a folder; None where nothing was."""
    path = folder / RECORD
    try:
        found = parse_shaped(read_bytes(path), path, RunJson)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ForeignFileError as error:
        raise SettingsError(f"{error}; delete the folder to train anew") from None
    return RunJson(**{one.name: found[one.name] for one in fields(RunJson)})


def write_record(folder: Path, record: RunJson) -> None:
    """Note what was begun in a folder."""
    write_atomically(folder / RECORD, json.dumps(vars(record), indent=1).encode())


def read_scores(folder: Path, epoch: int) -> tuple[Scores, Terms] | None:
    """What the checkpoint of an epoch of the folder's run scored; None if it hasn't been."""
    record = read_epoch(folder, epoch)
    if record is not None and record.checkpoint is not None:
        return record.scores, record.checkpoint.terms
    path = folder / OLD_SCORES / f"{epoch:06d}.json"
    try:
        found = parse_shaped(read_bytes(path), path, _OldScores)
    except FileNotFoundError:
        return None
    except ForeignFileError as error:
        log.warning("%s; the checkpoint counts as not scored", error)
        return None
    return found["scores"], found["terms"]


@dataclass(frozen=True)
class _OldScores:
    """The shape of a file of OLD_SCORES."""

    scores: dict[str, float]
    terms: dict[str, list[float]]


@dataclass(frozen=True)
class ScoredCheckpoint:
    """A checkpoint that a run left in its folder, and what it scored."""

    epoch: int
    path: Path
    scores: Scores
    terms: Terms


def scored_checkpoints(run: Run) -> Iterator[ScoredCheckpoint]:
    """The checkpoints in the folder of a run that have scores, in their order."""
    for epoch in range(1, run.max_train_epochs + 1):
        known = read_scores(run.output_dir, epoch)
        if known is not None:
            path = checkpoint_path(run.output_dir, run.name, epoch)
            yield ScoredCheckpoint(epoch, path, *known)


def ended(run: Run) -> Status | None:
    """How a run that was trained in its folder ended; None for one that is to be trained.

    States that a kill left of one that has ended are deleted.
    """
    status = status_of(run)
    if status not in ("finished", "failed"):
        return None
    _forget_states(run, status)
    return status


def check_longer(folder: Path, record: RunJson, schedule: LRScheduler) -> None:
    """Raise SettingsError if what was begun in a folder can't go on to more epochs.

    That is so where the learning rate follows the number of steps in all, and where a run that has
    ended left no state.
    """
    if record.status == "failed":
        return  # it begins anew
    if reason := schedule.follows_the_end:
        raise SettingsError(
            f"{folder}: {reason} follows the number of steps in all, so the epochs that"
            f" {record.name} has trained are not the first ones of a longer run; train anew, with"
            " another name or hydra.run.dir"
        )
    if record.status == "finished" and not saved_states.together({record.name: folder}):
        raise SettingsError(
            f"{folder}: {record.name} has ended and left no state to go on from"
            " (trainer.keep_states=0, trainer=sd_scripts, or an older lorasweep); train anew, with"
            " another name or hydra.run.dir"
        )


def _forget_states(run: Run, status: Status) -> None:
    """Delete the states that a run which ended so needs no more; sd-scripts deletes its own."""
    if status == "finished" and isinstance(run.trainer, NativeTrainer):
        saved_states.keep_last(run.output_dir, 1)  # more epochs go on from there
    else:
        saved_states.delete(run.output_dir)


def status_of(run: Run) -> Status | None:
    """What became of this very run in its folder; None where it was never begun there."""
    record = read_record(run.output_dir)
    if record is None or record.settings != settings_digest(run.params):
        return None
    return record.status


def forget_drop(folder: Path) -> None:
    """Let a run that a sweep dropped in the folder be trained again, to its end."""
    record = read_record(folder)
    if record is not None and record.status == "dropped":
        (folder / RECORD).unlink()


def sweep_name(folder: Path) -> str:
    """What the sweep of a folder is called, in MLflow and as a study."""
    return f"{folder.parent.name}-{folder.name}"


def is_unfinished(folder: Path) -> bool:
    """Is there a run in the folder that was begun and hasn't ended?"""
    record = read_record(folder)
    return record is not None and record.status == "unfinished"
