"""The contact sheet: what a person sees on it."""

from __future__ import annotations

import pytest
from PIL import Image

from lorasweep.judging.contact_sheet import contact_sheet, thinned


def solid(colour: str, size: int = 64) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in image.getcolors(maxcolors=1 << 24)}


def test_every_picture_is_on_the_sheet_in_its_row_and_column() -> None:
    rows = [("base", [solid("red"), solid("lime")]), ("epoch 1", [solid("blue"), solid("yellow")])]
    sheet = contact_sheet(rows, ["left", "right"])
    x_left, x_right = sheet.width - 2 * 134 + 64, sheet.width - 70
    y_top, y_bottom = sheet.height - 2 * 134 + 64, sheet.height - 70
    assert sheet.getpixel((x_left, y_top)) == (255, 0, 0)
    assert sheet.getpixel((x_right, y_top)) == (0, 255, 0)
    assert sheet.getpixel((x_left, y_bottom)) == (0, 0, 255)
    assert sheet.getpixel((x_right, y_bottom)) == (255, 255, 0)


def test_small_pictures_are_enlarged_without_blur() -> None:
    checker = Image.new("RGB", (64, 64), "red")
    checker.paste("blue", (0, 0, 32, 64))
    sheet = contact_sheet([("base", [checker])], ["p"])
    violet = [c for c in colours(sheet) if c[0] > 30 and c[2] > 30 and c[1] < 20]
    assert sheet.width > 128
    assert not violet  # a mixture of red and blue would be a blurred edge


def test_large_pictures_are_reduced_to_a_readable_sheet() -> None:
    row = ("epoch 1", [solid("red", 1024)] * 3)
    assert contact_sheet([row], ["a", "b", "c"]).width < 1200


def test_a_picture_of_another_shape_is_not_distorted() -> None:
    wide = Image.new("RGB", (128, 64), "red")
    sheet = contact_sheet([("base", [wide, solid("blue", 128)])], ["a", "b"])
    red = sum(count for count, c in sheet.getcolors(maxcolors=1 << 24) if c == (255, 0, 0))
    assert red == 128 * 64


def test_long_prompts_stay_within_their_column() -> None:
    prompt = "masterpiece, best quality, " * 20 + "supercalifragilisticexpialidocious" * 3
    short = contact_sheet([("base", [solid("white")])], ["p"])
    long = contact_sheet([("base", [solid("white")])], [prompt])
    assert long.width == short.width
    assert long.height < short.height + 60


def test_thinning_keeps_the_base_and_the_last_epoch_and_spaces_the_others_evenly() -> None:
    rows = [(str(epoch), []) for epoch in range(101)]
    assert [label for label, _ in thinned(rows, 6)] == ["0", "20", "40", "60", "80", "100"]
    assert thinned(rows[:4], 6) == rows[:4]


def test_a_row_with_too_few_pictures_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="epoch 3 has 1 pictures for 2 columns"):
        contact_sheet([("epoch 3", [solid("red")])], ["a", "b"])
