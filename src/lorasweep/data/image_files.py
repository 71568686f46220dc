"""Image files: what is read of them, and how any of them becomes upright 8-bit RGB."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
)
UNREAD_SUFFIXES = frozenset(
    {".heic", ".heif", ".hif", ".jxl", ".jp2", ".tga", ".psd", ".exr", ".svg"}
    | {".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"}
)
"""Pictures of types that PIL doesn't read, or not as a photo."""
MAX_PIXELS = 178_956_970
"""PIL itself refuses larger images."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")


def open_image(source: Path | IO[bytes]) -> Image.Image:
    """Decode an image's first frame to upright RGB, transparency composited on white.

    16-bit grey is scaled to 8 bits, CMYK and the other modes are converted. Raises OSError,
    ValueError or what else PIL raises for a file it can't decode.
    """
    with _open(source) as image:
        image.load()  # before the orientation is read: PIL turns TIFFs upright by itself here
        return _to_rgb(_upright(image))


def open_with_alpha(source: Path | IO[bytes]) -> tuple[Image.Image, Image.Image]:
    """The upright RGB of an image as it lies under its alpha, and that alpha (8-bit grey).

    What has no alpha is opaque. Raises as `open_image`.
    """
    from PIL import Image

    with _open(source) as image:
        image.load()
        upright = _upright(image)
        if not upright.has_transparency_data:
            return _to_rgb(upright), Image.new("L", upright.size, 255)
        rgba = upright.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")


def plain_format(source: Path | IO[bytes]) -> str | None:
    """PIL's name of the file's format if any reader sees in it what `open_image` does, else None.

    That is a single frame of opaque, upright 8-bit RGB.
    """
    with _open(source) as image:
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        is_plain = (
            image.mode == "RGB"
            and frames == 1
            and not image.has_transparency_data
            and _orientation(image) == 1
        )
        return image.format if is_plain else None


def header_size(path: Path) -> tuple[int, int]:
    """Width and height as stored, read without decoding the pixels; raises as `open_image`."""
    with _open(path) as image:
        return image.size


def decode_errors() -> tuple[type[Exception], ...]:
    """What PIL raises for damaged files: its parsers let their own errors through."""
    from struct import error as struct_error

    from PIL.Image import DecompressionBombError

    return (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        LookupError,
        TypeError,
        ArithmeticError,
        struct_error,
        DecompressionBombError,
    )


def reason(error: Exception) -> str:
    """One of `decode_errors` in words, to go after a file's name."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "is not a readable PNG, JPEG, WebP, BMP, GIF, TIFF or AVIF file"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"cannot be decoded: {text or type(error).__name__}"


def _open(source: Path | IO[bytes]) -> Image.Image:
    """Read an image's header, of the formats that we take."""
    from PIL import Image

    with warnings.catch_warnings():  # max_pixels decides what is a decompression bomb
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(source, formats=_FORMATS)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 also where the EXIF data are damaged but the pixels are not."""
    from PIL import ExifTags

    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except decode_errors():
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(image: Image.Image) -> Image.Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I;16"):
        image = _grey_of_16_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no fixed white; save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255; PIL's own conversion clips. A transparent value becomes white."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.uint32)
    if isinstance(transparent := image.info.get("transparency"), int):
        values[values == transparent] = 65535
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
