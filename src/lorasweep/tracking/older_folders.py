"""Folders of runs that an older version broke off: read once, into the records of today.

That version kept each write to MLflow as a file in `.tracking/`: `000012.json` waits, `.refused`
was not taken, and the newest `.done` is the last that MLflow has. Each says under `run` what was
logged up to and with it, and under `operation` what is to be written.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.foreign_files import ForeignFileError, inside, read_json
from lorasweep.core.text import shown
from lorasweep.tracking.ledger import END, RUN, STEPS, Ledger, write_ledger
from lorasweep.tracking.records import (
    CheckpointRecord,
    EpochRecord,
    NewRun,
    RunEnd,
    RunRecord,
    RunRecords,
    StepMetrics,
    hash_of,
)

WAITS, DONE, REFUSED = ".json", ".done", ".refused"


def has_unsent(folder: Path) -> bool:
    """Is there something of the older version in a `.tracking/` that MLflow doesn't have?"""
    return any(path.suffix != DONE for path in _files(folder))


def convert(records: RunRecords) -> None:
    """Turn what the older version left into records and a ledger, and delete it.

    It may be killed at any moment: the run's record is written last, and old files go after it.
    Raises ForeignFileError for files of another shape, or that name a place out of the folder.
    """
    if records.run() is None and (entries := _readable(records.folder)):
        try:
            _convert(records, entries)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ForeignFileError(
                f"{records.folder} is not as an older version left it ({type(error).__name__}:"
                f" {shown(str(error))}); delete it to send nothing of it"
            ) from None
    for path in _files(records.folder):
        path.unlink()


def _convert(records: RunRecords, entries: Sequence[Mapping[str, Any]]) -> None:
    state = entries[-1]["run"]
    kinds = ("open", "epoch", "curves", "file", "tag", "close")
    waiting = [one["operation"] for one in entries if one["waits"]]
    opens, epochs, curves, files, tags, closes = (
        [one for one in waiting if one["kind"] == kind] for kind in kinds
    )
    for operation in epochs:
        _write_epoch(records, state, operation)
    if curves:
        steps = _steps([point for one in curves for point in one["points"]])
        records.write_unfinished(state["uid"], steps)
    about = opens[0] if opens else {"tags": {}, "params": {}, "files": {}, "dataset": {}}
    source = json.loads(about["dataset"].get("source", '{"uri": ""}'))
    new = NewRun(
        name=state["name"],
        sweep=None if state["sweep"] == state["name"] else state["sweep"],
        output_dir=records.output_dir,
        params=about["params"],
        config_yaml=about["files"].get("config.yaml", ""),
        overrides=json.loads(about["files"].get("overrides.yaml", "[]")),
        image_dir=Path(source["uri"]),
        dataset_digest=json.loads(about["dataset"].get("profile", '{"digest": ""}'))["digest"],
        tags=about["tags"],
    )
    end = None if state["is_open"] else RunEnd(time=0, status="KILLED")  # MLflow has its end
    if end is not None and closes:
        keys = ("time", "status", "reason", "suspended")
        end = RunEnd(**{key: closes[-1].get(key) for key in keys})
    artifacts = {one["path"]: one["artifact_dir"] for one in files}
    if manifest := about["files"].get("manifest.json"):
        write_atomically(records.output_dir / "manifest.json", manifest.encode())
        artifacts["manifest.json"] = None
    place = {key: state[key] for key in ("uid", "uri", "experiment")}
    run = RunRecord(
        **place,
        upload=any(one["model"]["upload"] for one in epochs if one["model"]),
        new=new,
        begun=about.get("time", 0),
        opened=0,
        tags={one["key"]: one["value"] for one in tags},
        files=artifacts,
        end=end,
    )
    sent = {f"epoch {number}": "written" for number in state["epochs"]}
    for one in epochs:
        sent.pop(f"epoch {one['epoch']}", None)
    if not any(one["points"] for one in (*epochs, *curves)):
        sent[STEPS] = str(max(state["steps"].values(), default=-1))
    if all(one["goes_on"] for one in opens):
        sent[RUN] = "0" if not opens else "to be opened"
    if end is not None and not closes:
        sent[END] = "0"
    write_ledger(records.output_dir, Ledger(**place, sent=sent))
    records.write_run(run)


def _write_epoch(
    records: RunRecords, state: Mapping[str, Any], operation: Mapping[str, Any]
) -> None:
    number, model = operation["epoch"], operation["model"]
    pictures = {}
    for sample in operation["samples"]:
        key = sample["stem"].partition("+step+")[0].removeprefix("samples~")
        name = f"{state['name']}_e{number:06d}_{key[:2]}.png"
        path = Path("samples") / name
        target = inside(records.output_dir, path)
        if not target.is_file():
            write_atomically(target, base64.urlsafe_b64decode(sample["png"]))
        pictures[key] = path
    checkpoint = None
    if model is not None:
        of = model["checkpoint"]
        path = Path(of["path"])
        checkpoint = CheckpointRecord(
            name=f"{of['run']}-e{of['epoch']:03d}",
            file=path,
            step=of["step"],
            hash=hash_of(records.output_dir / path),
            terms={name: [float(x) for x in of] for name, of in model["terms"].items()},
        )
    record = EpochRecord(
        uid=state["uid"],
        epoch=number,
        time=max((point["time"] for point in operation["scores"]), default=0),
        steps=_steps(operation["points"]),
        scores={point["key"]: float(point["value"]) for point in operation["scores"]},
        pictures=pictures,
        checkpoint=checkpoint,
    )
    records.write_epoch(record)


def _steps(points: Sequence[Mapping[str, Any]]) -> list[StepMetrics]:
    """Points of curves, put together by their steps."""
    found: dict[int, StepMetrics] = {}
    for one in points:
        step = found.setdefault(one["step"], StepMetrics(one["step"], one["time"], {}))
        found[one["step"]] = step._replace(
            metrics={**step.metrics, one["key"]: float(one["value"])}
        )
    return [found[step] for step in sorted(found)]


def _readable(folder: Path) -> list[dict[str, Any]]:
    """The files' contents, in order; damaged ones are left out."""
    found = []
    for path in _files(folder):
        try:
            found.append({**read_json(path), "waits": path.suffix != DONE})
        except ValueError:
            continue
    return found


def _files(folder: Path) -> list[Path]:
    found = (path for suffix in (WAITS, REFUSED, DONE) for path in folder.glob(f"*{suffix}"))
    return sorted(path for path in found if path.stem.isdecimal())
