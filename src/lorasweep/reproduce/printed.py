"""What `reproduce` and `preset` print: lines and tables of texts that may be anybody's."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from lorasweep.core.text import shown

if TYPE_CHECKING:
    from rich.table import Table

MAX_LINE = 10_000  # characters
_COLOURS = {
    "bit-equal": "green",
    "within rounding": "green",
    "different": "red",
    "not known": "yellow",
    "left out": "yellow",
    "unknown": "yellow",
}


def say(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(shown(line, MAX_LINE), markup=False, emoji=False, soft_wrap=True)


def say_config(console: Console, file: Path, folder: Path, further: Sequence[str] = ()) -> None:
    words = ["--config-dir", str(folder), f"experiment={file.stem}", *further]
    say(console, [f"Written: {file}", f"Train it: lorasweep train {shlex.join(words)}"])


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of texts that may come from a file; verdicts have their colour."""
    from rich.table import Table

    made = Table(title=escape(shown(title)), title_justify="left")
    for column in columns:
        made.add_column(escape(shown(column)), overflow="fold")
    for row in rows:
        made.add_row(*(_cell(text) for text in row))
    return made


def _cell(text: str) -> str:
    plain = escape(shown(text, 200))
    return f"[{_COLOURS[text]}]{plain}[/{_COLOURS[text]}]" if text in _COLOURS else plain
