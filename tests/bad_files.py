"""Files from strangers: cut, huge, hostile or merely odd; what the bad inputs are made of.

Each function returns a maker: called with a case's folder, it puts the files there.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from lorasweep.config.conf_folder import PACKAGE

Maker = Callable[[Path], None]
BASE = PACKAGE / "embedded" / "base_model"
KEY = "lora_unet_down_blocks_0_attentions_0_proj_in"


def both(*makers: Maker) -> Maker:
    """One after another."""

    def make(folder: Path) -> None:
        for maker in makers:
            maker(folder)

    return make


def file(name: str | bytes, content: bytes | str = b"") -> Maker:
    """A file of these bytes."""

    def make(folder: Path) -> None:
        path = folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def directory(name: str) -> Maker:
    """A folder where another thing is expected."""
    return lambda folder: (folder / name).mkdir(parents=True)


def link(name: str, target: str) -> Maker:
    """A symbolic link, which may lead nowhere."""

    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)

    return make


def fifo(name: str) -> Maker:
    """A pipe that nobody writes to: reading it would wait forever."""
    return lambda folder: os.mkfifo(folder / name)


def socket_at(name: str) -> Maker:
    """A socket where a file is expected."""

    def make(folder: Path) -> None:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str((folder / name).relative_to(Path.cwd())))

    return make


def closed(name: str) -> Maker:
    """Take everybody's rights to a file or folder away (from all but root)."""
    return lambda folder: (folder / name).chmod(0)


# Images


def picture(seed: int = 0, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> Image.Image:
    """Noise, of which no two seeds give the same bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encoded(picture())
JPEG = encoded(picture(1), "JPEG")


def photos(count: int = 3, captions: str | None = "a red circle") -> Maker:
    """A folder of good images, with their captions unless None."""

    def make(folder: Path) -> None:
        for index in range(count):
            file(f"photos/{index}.png", encoded(picture(100 + index)))(folder)
            if captions is not None:
                file(f"photos/{index}.txt", f"{captions} {index}\n")(folder)

    return make


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """One piece of a PNG file, with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims this size, whatever its data are."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def text_bomb() -> bytes:
    """A PNG of 64x64 with 80 MB of text packed into some kilobytes."""
    start, rest = PNG[:33], PNG[33:]
    bomb = b"Comment\0\0" + zlib.compress(b"\0" * 80_000_000, 9)
    return start + png_chunk(b"zTXt", bomb) + rest


# LoRA files


def header_of(tensors: Mapping[str, tuple[list[int], int, int]], dtype: str = "F32") -> bytes:
    """A safetensors header from shapes and offsets, true or not."""
    entries = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        for name, (shape, begin, end) in tensors.items()
    }
    return json.dumps(entries).encode()


def safetensors(head: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file byte by byte: length of the header, the header, the data."""
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def lora_tensors(key: str = KEY, rank: int = 2, size: int = 32, **changes: Any) -> dict[str, Any]:
    """One site of the embedded model; `changes` replace a tensor by a name's last part."""
    tensors = {
        f"{key}.lora_down.weight": torch.full((rank, size, 1, 1), 0.1),
        f"{key}.lora_up.weight": torch.full((size, rank, 1, 1), 0.1),
        f"{key}.alpha": torch.tensor(1.0),
    }
    return tensors | {f"{key}.{name}": tensor for name, tensor in changes.items()}


def lora(
    tensors: Mapping[str, torch.Tensor] | None = None,
    name: str = "a.safetensors",
    **metadata: str,
) -> Maker:
    """A LoRA file of the embedded model unless other tensors are given."""
    return file(name, save(dict(tensors or lora_tensors()), metadata or None))


# Base models


def base(name: str = "model", **changes: Maker) -> Maker:
    """A copy of the embedded model as a diffusers folder (large files linked), changed after."""

    def make(folder: Path) -> None:
        target = folder / name
        for source in BASE.rglob("*"):
            if source.is_file() and source.suffix in (".json", ".safetensors", ".txt"):
                place = target / source.relative_to(BASE)
                place.parent.mkdir(parents=True, exist_ok=True)
                if source.suffix == ".safetensors":
                    place.symlink_to(source)
                else:
                    shutil.copyfile(source, place)
        for change in changes.values():
            change(target)

    return make


def without(*names: str) -> Maker:
    """Remove files or folders."""

    def make(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return make


def replaced(name: str, content: bytes | str) -> Maker:
    """Put other bytes in a file's place, not through its link."""
    return both(without(name), file(name, content))


def edited(name: str, **values: Any) -> Maker:
    """Change entries of a JSON file."""

    def make(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return make
