"""The ledger of a run's folder: which items of its records MLflow has, and which it refused.

Items are named by what they are: `run`, `settings` (if they changed on the way), `epoch 3`, `steps`
(of the unfinished epoch), `file captions.json`, `tag lorasweep.pruned`, `end`. Each has a state,
which changes when there is more of it to send.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorasweep.tracking.records import (
    FOLDER,
    LEDGER,
    JsonRecord,
    RunRecord,
    RunRecords,
    read_or_none,
    write,
)

RUN, SETTINGS, STEPS, END = "run", "settings", "steps", "end"
GONE = "gone"  # the state of a file that isn't there


@dataclass(frozen=True, kw_only=True)
class Ledger(JsonRecord):
    """What a store has of a run; written after each item that it took or refused."""

    uid: str
    uri: str | None
    """Of the store, without secrets; None is the file under output_root."""
    experiment: str
    sent: Mapping[str, str] = field(default_factory=dict)
    """Items that the store has, by the state in which they were sent."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Items that it did not take, and why; `lorasweep sync` tries them again."""

    def of_store(self, uri: str | None, experiment: str) -> Ledger:
        """This one if it is of that store; else an empty one."""
        if (self.uri, self.experiment) == (uri, experiment):
            return self
        return Ledger(uid=self.uid, uri=uri, experiment=experiment)


def read_ledger(output_dir: Path, run: RunRecord) -> Ledger:
    """The folder's ledger; an empty one if it is of another run, or damaged."""
    found = read_or_none(output_dir / FOLDER / LEDGER, Ledger)
    if found is None or found.uid != run.uid:
        return Ledger(uid=run.uid, uri=run.uri, experiment=run.experiment)
    return found


def write_ledger(output_dir: Path, ledger: Ledger) -> None:
    """Write the ledger whole."""
    write(output_dir / FOLDER / LEDGER, ledger)


def missing(records: RunRecords, run: RunRecord, ledger: Ledger) -> dict[str, str]:
    """The items that the store lacks, refused ones too, with their states, in their order."""
    items = {RUN: str(run.opened)}
    if run.changed is not None:
        items[SETTINGS] = str(run.changed)
    items |= {f"epoch {number}": "written" for number in records.epochs()}
    if steps := records.unfinished(run.uid):
        items[STEPS] = str(steps[-1].step)
    items |= {f"file {path}": _state(records.output_dir / path) for path in run.files}
    items |= {f"tag {key}": value for key, value in run.tags.items()}
    if run.end is not None:
        items[END] = str(run.end.time)
    return {
        item: state
        for item, state in items.items()
        if ledger.sent.get(item) != state and not (state == GONE and item in ledger.sent)
    }


def unsent_items(records: RunRecords) -> tuple[list[str], dict[str, str]]:
    """The items that wait to be sent, and those that were refused, with the reasons."""
    run = records.run()
    if run is None:
        return [], {}
    ledger = read_ledger(records.output_dir, run)
    left = missing(records, run, ledger)
    refused = {i: why for i, why in ledger.refused.items() if i in left or i == RUN}
    return [item for item in left if item not in refused], refused


def retry_refused(records: RunRecords, uri: str | None, experiment: str) -> int:
    """Let what a store refused be sent again: a full disk may have room. How many items wait."""
    run = records.run()
    if run is None:
        return 0
    ledger = read_ledger(records.output_dir, run).of_store(uri, experiment)
    write_ledger(records.output_dir, replace(ledger, refused={}))
    return len(missing(records, run, ledger))


def _state(path: Path) -> str:
    if not path.is_file():
        return GONE
    state = path.stat()
    return f"{state.st_size} bytes, {state.st_mtime_ns} ns"
