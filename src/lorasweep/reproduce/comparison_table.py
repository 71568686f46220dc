"""The tables of a reproduction, for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lorasweep.reproduce.compare import ROUNDING, Comparison
from lorasweep.reproduce.differences import Difference
from lorasweep.tracking.history import Log, LoggedRun

if TYPE_CHECKING:
    from rich.table import Table

_COLOURS = {
    "bit-equal": "green",
    "within rounding": "green",
    "different": "red",
    "not known": "yellow",
}
MAX_TEXT = 200


def differences(found: Sequence[Difference]) -> Table:
    """What is not as it was."""
    table = _table("Not as it was", ("what", "then", "now"))
    for one in found:
        table.add_row(*(_plain(text) for text in (one.what, one.then, one.now)))
    return table


def verdict(result: Comparison, title: str) -> Table:
    """What was compared, and the verdict of all."""
    caption = f"within rounding: at most {ROUNDING:g} relative; pictures: 2 of 255"
    table = _table(title, ("what", "verdict", "how far"), caption)
    for row in result.rows:
        colour = _COLOURS[row.verdict]
        table.add_row(row.what, f"[{colour}]{row.verdict}[/{colour}]", _plain(row.detail))
    return table


def scores_beside(log: Log, old: LoggedRun, new: LoggedRun) -> Table:
    """The scores of a variation beside its parent's, after their last common epoch."""
    table = _table(f"{new.name} beside {old.name}", ("score", "epoch", old.name, new.name))
    for key, (epoch, then, now) in _scores(log, old, new).items():
        table.add_row(_plain(key), str(epoch), f"{then:.4f}", f"{now:.4f}")
    return table


def _scores(log: Log, old: LoggedRun, new: LoggedRun) -> Mapping[str, tuple[int, float, float]]:
    found = {}
    for key in log.metrics(old):
        then, now = log.curve(old, key), log.curve(new, key)
        both = set(then) & set(now)
        if both and key.startswith("val/") and not key.endswith(("_lo", "_hi")):
            found[key] = (max(both), then[max(both)], now[max(both)])
    return found


def _table(title: str, columns: Sequence[str], caption: str | None = None) -> Table:
    from rich.table import Table

    table = Table(title=_plain(title), title_justify="left", caption=caption)
    for column in columns:
        table.add_column(_plain(column), overflow="fold")
    return table


def _plain(text: str) -> str:
    from rich.markup import escape

    printable = "".join(char if char.isprintable() else "?" for char in text)
    cut = printable if len(printable) <= MAX_TEXT else f"{printable[: MAX_TEXT - 1]}…"
    return escape(cut)
