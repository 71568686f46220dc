"""`lorasweep reproduce`, top to bottom."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lorasweep.reproduce import comparison_table, foreign_file, reproduce_run
from lorasweep.reproduce.original_run import Original, find
from lorasweep.reproduce.reproduce_run import Options, ReproduceError
from lorasweep.tracking import TrackingError
from lorasweep.tracking.history import Log


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for on the command line."""

    word: str
    """A run's name or id, or a LoRA file."""
    uri: str
    experiment: str
    options: Options
    strict: bool = False
    """Stop at a difference."""
    as_config: Path | None = None
    """Only write a config folder there."""


def execute(request: Request, console: Console) -> int:
    """Make the run again, or write its config; 0 unless the verdict is `different` (1)."""
    original = _find(request)
    if original is None:
        return _of_stranger(request, console)
    name = original.run.name
    console.print(f"{name} of {original.run.sweep}, MLflow run {original.run.run_id}", markup=False)
    if request.as_config is not None:
        file, notes = reproduce_run.write_config(original, request.options, request.as_config)
        _say_config(console, file, notes, request.as_config)
        return 0
    plan = reproduce_run.prepare(original, request.options)
    for note in plan.notes:
        console.print(note, markup=False, soft_wrap=True)
    if plan.differences:
        console.print(comparison_table.differences(plan.differences))
    else:
        console.print("Everything is as it was.")
    if plan.differences and request.strict:
        shutil.rmtree(plan.home)
        raise ReproduceError(
            f"--strict: {len(plan.differences)} differences, and nothing was trained"
        )
    reproduce_run.train(plan)
    new, result = reproduce_run.judge(plan)
    console.print(f"MLflow run {new.run_id} ({new.name})", markup=False)
    if plan.is_variation:
        console.print(comparison_table.scores_beside(original.log, original.run, new))
        return 0
    console.print(comparison_table.verdict(result, f"{name}, made again: {result.verdict}"))
    return 1 if result.verdict == "different" else 0


def _find(request: Request) -> Original | None:
    try:
        log = Log(request.uri, request.experiment)
    except TrackingError:
        if Path(request.word).is_file():
            return None  # a file of someone else's, and nothing of ours
        raise
    return find(request.word, log)


def _of_stranger(request: Request, console: Console) -> int:
    """The nearest config of a file that no run here has made."""
    path = Path(request.word)
    folder = request.as_config or Path(f"{path.stem}-config")
    guess = foreign_file.guess(path)
    file = guess.write(folder, request.options.overrides)
    console.print(f"No run in this log has made {path}; by what the file says:", markup=False)
    console.print(foreign_file.table(guess))
    _say_config(console, file, [], folder, request.options.places or ["dataset.image_dir=FOLDER"])
    return 0


def _say_config(
    console: Console, file: Path, notes: list[str], folder: Path, further: Sequence[str] = ()
) -> None:
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    words = ["--config-dir", str(folder), f"experiment={file.stem}", *further]
    console.print(
        f"Written: {file}\nTrain it: lorasweep train {shlex.join(words)}",
        markup=False,
        soft_wrap=True,
    )
