"""`lorasweep sync`: publishing what is left in folders, once their processes are gone."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from lorasweep.tracking import older_folders
from lorasweep.tracking.ledger import missing, read_ledger, unsent_items, write_ledger
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

    def line(self) -> str:
        """For a person."""
        if self.is_busy:
            return f"{self.run}: in use by another process, which sends it ({self.output_dir})"
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

    A run goes to the store that it was begun for, unless `uri_is_given`. Raises TrackingError for
    a store that can't be opened and for a name that nothing has.
    """
    results = []
    chosen = _chosen(output_root, only)
    for place, group in _by_store(chosen, settings, uri_is_given).items():
        results += _publish_all(place, output_root, group)
    return results


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
                    waiting[records.output_dir] = _retry_refused(records, settings)
                thread.publish(records)
        thread.close()
    finally:
        thread.abandon()
    return [_result(records, waiting.get(records.output_dir)) for records in chosen]


def _retry_refused(records: RunRecords, settings: Tracking) -> int:
    """Let what was refused be sent again; how many items wait for this store."""
    run = records.run()
    if run is None:
        return 0
    known = read_ledger(records.output_dir, run)
    ledger = replace(known.of_store(settings.public_uri, settings.experiment), refused={})
    write_ledger(records.output_dir, ledger)
    return len(missing(records, run, ledger))


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


def _chosen(output_root: Path, only: str | None) -> list[RunRecords]:
    """What is to be sent, once what an older version left is read."""
    root = Path(only).resolve() if only is not None and Path(only).is_dir() else None
    found = [RunRecords(folder) for folder in _folders(root or output_root)]
    for records in found:
        _convert_old(records)
    if only is not None and root is None:
        found = [one for one in found if (run := one.run()) is not None and run.new.name == only]
        if not found:
            raise TrackingError(
                f"{only}: there is no such folder, and no such run in {output_root}"
            )
    return sorted((one for one in found if _has_unsent(one)), key=lambda one: one.output_dir)


def _convert_old(records: RunRecords) -> None:
    """Read what an older version left; a folder in use is another's to read."""
    if older_folders.has_unsent(records.folder):
        with suppress(InUseError), records.held(seconds=0):
            older_folders.convert(records)


def _by_store(
    chosen: Sequence[RunRecords], settings: Tracking, uri_is_given: bool
) -> dict[Tracking, list[RunRecords]]:
    """The runs by where they go; a store's password is known from the settings only."""
    found: dict[Tracking, list[RunRecords]] = {}
    for records in chosen:
        run = records.run()
        place = settings if run is None else _place(settings, run, records, uri_is_given)
        found.setdefault(place, []).append(records)
    return found


def _place(settings: Tracking, run: RunRecord, records: RunRecords, uri_is_given: bool) -> Tracking:
    uri = settings.uri if uri_is_given or run.uri == settings.public_uri else run.uri
    if uri is not None and uri != settings.uri and "***" in uri:
        raise TrackingError(
            f"{records.output_dir} is logged to {uri}, whose password is kept nowhere: give "
            "tracking.uri=… to send it"
        )
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
