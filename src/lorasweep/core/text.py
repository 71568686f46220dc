"""Text from files and names of any origin, made safe to print on a terminal or in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_LISTED = 20  # names in one message: enough to act on, and it still fits a screen


def harmless(text: str) -> str:
    """A message of several lines, without control characters other than line ends."""
    return "".join(one if one.isprintable() or one == "\n" else "?" for one in text)


def shown(text: str, limit: int = 120) -> str:
    """One line of text, without control characters and cut at `limit` characters."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in text[: limit + 1])
    return clean if len(clean) <= limit else f"{clean[:limit]}…"


def markdown(text: str) -> str:
    """Text as Markdown that shows it as it is: names of files may be HTML or links.

    A _ within a word begins no emphasis (CommonMark 0.31, 6.2) and stays.
    """
    special = r"[\\`*\[\]<>#|!&]|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(special, lambda found: f"\\{found[0]}", text)


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first of them, and how many more there are."""
    names = [shown(name, 300) for name in names]
    rest = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def size_of(number: float) -> str:
    """A number of bytes in the unit that shows it: 0.3 MB, 40 MB, 1.2 GB."""
    if number >= 1e9:
        return f"{number / 1e9:.1f} GB"
    return f"{number / 1e6:.0f} MB" if number >= 10e6 else f"{number / 1e6:.1f} MB"
