"""Sending what is left in spools: `lorasweep sync`, and the runs beside one that starts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorasweep.tracking.connect import writer_for
from lorasweep.tracking.operations import RunState
from lorasweep.tracking.spool import FOLDER, WAITS, Spool
from lorasweep.tracking.store import Tracking, TrackingError, public_uri

_NO_RUNS = frozenset({"mlartifacts", "datasets", "picked", "samples", "export"})


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What became of one run's spool."""

    run: str
    output_dir: Path
    sent: int
    left: int
    refused: Sequence[Path]
    is_busy: bool = False
    """Another process logs or sends this run."""

    def line(self) -> str:
        """For a person."""
        if self.is_busy:
            return f"{self.run}: in use by another process, which sends it ({self.output_dir})"
        parts = [f"{self.sent} writes sent"]
        parts += [f"{self.left} wait"] if self.left else []
        parts += [f"{len(self.refused)} refused, kept in {self.refused[0]}"] if self.refused else []
        return f"{self.run}: {', '.join(parts)}"


def unsent(root: Path) -> list[Path]:
    """Output folders below `root` with something that MLflow doesn't have, sorted."""
    return sorted(folder for folder in _folders(root) if _has_unsent(Spool(folder)))


def sync(
    settings: Tracking, output_root: Path, only: str | None = None, *, uri_is_given: bool = False
) -> list[Synced]:
    """Send all that waits below `output_root`, or of one run or folder; what became of each.

    A run goes to the store that it was begun for, unless `uri_is_given`. Raises TrackingError for
    a store that can't be opened and for a name that nothing has.
    """
    spools = _chosen(output_root, only)
    results = []
    for place, group in _by_store(spools, settings, uri_is_given).items():
        results += _send(place, output_root, group)
    return results


def was_reached(run: RunState, output_dir: Path) -> bool:
    """Did the store take anything of this run, or of others of its sweep, before?"""
    folders = output_dir.parent.glob(f"*/{FOLDER}")
    return any(_is_of_sweep(spool, run) and spool.has_done() for spool in _spools(folders))


def left_by_ended(run: RunState, output_dir: Path) -> list[Spool]:
    """Spools with what is left of runs of the same sweep and store that have ended."""
    files = output_dir.parent.glob(f"*/{FOLDER}/*{WAITS}")
    found = _spools(file.parent for file in files)
    return [spool for spool in found if _is_of_sweep(spool, run, ended=True)]


def _spools(folders: Iterable[Path]) -> Iterator[Spool]:
    """The spools in those `.tracking/`, each once, sorted; a sweep's lie side by side."""
    return (Spool(folder.parent) for folder in sorted(set(folders)))


def _is_of_sweep(spool: Spool, run: RunState, *, ended: bool = False) -> bool:
    state = spool.state()
    if state is None or (ended and state.is_open):
        return False
    place = (run.sweep, run.uri, run.experiment)
    return (state.sweep, state.uri, state.experiment) == place


def _send(settings: Tracking, output_root: Path, spools: Sequence[Spool]) -> list[Synced]:
    writer = writer_for(replace(settings, offline=False), output_root)
    held: dict[Spool, int] = {}
    try:
        writer.ready()
        for spool in spools:
            if not spool.can_be_acquired():
                continue
            spool.retry_refused()
            held[spool] = len(spool.waiting())
            writer.replay(spool)
        writer.close()
        return [_result(spool, held.get(spool)) for spool in spools]
    finally:
        writer.abandon()
        for spool in held:
            spool.release()


def _result(spool: Spool, before: int | None) -> Synced:
    state = spool.state()
    left, refused = len(spool.waiting()), spool.refused()
    return Synced(
        run=state.name if state else spool.output_dir.name,
        output_dir=spool.output_dir,
        sent=0 if before is None else before - left - len(refused),
        left=left,
        refused=refused,
        is_busy=before is None,
    )


def _chosen(output_root: Path, only: str | None) -> list[Spool]:
    if only is None:
        return [Spool(folder) for folder in unsent(output_root)]
    if Path(only).is_dir():
        return [Spool(folder) for folder in unsent(Path(only).resolve())]
    known = [Spool(folder) for folder in _folders(output_root)]
    named = [spool for spool in known if (state := spool.state()) and state.name == only]
    if not named:
        raise TrackingError(f"{only}: there is no such folder, and no such run in {output_root}")
    return [spool for spool in named if _has_unsent(spool)]


def _by_store(
    spools: Sequence[Spool], settings: Tracking, uri_is_given: bool
) -> dict[Tracking, list[Spool]]:
    """The spools by where they go; a store's password is known from the settings only."""
    found: dict[Tracking, list[Spool]] = {}
    for spool in spools:
        state = spool.state()
        place = settings if state is None else _place(settings, state, spool, uri_is_given)
        found.setdefault(place, []).append(spool)
    return found


def _place(settings: Tracking, state: RunState, spool: Spool, uri_is_given: bool) -> Tracking:
    ours = None if settings.uri is None else public_uri(settings.uri)
    uri = settings.uri if uri_is_given or state.uri == ours else state.uri
    if uri is not None and uri != settings.uri and "***" in uri:
        raise TrackingError(
            f"{spool.output_dir} is logged to {uri}, whose password is kept nowhere: give "
            "tracking.uri=… to send it"
        )
    return replace(settings, uri=uri, experiment=state.experiment)


def _has_unsent(spool: Spool) -> bool:
    return bool(spool.waiting() or spool.refused())


def _folders(root: Path) -> Iterator[Path]:
    """Output folders with a spool."""
    for place, folders, _ in os.walk(root):
        if FOLDER in folders:
            yield Path(place)
        folders[:] = [one for one in folders if one not in _NO_RUNS and not one.startswith(".")]
