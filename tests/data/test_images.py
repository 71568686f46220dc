"""Any image file opens as the upright RGB picture that a person sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorasweep.data.image_files import open_image, plain_format

RED, WHITE = (255, 0, 0), (255, 255, 255)


def save_palette_with_transparency(path: Path) -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.putpixel((0, 0), 0)
    image.save(path, transparency=1)


def save_rgba(path: Path) -> None:
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(path)


def save_half_transparent(path: Path) -> None:
    Image.new("LA", (16, 16), (0, 128)).save(path)


def save_grey_of_16_bits(path: Path) -> None:
    Image.fromarray(np.full((16, 16), 32896, np.uint16)).save(path)


def save_grey_of_16_bits_with_transparency(path: Path) -> None:
    Image.fromarray(np.full((16, 16), 5, np.uint16)).save(path, transparency=5)


def save_cmyk(path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, quality=100)


def save_animation(path: Path) -> None:
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), (0, 0, 255))
    first.save(path, save_all=True, append_images=[second])


def save_one_bit(path: Path) -> None:
    Image.new("1", (16, 16), 1).save(path)


@pytest.mark.parametrize(
    ("name", "save", "corner", "centre"),
    [
        ("palette.png", save_palette_with_transparency, (0, 0, 255), WHITE),
        ("palette.gif", save_palette_with_transparency, (0, 0, 255), WHITE),
        ("rgba.png", save_rgba, WHITE, WHITE),
        ("rgba.webp", save_rgba, WHITE, WHITE),
        ("la.png", save_half_transparent, (127,) * 3, (127,) * 3),
        ("grey16.png", save_grey_of_16_bits, (128,) * 3, (128,) * 3),
        ("grey16.tif", save_grey_of_16_bits, (128,) * 3, (128,) * 3),
        ("clear16.png", save_grey_of_16_bits_with_transparency, WHITE, WHITE),
        ("cmyk.jpg", save_cmyk, RED, RED),
        ("cmyk.tif", save_cmyk, RED, RED),
        ("film.gif", save_animation, RED, RED),
        ("film.png", save_animation, RED, RED),
        ("pages.tif", save_animation, RED, RED),
        ("bit.png", save_one_bit, WHITE, WHITE),
    ],
)
def test_every_kind_of_image_opens_as_rgb_and_is_not_copied_as_it_is(
    tmp_path, name, save, corner, centre
):
    save(tmp_path / name)
    image = open_image(tmp_path / name)
    assert image.mode == "RGB"
    # JPEG's rounding, one step
    np.testing.assert_allclose(image.getpixel((0, 0)), corner, atol=1)
    np.testing.assert_allclose(image.getpixel((8, 8)), centre, atol=1)
    assert plain_format(tmp_path / name) is None


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    upright = Image.new("RGB", (24, 16), WHITE)
    upright.paste(RED, (0, 0, 12, 8))
    # the transposition that undoes each orientation's turn, by the EXIF standard
    stored = (
        upright.transpose({2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation])
        if orientation > 1
        else upright
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}
    path = tmp_path / f"image{suffix}"
    stored.save(path, exif=exif, **options.get(suffix, {}))
    image = open_image(path)
    # JPEG rings at the edge
    np.testing.assert_allclose(np.asarray(image), np.asarray(upright), atol=12)
    if suffix != ".tif":
        assert (plain_format(path) is None) == (orientation > 1)


def test_damaged_exif_does_not_make_an_image_bad(tmp_path):
    Image.new("RGB", (16, 16), RED).save(tmp_path / "a.png", exif=b"Exif\0\0garbage")
    assert open_image(tmp_path / "a.png").size == (16, 16)


@pytest.mark.parametrize("pixels", [np.zeros((16, 16), np.float32), np.zeros((16, 16), np.int32)])
def test_pixels_of_32_bits_are_refused_not_guessed(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="no fixed white"):
        open_image(tmp_path / "a.tif")
