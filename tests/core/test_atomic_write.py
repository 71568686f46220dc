"""What is written is whole, has the mode of the umask, and says where there was no room."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorasweep.core.atomic_write import (
    DiskFullError,
    FolderGoneError,
    staged,
    write_atomically,
)
from lorasweep.core.text import size_of


@pytest.fixture(params=[(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)], ids=["077", "022", "002"])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """The mode that a new file has, under several umasks."""
    mask, mode = request.param
    before = os.umask(mask)
    yield mode
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_has_the_mode_that_the_umask_gives(mode: int, tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "a.json", b"{}")
    write_atomically(tmp_path / "new" / "a.json", b"[]")  # replaced
    assert mode_of(tmp_path / "new" / "a.json") == mode
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_what_is_staged_has_the_mode_that_the_umask_gives(mode: int, tmp_path: Path) -> None:
    with staged(tmp_path / "model", overwrite=False) as folder:
        (folder / "unet").mkdir(parents=True)
        file = folder / "unet" / "x.safetensors"
        file.write_bytes(b"x")
        file.chmod(0o600)  # as safetensors writes it
    assert mode_of(tmp_path / "model" / "unet" / "x.safetensors") == mode
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_was_moved_away_is_not_made_again(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "run"
    with pytest.raises(FolderGoneError, match="outputs/run is gone: was it moved"):
        write_atomically(run / "states" / "1.state", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_with_what_had_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError) as error:
        write_atomically(tmp_path / "a.state", bytes(300_000))
    told = f"{tmp_path}: no room for a.state (0.3 MB): No space left on device; make room"
    assert str(error.value).startswith(told)
    with (
        pytest.raises(DiskFullError, match=r"no room for b\.safetensors"),
        staged(tmp_path / "b.safetensors", overwrite=False) as file,
    ):
        file.write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_given_in_the_unit_that_shows_them() -> None:
    assert [size_of(n) for n in (0, 300_000, 40_000_000, 1_234_000_000)] == [
        "0.0 MB",
        "0.3 MB",
        "40 MB",
        "1.2 GB",
    ]
