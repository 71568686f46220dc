"""Text of other people's files and names, made fit for a terminal, or for Markdown."""

from __future__ import annotations

import re


def harmless(text: str) -> str:
    """A message of lines, fit for a terminal: no other control characters than their ends."""
    return "".join(one if one.isprintable() or one == "\n" else "?" for one in text)


def shown(text: str, limit: int = 120) -> str:
    """Text of a file's, fit for a terminal: no control characters, and not too long."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in text[: limit + 1])
    return clean if len(clean) <= limit else f"{clean[:limit]}…"


def markdown(text: str) -> str:
    """Text as Markdown that shows it as it is: names of files may be HTML or links."""
    return re.sub(r"[\\`*_\[\]<>#|!&]", lambda found: f"\\{found[0]}", text)
