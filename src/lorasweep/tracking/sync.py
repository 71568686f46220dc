"""`lorasweep sync`: publishing what is left in folders, once their processes are gone."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from lorasweep.core.foreign_files import ForeignFileError, refuse_links_out
from lorasweep.core.text import shown
from lorasweep.tracking import older_folders
from lorasweep.tracking.ledger import retry_refused, unsent_items
from lorasweep.tracking.publish_thread import PublishThread
from lorasweep.tracking.records import FOLDER, InUseError, RunRecord, RunRecords
from lorasweep.tracking.store import Tracking, TrackingError

log = logging.getLogger(__name__)

_NO_RUNS = frozenset({"mlartifacts", "datasets", "picked", "samples", "export"})


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What became of one run."""

    run: str
    output_dir: Path
    sent: int
    left: int
    refused: Mapping[str, str]
    """What MLflow did not take, and why."""
    is_busy: bool = False
    """Another process logs or sends this run."""
    left_out: str | None = None
    """Why nothing of it may be sent."""

    @property
    def is_done(self) -> bool:
        """Does MLflow have all of it?"""
        return not (self.left or self.refused or self.is_busy or self.left_out)

    def line(self) -> str:
        """For a person."""
        if self.is_busy:
            return f"{self.run}: in use by another process, which sends it ({self.output_dir})"
        if self.left_out is not None:
            return f"{self.run}: left out: {self.left_out}"
        parts = [f"{self.sent} writes sent"]
        parts += [f"{self.left} wait"] if self.left else []
        if self.refused:
            item, reason = next(iter(self.refused.items()))
            parts.append(f"{len(self.refused)} refused, first {item} ({reason})")
        return f"{self.run}: {', '.join(parts)}"


def unsent(root: Path) -> list[Path]:
    """Output folders below `root` with something that MLflow doesn't have, sorted."""
    return sorted(folder for folder in _folders(root) if _has_unsent(RunRecords(folder)))


def sync(
    settings: Tracking, output_root: Path, only: str | None = None, *, uri_is_given: bool = False
) -> list[Synced]:
    """Publish all that waits below `output_root`, or of one run or folder; what became of each.

    Runs go to the store of the settings. A folder may be a stranger's: one that was logged
    elsewhere is sent only if `uri_is_given`, and one with a link out of it not at all. Raises
    TrackingError for a store that can't be opened and for a name or folder without a run.
    """
    chosen, results = _chosen(output_root, only)
    by_experiment: dict[Tracking, list[RunRecords]] = {}
    for records in chosen:
        try:
            place = _place(settings, records.run(), uri_is_given)
        except ValueError as error:
            results.append(_left_out(records, error))
        else:
            by_experiment.setdefault(place, []).append(records)
    for place, group in by_experiment.items():
        results += _publish_all(place, output_root, group)
    return sorted(results, key=lambda one: one.output_dir)


def publish_left(settings: Tracking, output_root: Path, folders: Sequence[Path]) -> None:
    """Publish what runs that ended before have left, because their process was killed, say."""
    left = [records for records in map(RunRecords, folders) if _has_unsent(records)]
    if not left or settings.offline:
        return
    try:
        _publish_all(settings, output_root, left)
    except TrackingError as error:
        log.warning("%s; `lorasweep sync` sends later what MLflow lacks", error)


def _publish_all(
    settings: Tracking, output_root: Path, chosen: Sequence[RunRecords]
) -> list[Synced]:
    thread = PublishThread(replace(settings, offline=False), output_root)
    waiting: dict[Path, int] = {}
    try:
        thread.ready()
        for records in chosen:
            with suppress(InUseError):
                with records.held(seconds=0):
                    waiting[records.output_dir] = retry_refused(
                        records, settings.public_uri, settings.experiment
                    )
                thread.publish(records)
        thread.close()
    finally:
        thread.abandon()
    return [_result(records, waiting.get(records.output_dir)) for records in chosen]


def _result(records: RunRecords, before: int | None) -> Synced:
    run = records.run()
    left, refused = unsent_items(records)
    after = len(left) + len(refused)
    return Synced(
        run=run.new.name if run else records.output_dir.name,
        output_dir=records.output_dir,
        sent=0 if before is None else max(0, before - after),
        left=len(left),
        refused=refused,
        is_busy=before is None,
    )


def _left_out(records: RunRecords, why: ValueError) -> Synced:
    run = records.run()
    return Synced(
        run=shown(run.new.name if run else records.output_dir.name),
        output_dir=records.output_dir,
        sent=0,
        left=0,
        refused={},
        left_out=shown(str(why), 500),
    )


def _chosen(output_root: Path, only: str | None) -> tuple[list[RunRecords], list[Synced]]:
    """What is to be sent, once what an older version left is read; and what is left out."""
    root = Path(only).resolve() if only is not None and Path(only).is_dir() else None
    found: list[RunRecords] = []
    left_out: list[Synced] = []
    for records in map(RunRecords, _folders(root or output_root)):
        try:
            refuse_links_out(records.output_dir)  # before anything is written there
            _convert_old(records)
            found.append(records)
        except ForeignFileError as error:
            left_out.append(_left_out(records, error))
    if root is not None and not found and not left_out:
        raise TrackingError(f"{root} is no run's folder, and holds none")
    if only is not None and root is None:
        found = [one for one in found if (run := one.run()) is not None and run.new.name == only]
        if not found:
            raise TrackingError(
                f"{only}: there is no such folder, and no such run in {output_root}"
            )
        left_out = []
    return [one for one in found if _has_unsent(one)], left_out


def _convert_old(records: RunRecords) -> None:
    """Read what an older version left; a folder in use is another's to read."""
    if older_folders.has_unsent(records.folder):
        with suppress(InUseError), records.held(seconds=0):
            older_folders.convert(records)


def _place(settings: Tracking, run: RunRecord | None, uri_is_given: bool) -> Tracking:
    """Where a run goes. Raises ValueError if its record names what the settings don't."""
    if run is None:
        return settings
    if not uri_is_given and run.uri not in (None, settings.public_uri):
        password = ", with its password" if "***" in run.uri else ""
        raise ValueError(
            f"it was logged to {run.uri}, which is not tracking.uri here; if it may be sent there,"
            f" give tracking.uri={run.uri}{password}"
        )
    uri = settings.uri if uri_is_given or run.uri is not None else None
    return replace(settings, uri=uri, experiment=run.experiment)


def _has_unsent(records: RunRecords) -> bool:
    run = records.run()
    if run is None:
        return older_folders.has_unsent(records.folder)
    return any(unsent_items(records))


def _folders(root: Path) -> Iterator[Path]:
    """Output folders that hold a run's records."""
    for place, folders, _ in os.walk(root):
        if FOLDER in folders:
            yield Path(place)
        folders[:] = [one for one in folders if one not in _NO_RUNS and not one.startswith(".")]
