"""What a sweep came to: its trials, the best candidate, what pruning saved."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState
from rich.markup import escape
from rich.table import Table

from lorasweep.core.text import listed
from lorasweep.judging.pick_rule import interval_of_mean
from lorasweep.sweeps.study.study import Study
from lorasweep.sweeps.study.trial_attributes import (
    ATTEMPT,
    BEST,
    EPOCHS,
    PLANNED,
    REASON,
    was_pruned,
)

SEED = "seed"  # the parameter
MIN_COMPLETE = 8  # trials; with fewer, what matters can't be told


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial as the table shows it."""

    number: int
    state: str
    best: dict[str, Any] | None
    """Epoch, path and scores of its best candidate."""
    feasible: bool
    epochs: int
    planned: int
    params: dict[str, Any]
    attempts: int
    """How many times it failed and was begun again."""
    reason: str
    """Why it failed last."""
    deleted: bool
    """Its run was deleted in MLflow: it can't be chosen."""


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    """A study's rows, and what follows from them."""

    name: str
    rows: Sequence[TrialRow]
    best: Sequence[TrialRow]
    """The best trial, or with several objectives those that no other beats in all.

    Those that train or failed count too: `pick` chooses among all candidates.
    """
    epochs: int
    planned: int
    """Epochs that the trials which ended well would have trained without pruning."""
    importance: dict[str, float]
    objectives: Sequence[str]
    of_setting: Sequence[TrialRow]
    """The best trial of one objective and those that differ from it in their seed alone."""


def summarise(study: Study, deleted: Collection[int] = ()) -> StudySummary:
    """Sum up what the study knows now; the runs of the trials in `deleted` are gone from MLflow."""
    rows = [replace(_row(trial), deleted=trial.number in deleted) for trial in study.trials]
    ended = [row for row in rows if row.state in ("complete", "pruned")]
    best, of_setting = _best(rows, study)
    return StudySummary(
        name=study.name,
        rows=rows,
        best=best,
        of_setting=of_setting,
        epochs=sum(row.epochs for row in ended),
        planned=sum(max(row.planned, row.epochs) for row in ended),
        importance=_importance(study),
        objectives=study.settings.objectives,
    )


def table(summary: StudySummary) -> Table:
    """The trials in their order; the best in green."""
    names = list(dict.fromkeys(name for row in summary.rows for name in row.params))
    shown = Table(title=f"{summary.name}: {len(summary.rows)} trials", caption_justify="left")
    for header in ("trial", "state", *(_short(name, "/") for name in summary.objectives)):
        shown.add_column(header, justify="left" if header == "state" else "right", no_wrap=True)
    shown.add_column("at", justify="right", no_wrap=True)
    shown.add_column("epochs", justify="right", no_wrap=True)
    for name in names:
        shown.add_column(_short(name, "."), justify="right", overflow="fold")
    for row in summary.rows:
        style = "bold green" if row in summary.best else None
        shown.add_row(*_cells(row, names, summary.objectives), style=style)
    return shown


def lines(summary: StudySummary) -> list[str]:
    """The best, what pruning saved, what failed and what matters, in lines for a person."""
    said = []
    what = "Best" if len(summary.objectives) == 1 else "On the front"
    for row in summary.best:
        assert row.best is not None
        found = row.best["scores"]
        scores = ", ".join(f"{n} {_number(found.get(n), 4)}" for n in summary.objectives)
        breaks = "" if row.feasible else ", though it breaks a constraint"
        path = Path(row.best["path"])
        said.append(
            f"{what}: trial {row.number}, epoch {row.best['epoch']}, {scores}{breaks}: {path}"
        )
    if len(summary.of_setting) > 1:
        said.append(_over_seeds(summary.of_setting, summary.objectives[0]))
    saved = summary.planned - summary.epochs
    if summary.planned:
        share = saved / summary.planned
        said.append(
            f"Trained {summary.epochs} epochs of {summary.planned} planned:"
            f" pruning saved {saved} ({share:.0%})."
        )
    if deleted := [str(row.number) for row in summary.rows if row.deleted]:
        said.append(f"Deleted in MLflow, so not to be chosen: trial {listed(deleted)}.")
    failed = [row for row in summary.rows if row.state == "failed"]
    said += [f"Trial {row.number} failed: {row.reason}" for row in failed]
    repeated = [row for row in summary.rows if row.attempts and row.state != "failed"]
    said += [f"Trial {row.number} was begun again: {row.reason}" for row in repeated]
    if summary.importance:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in summary.importance.items())
        said.append(f"What mattered for {summary.objectives[0]}: {shares}.")
    if not summary.best:
        said.append("No trial has a candidate yet.")
    return said


def _row(trial: FrozenTrial) -> TrialRow:
    attrs = trial.user_attrs
    names = {TrialState.FAIL: "failed"}
    state = "pruned" if was_pruned(trial) else names.get(trial.state, trial.state.name.lower())
    return TrialRow(
        number=trial.number,
        state=state,
        best=attrs.get(BEST),
        feasible=all(excess <= 0 for excess in trial.constraints.values()),
        epochs=int(attrs.get(EPOCHS, 0)),
        planned=int(attrs.get(PLANNED, 0)),
        params=trial.params,
        attempts=int(attrs.get(ATTEMPT, 0)),
        reason=str(attrs.get(REASON, "")),
        deleted=False,
    )


def _over_seeds(rows: Sequence[TrialRow], objective: str) -> str:
    scores = [float(row.best["scores"][objective]) for row in rows if row.best]
    low, high = interval_of_mean(scores)
    return (
        f"Its setting has {objective} {fmean(scores):.4g} [{low:.4g}, {high:.4g}] on average over"
        f" seeds {listed(str(row.params[SEED]) for row in rows)} (trials"
        f" {listed(str(row.number) for row in rows)})."
    )


def _best(rows: Sequence[TrialRow], study: Study) -> tuple[Sequence[TrialRow], Sequence[TrialRow]]:
    """The best trials, and those of the best one's setting.

    Those that keep the constraints go before those that don't. Trials that differ in their seed
    alone are compared with others by their mean.
    """
    known = [row for row in rows if row.best is not None and not row.deleted]
    usable = [row for row in known if row.feasible] or known
    if not study.settings.pareto:
        settings: dict[str, list[TrialRow]] = {}
        for row in usable:
            others = {name: value for name, value in row.params.items() if name != SEED}
            key = repr(sorted(others.items())) if SEED in row.params else str(row.number)
            settings.setdefault(key, []).append(row)
        loss = {row.number: _losses(row, study)[0] for row in usable}
        means = sorted(settings.values(), key=lambda some: fmean(loss[row.number] for row in some))
        best = means[0] if means else []
        return sorted(best, key=lambda row: loss[row.number])[:1], best
    front = [
        row
        for row in usable
        if not any(_beats(_losses(other, study), _losses(row, study)) for other in usable)
    ]
    return front, []


def _losses(row: TrialRow, study: Study) -> list[float]:
    """Its objectives; of all, smaller is better."""
    assert row.best is not None
    pairs = zip(study.settings.signs, study.settings.objectives, strict=True)
    return [sign * row.best["scores"].get(name, math.inf) for sign, name in pairs]


def _beats(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def _importance(study: Study) -> dict[str, float]:
    """How much each parameter matters for the score (PED-ANOVA, Watanabe et al., 2023)."""
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    everywhere = [
        name
        for name in study.space.parameters
        if all(name in trial.params for trial in complete)
        and len({repr(trial.params[name]) for trial in complete}) > 1
    ]
    different = len({repr(trial.values) for trial in complete}) > 1
    if study.settings.pareto or len(complete) < MIN_COMPLETE or not everywhere or not different:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        found = get_param_importances(study.optuna_study, params=everywhere)
    return {name: value for name, value in found.items() if value == value}


def _cells(row: TrialRow, names: Sequence[str], objectives: Sequence[str]) -> list[str]:
    best = row.best or {"scores": {}, "epoch": ""}
    scores = [_number(best["scores"].get(name), 4) for name in objectives]
    planned = f"{row.epochs}/{row.planned}" if row.planned else ""
    params = [_number(row.params.get(name)) for name in names]
    state = "deleted" if row.deleted else row.state
    return [str(row.number), state, *scores, str(best["epoch"]), planned, *params]


def _number(value: object, digits: int = 3) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return "" if value is None else escape(str(value))


def _short(name: str, separator: str) -> str:
    return name.rpartition(separator)[2]
