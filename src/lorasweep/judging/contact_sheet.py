"""The contact sheet: sample images of a run side by side, epochs down and prompts across."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from PIL import Image, ImageFont

FILE_NAME = "contact_sheet.png"  # beside a run's checkpoints
MAX_ROWS = 12
MIN_CELL = 128  # pixels; smaller pictures are enlarged by a whole factor
MAX_CELL = 320  # larger ones are reduced to it
GAP = 6
BACKGROUND = "#ececec"  # so that a white picture still shows its edge
INK = "#222222"

Row = TypeVar("Row")


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    columns: Sequence[str],
) -> Image.Image:
    """Draw labelled rows of pictures under the column labels.

    Raises ValueError when there is nothing to draw or a row has not one picture for each column.
    """
    from PIL import Image, ImageDraw, ImageFont

    _check(rows, columns)
    cell = _cell_size([image for _, images in rows for image in images])
    font = ImageFont.load_default(size=max(12, cell[0] // 10))
    heads = [_wrapped(label, font, cell[0] - GAP) for label in columns]
    left = max(_width(label, font) for label, _ in rows) + 2 * GAP
    top = max(_height(head, font) for head in heads) + 2 * GAP
    size = (left + len(columns) * (cell[0] + GAP), top + len(rows) * (cell[1] + GAP))
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        draw.multiline_text((left + column * (cell[0] + GAP), GAP), head, fill=INK, font=font)
    for number, (label, images) in enumerate(rows):
        y = top + number * (cell[1] + GAP)
        draw.text((GAP, y + cell[1] // 2), label, fill=INK, font=font, anchor="lm")
        for column, image in enumerate(images):
            sheet.paste(_fitted(image, cell), (left + column * (cell[0] + GAP), y))
    return sheet


def thinned(rows: Sequence[Row], limit: int = MAX_ROWS) -> Sequence[Row]:
    """At most `limit` rows, evenly spaced, the first and the last among them."""
    if len(rows) <= limit:
        return rows
    step = (len(rows) - 1) / (limit - 1)
    return [rows[round(number * step)] for number in range(limit)]


def _check(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str]) -> None:
    if not rows or not columns:
        raise ValueError("a contact sheet needs at least one row and one column")
    for label, images in rows:
        if len(images) != len(columns):
            raise ValueError(f"row {label} has {len(images)} pictures for {len(columns)} columns")


def _cell_size(images: Sequence[Image.Image]) -> tuple[int, int]:
    """Width and height that every picture is fitted into."""
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    if width < MIN_CELL:
        factor = -(-MIN_CELL // width)  # rounded up
        return width * factor, height * factor
    shrink = min(1.0, MAX_CELL / width)
    return round(width * shrink), round(height * shrink)


def _fitted(image: Image.Image, cell: tuple[int, int]) -> Image.Image:
    """The picture at the cell's size, its shape kept, centred on the background."""
    from PIL import Image

    ratio = min(cell[0] / image.width, cell[1] / image.height)
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    # enlarged pixels stay pixels: blur would hide what the model drew
    filter_ = Image.Resampling.NEAREST if ratio >= 1 else Image.Resampling.LANCZOS
    framed = Image.new("RGB", cell, BACKGROUND)
    place = ((cell[0] - size[0]) // 2, (cell[1] - size[1]) // 2)
    framed.paste(image.convert("RGB").resize(size, filter_), place)
    return framed


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, max_lines: int = 3
) -> str:
    """The text in lines of at most `width` pixels; what doesn't fit ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _width(longer, font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], f"{lines[max_lines - 1]} …"]
    return "\n".join(_shortened(line, font, width) for line in lines)


def _shortened(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if _width(line, font) <= width:
        return line
    line = line.removesuffix(" …")
    while line and _width(f"{line}…", font) > width:
        line = line[:-1]
    return f"{line}…"


def _width(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return int(-(-font.getlength(text) // 1))


def _height(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    from PIL import Image, ImageDraw

    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return int(measure.multiline_textbbox((0, 0), text, font=font)[3])
