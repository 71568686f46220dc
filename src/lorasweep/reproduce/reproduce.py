"""A logged run made again, top to bottom, and all that `lorasweep reproduce` prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lorasweep.reproduce import foreign_lora, reproduce_run
from lorasweep.reproduce.compare import ROUNDING, Comparison
from lorasweep.reproduce.experiment_file import write_experiment
from lorasweep.reproduce.original_run import ReproduceError, find_original
from lorasweep.reproduce.printed import say, say_config, table
from lorasweep.reproduce.reproduce_run import Options
from lorasweep.tracking import TrackingError
from lorasweep.tracking.history import Log, LoggedRun

if TYPE_CHECKING:
    from rich.table import Table


def execute(word: str, uri: str, experiment: str, options: Options, console: Console) -> int:
    """Make the run of a word again, or write its config; 0 unless the verdict is `different` (1).

    `word` is a run's name or MLflow id, or a LoRA file; `uri` and `experiment` say where it is
    logged.
    """
    try:
        original = find_original(word, Log(uri, experiment))
    except TrackingError:
        if not Path(word).exists() or Path(word).is_dir():
            raise
        original = None  # nothing is logged here, so the file was made elsewhere
    if original is None:
        return _reproduce_foreign(Path(word), options, console)
    name = original.run.name
    say(console, [f"{name} of {original.run.sweep}, MLflow run {original.run.run_id}"])
    if options.as_config is not None:
        file, notes = reproduce_run.write_config(original, options, options.as_config)
        say(console, notes)
        say_config(console, file, options.as_config)
        return 0
    plan = reproduce_run.prepare(original, options)
    say(console, plan.notes)
    if plan.differences:
        rows = ((one.what, one.then, one.now) for one in plan.differences)
        console.print(table("Not as it was", ("what", "then", "now"), rows))
    else:
        console.print("Everything is as it was.")
    if plan.differences and options.strict:
        reproduce_run.discard(plan.home)
        raise ReproduceError(
            f"--strict: {len(plan.differences)} differences, and nothing was trained"
        )
    reproduce_run.train(plan)
    new, result = reproduce_run.judge(plan)
    say(console, [f"MLflow run {new.run_id} ({new.name})"])
    if plan.is_variation:
        console.print(_scores_beside(original.log, original.run, new))
        return 0
    console.print(_verdict(result, f"{name}, made again: {result.verdict}"))
    return 1 if result.verdict == "different" else 0


def _reproduce_foreign(path: Path, options: Options, console: Console) -> int:
    """The nearest config of a LoRA file that no run here has made."""
    folder = options.as_config or Path(f"{path.stem}-config")
    found = foreign_lora.read_settings(path)
    comment = f"The nearest config of {path.name}, by what the file says"
    file = write_experiment(found, folder, comment, options.overrides, replace=True)
    taken = ((*row.what.partition("=")[::2], row.said) for row in found.taken)
    say(console, [f"No run in this log has made {path}; by what the file says:"])
    console.print(table(found.name, ("setting", "value", "from the file"), taken))
    unknown = "; ".join(f"{what} ({instead})" for what, instead in found.unknown)
    say(console, [f"Not known: {unknown}", *found.notes])
    say_config(console, file, folder, options.places or ["dataset.image_dir=FOLDER"])
    return 0


def _verdict(result: Comparison, title: str) -> Table:
    """What was compared, and the verdict of all."""
    rows = ((row.what, row.verdict, row.detail) for row in result.rows)
    made = table(title, ("what", "verdict", "how far"), rows)
    made.caption = f"within rounding: at most {ROUNDING:g} relative; pictures: 2 of 255"
    return made


def _scores_beside(log: Log, old: LoggedRun, new: LoggedRun) -> Table:
    """The scores of a variation beside its parent's, after their last common epoch."""
    rows = []
    for key in log.metrics(old):
        then, now = log.curve(old, key), log.curve(new, key)
        both = set(then) & set(now)
        if both and key.startswith("val/") and not key.endswith(("_lo", "_hi")):
            last = max(both)
            rows.append((key, str(last), f"{then[last]:.4f}", f"{now[last]:.4f}"))
    columns = ("score", "epoch", old.name, new.name)
    return table(f"{new.name} beside {old.name}", columns, rows)
