"""What `lorasweep pick` shows: the candidates as a table, and what was picked in a few lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasweep.core.text import shown
from lorasweep.judging.contact_sheet import FILE_NAME as CONTACT_SHEET
from lorasweep.judging.pick_rule import DRIFT, sign, ties
from lorasweep.runs.pick_checkpoint import Pick
from lorasweep.tracking import Candidate
from lorasweep.tracking.mlflow_page import page

if TYPE_CHECKING:
    from rich.table import Table

TABLE_LIMIT = 15


def table(result: Pick, limit: int = TABLE_LIMIT) -> Table:
    """The first `limit` candidates, best first, and the chosen one wherever it stands.

    `≈` marks those that tie with the smallest score.
    """
    from rich.table import Table

    score = _escaped(result.by.rpartition("/")[2])
    chosen = "own choice" if result.chosen_by == "person" else "picked"
    title = _escaped(f"{result.winner.sweep}: {chosen} {result.winner.name}")
    found = Table(title=title, caption=_caption(result, limit), caption_justify="left")
    for header in ("rank", "run", "epoch", f"{score} [lo, hi]", "gap", "drift"):
        found.add_column(header, justify="left" if header == "run" else "right", overflow="fold")
    by = result.by
    smallest = min(result.ranked, key=lambda one: sign(by) * one.scores[by], default=None)
    for number, candidate in enumerate(result.ranked, start=1):
        is_winner = candidate.model_id == result.winner.model_id
        if number <= limit or is_winner:
            cells = _cells(result, number, candidate, smallest or candidate)
            found.add_row(*cells, style="bold green" if is_winner else None)
    return found


def summary(result: Pick) -> list[str]:
    """What was picked and where it is now, in lines for a person."""
    who = "your own choice" if result.chosen_by == "person" else f"picked by {result.by}"
    sheet = result.folder / CONTACT_SHEET
    return [
        f"{result.winner.name}, {who}: {result.folder / result.winner.name}.safetensors",
        f"How to use it: {result.folder / 'README.md'}",
        *([f"Its run's contact sheet: {sheet}"] if sheet.exists() else []),
        "Look at everything: lorasweep ui",
    ]


def _caption(result: Pick, limit: int) -> str:
    lines = ["≈ can't be told from the smallest score; of these, the least drift wins."]
    if len(result.ranked) > limit:
        lines.append(f"{len(result.ranked) - limit} more are in MLflow (`lorasweep ui`).")
    lines += result.left_out[:limit]
    if len(result.left_out) > limit:
        lines.append(f"{len(result.left_out) - limit} more have no finite {result.by} either.")
    return "\n".join(_escaped(line) for line in lines)


def _cells(result: Pick, number: int, candidate: Candidate, smallest: Candidate) -> list[str]:
    by, scores = result.by, candidate.scores
    interval = f" [{_short(scores.get(f'{by}_lo'))}, {_short(scores.get(f'{by}_hi'))}]"
    return [
        f"≈ {number}" if ties(candidate, smallest, by) else str(number),
        _link(candidate.run, page(result.uri, candidate)),
        _link(str(candidate.epoch), candidate.path.as_uri()),
        _short(scores[by]) + _escaped(interval if f"{by}_hi" in scores else ""),
        _short(scores.get("val/gap")),
        _short(scores.get(DRIFT), "#.3g"),
    ]


def _short(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form)


def _link(text: str, address: str) -> str:
    return f"[link={address}]{_escaped(text)}[/link]"


def _escaped(text: str) -> str:
    """A text of the store's, without control characters, which a terminal would obey."""
    from rich.markup import escape

    return escape(shown(text, 300))
