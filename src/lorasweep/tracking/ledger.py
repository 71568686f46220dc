"""The ledger of a run's folder: what MLflow has of its records, and what it refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorasweep.tracking.records import (
    FOLDER,
    LEDGER,
    JsonRecord,
    RunEnd,
    RunRecord,
    RunRecords,
    read_or_none,
    write,
)

RUN, END, STEPS = "run", "end", "steps"
"""Items that a run has once; the others are `epoch 3`, `file captions.json`, `tag kept`."""


@dataclass(frozen=True, kw_only=True)
class Ledger(JsonRecord):
    """What a store has of a run; written after each item that it took or refused."""

    uid: str
    uri: str | None
    """Of the store, without secrets; None is the file under output_root."""
    experiment: str
    begun: bool = False
    epochs: frozenset[int] = frozenset()
    last_step: int = -1
    files: Mapping[str, str] = field(default_factory=dict)
    """The state in which a file was sent, see `file_state`."""
    tags: Mapping[str, str] = field(default_factory=dict)
    end: RunEnd | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    """Items that MLflow did not take, and why. They are tried again by `lorasweep sync`."""


def read_ledger(output_dir: Path, run: RunRecord) -> Ledger:
    """The folder's ledger; an empty one if it is of another run, or damaged."""
    found = read_or_none(output_dir / FOLDER / LEDGER, Ledger)
    if found is None or found.uid != run.uid:
        return Ledger(uid=run.uid, uri=run.uri, experiment=run.experiment)
    return found


def write_ledger(output_dir: Path, ledger: Ledger) -> None:
    """Write the ledger whole."""
    write(output_dir / FOLDER / LEDGER, ledger)


def missing(records: RunRecords, run: RunRecord, ledger: Ledger) -> list[str]:
    """The items that the store lacks, in the order in which they are sent; refused ones too."""
    reopens = run.end is None and ledger.end is not None
    items = [RUN] if reopens or not ledger.begun else []
    items += [f"epoch {number}" for number in records.epochs() if number not in ledger.epochs]
    steps = records.unfinished(run.uid)
    items += [STEPS] if steps and steps[-1].step > ledger.last_step else []
    for path in run.files:
        state = file_state(records.output_dir / path)
        if path not in ledger.files or state not in (None, ledger.files[path]):
            items.append(f"file {path}")
    if ledger.begun:  # before, they go along with the run
        items += [f"tag {key}" for key, value in run.tags.items() if ledger.tags.get(key) != value]
    items += [END] if run.end is not None and run.end != ledger.end else []
    return items


def file_state(path: Path) -> str | None:
    """Tells whether a file was changed since; None if it is gone."""
    if not path.is_file():
        return None
    state = path.stat()
    return f"{state.st_size} bytes, {state.st_mtime_ns} ns"
