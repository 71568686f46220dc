"""What `lorasweep pick` shows: the candidates as a table, and what was picked in a few lines."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from lorasweep.core.text import shown
from lorasweep.judging.contact_sheet import FILE_NAME as CONTACT_SHEET
from lorasweep.judging.pick_rule import DRIFT, FEW_IMAGES, TIE_BOUND, Ranked, sign, ties
from lorasweep.runs.pick_checkpoint import Choice, Pick
from lorasweep.runs.picked_readme import seeds_of
from lorasweep.tracking import Candidate
from lorasweep.tracking.mlflow_page import page

if TYPE_CHECKING:
    from rich.table import Table

TABLE_LIMIT = 15


def table(result: Choice, limit: int = TABLE_LIMIT) -> Table:
    """The first `limit` candidates, best first, and the chosen one wherever it stands.

    `≈` marks those that tie with the smallest score.
    """
    from rich.table import Table

    score = _escaped(result.by.rpartition("/")[2])
    by_rule = "picked" if isinstance(result, Pick) else "first by the rule:"
    chosen = "own choice" if result.chosen_by == "person" else by_rule
    title = _escaped(f"{result.winner.sweep}: {chosen} {result.winner.name}")
    found = Table(title=title, caption=_caption(result, limit), caption_justify="left")
    several = any(len(one.checkpoints) > 1 for one in result.ranked)
    for header in ("rank", "run", "epoch", f"{score} [lo, hi]", "gap", "drift"):
        found.add_column(header, justify="left" if header == "run" else "right", overflow="fold")
    if several:
        found.add_column("seeds", overflow="fold")
    by, winner = result.by, result.of_winner
    smallest = min(result.ranked, key=lambda one: sign(by) * one.scores[by], default=None)
    for number, one in enumerate(result.ranked, start=1):
        if number <= limit or one is winner:
            cells = [
                f"≈ {number}" if ties(one, smallest or one, by) else str(number),
                *_cells(result, one, result.winner if one is winner else one.file),
                *([_escaped(seeds_of(one))] if several else []),
            ]
            found.add_row(*cells, style="bold green" if one is winner else None)
    return found


def summary(result: Pick) -> list[str]:
    """What was picked and where it is now, in lines for a person."""
    who = "your own choice" if result.chosen_by == "person" else f"picked by {result.by}"
    sheet = result.folder / CONTACT_SHEET
    of = result.of_winner
    if of is not None and len(of.checkpoints) > 1:
        who += f", seed {result.winner.seed} of {seeds_of(of)}"
    return [
        f"{result.winner.name}, {who}: {result.folder / result.winner.name}.safetensors",
        *_replaced(result),
        f"How to use it: {result.folder / 'README.md'}",
        *([f"Its run's contact sheet: {sheet}"] if sheet.exists() else []),
        f"Look at all of it: lorasweep ui {shlex.quote(result.winner.sweep)}",
    ]


def not_recorded(choice: Choice) -> list[str]:
    """That the sweep's choice is what it was, and how to choose."""
    before = choice.before
    now = f"{before.name}, by {before.chosen_by}" if before else "none yet"
    return [f"Nothing was recorded. The sweep's choice: {now}. To choose: lorasweep pick"]


def _replaced(result: Pick) -> list[str]:
    before = result.before
    if before is None or before.model_id == result.winner.model_id:
        return []
    whose = "a person's choice" if before.chosen_by == "person" else "the rule's choice"
    return [f"It takes the place of {before.name}, {whose}."]


def _caption(result: Choice, limit: int) -> str:
    lines = [
        f"≈ can't be told from the best score, and lies within {TIE_BOUND:.0%} of it; of these, the"
        " least drift wins."
    ]
    if any(len(one.checkpoints) > 1 for one in result.ranked):
        lines.append(
            "Of several seeds: the score is their mean, with its 95 % interval over the seeds; the"
            " run is that of the best one."
        )
    number = len(result.winner.terms.get(result.by, ()))
    if 0 < number < FEW_IMAGES:
        images = "image" if number == 1 else "images"
        lines.append(
            f"{result.by} is a mean over {number} held-out {images} only, so the order is partly"
            f" luck: dataset.num_holdout={FEW_IMAGES} or more tells better."
        )
    if len(result.ranked) > limit:
        lines.append(f"{len(result.ranked) - limit} more are in MLflow (`lorasweep ui`).")
    lines += result.left_out[:limit]
    if len(result.left_out) > limit:
        lines.append(f"{len(result.left_out) - limit} more have no finite {result.by} either.")
    return "\n".join(_escaped(line) for line in lines)


def _cells(result: Choice, one: Ranked[Candidate], file: Candidate) -> list[str]:
    by, scores = result.by, one.scores
    interval = f" [{_short(scores.get(f'{by}_lo'))}, {_short(scores.get(f'{by}_hi'))}]"
    return [
        _link(file.run, page(result.uri, file)),
        _link(str(file.epoch), file.path.as_uri()),
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
