"""Sample pictures as MLflow's pages want them: a PNG and a small preview, under given names."""

from __future__ import annotations

import re
import uuid
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

PREVIEW = 256  # pixels at most, as MLflow's own
ENLARGED = 128  # pixels at most to which smaller pictures are enlarged
MAX_KEY = 100  # characters; the key becomes a part of a file's name


def stem(key: str, step: int, time: int) -> str:
    """The name that `MlflowClient.log_image(key=, step=)` gives; another one at each call.

    It is chosen once for a picture, so that sending it again replaces it.
    """
    safe = re.sub(r"[^a-zA-Z0-9_\-.~ ]", "_", key.replace("/", "~"))[:MAX_KEY]
    return f"{safe}+step+{step}+timestamp+{time}+{uuid.uuid4()}"


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file; MLflow's own call takes ten times as long."""
    content = BytesIO()
    image.save(content, "PNG", compress_level=1)
    return content.getvalue()


def save_sample(folder: Path, stem: str, content: bytes) -> None:
    """Write the PNG and its preview."""
    from PIL import Image

    (folder / f"{stem}.png").write_bytes(content)
    with Image.open(BytesIO(content)) as image:
        _preview(image).save(folder / f"{stem}+compressed.webp", method=0)


def _preview(image: Image.Image) -> Image.Image:
    """What MLflow's pages show, at its natural size: so small pictures are enlarged."""
    from PIL import Image

    factor = ENLARGED // max(image.size)
    if factor > 1:
        size = (image.width * factor, image.height * factor)
        return image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    small = image.copy()
    small.thumbnail((PREVIEW, PREVIEW))
    return small
