"""What `lorasweep pick` shows: the candidates as a table, and what was picked in a few lines."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorasweep.core.text import shown
from lorasweep.judging.contact_sheet import FILE_NAME as CONTACT_SHEET
from lorasweep.judging.pick_rule import DRIFT, FEW_IMAGES, GAIN, LOSS, SCORE, Ranked, ties
from lorasweep.runs.pick_checkpoint import Choice, Pick
from lorasweep.runs.pick_pictures import FILE_NAME as COMPARISON
from lorasweep.runs.picked_readme import seeds_of
from lorasweep.tracking import Candidate
from lorasweep.tracking.mlflow_page import page
from lorasweep.tracking.read_candidates import differing_settings

if TYPE_CHECKING:
    from rich.table import Table

TABLE_LIMIT = 15
MAX_SETTINGS = 4
LIMITS = r"\[lo, hi]"
PARTS = {"loss": LOSS, "gain": GAIN, "drift": DRIFT}
OTHER_COLUMNS = {"gap": "val/gap", "drift": DRIFT}


def table(result: Choice, limit: int = TABLE_LIMIT) -> Table:
    """The first `limit` candidates, best first, and the chosen one wherever it stands.

    `≈` marks those that can't be told from the best score.
    """
    from rich.table import Table

    several = any(len(one.checkpoints) > 1 for one in result.ranked)
    score = _escaped(result.by.rpartition("/")[2]) + (f" {LIMITS}" if several else "")
    by_rule = "picked" if isinstance(result, Pick) else "first by the rule:"
    chosen = "own choice" if result.chosen_by == "person" else by_rule
    title = _escaped(f"{result.winner.sweep}: {chosen} {result.winner.name}")
    found = Table(
        title=title, caption=_caption(result, limit), caption_justify="left", pad_edge=False
    )
    by, winner = result.by, result.of_winner
    parts = PARTS if by == SCORE else OTHER_COLUMNS
    settings = differing_settings(result.uri, [one.file for one in result.ranked])
    keys = list(next(iter(settings.values()), {}))[:MAX_SETTINGS]
    headers = "#", "run", *_short_names(keys), "epoch", score, *parts
    for header in headers:
        found.add_column(header, justify="left" if header == "run" else "right", overflow="fold")
    if several:
        found.add_column("seeds", overflow="fold")
    for number, one in enumerate(result.ranked, start=1):
        if number <= limit or one is winner:
            file = result.winner if one is winner else one.file
            own = settings.get(file.run_id, {})
            is_tied = number > 1 and ties(one, result.ranked[0], by)
            cells = [
                f"≈ {number}" if is_tied else str(number),
                *_cells(result, one, file, [own.get(key, "") for key in keys]),
                *(_short(one.scores.get(name), "#.3g") for name in parts.values()),
                *([_escaped(seeds_of(one))] if several else []),
            ]
            found.add_row(*cells, style="bold green" if one is winner else None)
    return found


def summary(result: Pick) -> list[str]:
    """What was picked and where it is now, in lines for a person."""
    who = "your own choice" if result.chosen_by == "person" else f"picked by {result.by}"
    sheet, pictures = result.folder / CONTACT_SHEET, result.folder / COMPARISON
    of = result.of_winner
    if of is not None and len(of.checkpoints) > 1:
        who += f", seed {result.winner.seed} of {seeds_of(of)}"
    return [
        f"{result.winner.name}, {who}: {result.folder / result.winner.name}.safetensors",
        *_replaced(result),
        *result.notes,
        *([f"Beside the base and the next best: {pictures}"] if pictures.exists() else []),
        *([f"Its run's contact sheet: {sheet}"] if sheet.exists() else []),
        f"How to use it: {result.folder / 'README.md'}",
        f"Look at all of it: lorasweep ui {shlex.quote(result.winner.sweep)}",
    ]


def not_recorded(choice: Choice) -> list[str]:
    """That the sweep's choice is what it was, and how to choose."""
    before = choice.before
    now = f"{before.name}, by {before.chosen_by}" if before else "none yet"
    said = f"Nothing was recorded. The sweep's choice: {now}. To choose: lorasweep pick"
    return [*choice.notes, said]


def _replaced(result: Pick) -> list[str]:
    before = result.before
    if before is None or before.model_id == result.winner.model_id:
        return []
    whose = "a person's choice" if before.chosen_by == "person" else "the rule's choice"
    return [f"It takes the place of {before.name}, {whose}."]


def _caption(result: Choice, limit: int) -> str:
    lines = ["≈ can't be told from the best score, image by image."]
    if result.by == SCORE:
        lines[0] = f"{SCORE} = loss - gain: {LOSS} - {GAIN}; the smallest is best. {lines[0]}"
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


def _short_names(keys: Sequence[str]) -> list[str]:
    """A setting's last word, where it says which one it is."""
    ends = [key.rpartition(".")[2] for key in keys]
    return [
        _escaped(end if ends.count(end) == 1 else key) for key, end in zip(keys, ends, strict=True)
    ]


def _cells(
    result: Choice, one: Ranked[Candidate], file: Candidate, settings: Sequence[str]
) -> list[str]:
    by, scores = result.by, one.scores
    low, high = (_short(scores.get(f"{by}_{end}"), ".2f") for end in ("lo", "hi"))
    interval = f" [{low}, {high}]" if len(one.checkpoints) > 1 else ""
    return [
        _link(file.run, page(result.uri, file)),
        *map(_escaped, settings),
        _link(str(file.epoch), file.path.as_uri()),
        _short(scores[by]) + _escaped(interval),
    ]


def _short(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form)


def _link(text: str, address: str) -> str:
    return f"[link={address}]{_escaped(text)}[/link]"


def _escaped(text: str) -> str:
    """A text of the store's, without control characters, which a terminal would obey."""
    from rich.markup import escape

    return escape(shown(text, 300))
