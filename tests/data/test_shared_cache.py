"""Several processes fill one cache of latents: nothing torn is read, a killed one does no harm."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from bad_files import encoded, file, picture
from lorasweep.data.kohya_folders import Arm, CaptionedImage
from lorasweep.data.latents import encode


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(12):
        file(f"{index:02}.png", encoded(picture(index)))(folder)
    return folder


def fill_at_once(images: Path, cache: Path, base, settings, *deaths: int) -> list[int | None]:
    """Let a process for each of `deaths` fill the cache; their exit codes.

    It dies in the middle of the write after so many, unless that is 0.
    """
    forked = multiprocessing.get_context("fork")  # with the model loaded
    ready = forked.Barrier(len(deaths))

    def fill(after: int) -> None:
        torch.set_num_threads(1)
        whole, written = os.fsync, []

        def die(handle: int) -> None:
            written.append(handle)
            if len(written) > after:
                os.ftruncate(handle, 40)
                os.kill(os.getpid(), signal.SIGKILL)
            whole(handle)

        if after:
            os.fsync = die
        ready.wait(60)
        latents(images, cache, base, settings)

    processes = [forked.Process(target=fill, args=(after,)) for after in deaths]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    return [process.exitcode for process in processes]


def latents(images: Path, cache: Path, base, settings) -> list[torch.Tensor]:
    items = tuple(CaptionedImage(path, "") for path in sorted(images.glob("*.png")))
    return [item.latents for item in encode(base, [Arm("a", 1, items)], settings, cache)]


def test_two_processes_fill_one_cache_and_one_is_killed_in_a_write(
    images, base, make_run, tmp_path, caplog
):
    settings = make_run().dataset
    cache = tmp_path / "cache"
    assert fill_at_once(images, cache, base, settings, 0, 4) == [0, -signal.SIGKILL]
    files = sorted((cache / "latents").glob("*.safetensors"))
    assert len(files) == 12  # what the killed one had begun lies beside, under no entry's name
    found = latents(images, cache, base, settings)
    assert "torn" not in caplog.text
    for ours, theirs in zip(latents(images, tmp_path / "own", base, settings), found, strict=True):
        assert torch.equal(ours, theirs)


def test_what_a_killed_process_left_is_gone_on_with(images, base, make_run, tmp_path):
    settings, cache = make_run().dataset, tmp_path / "cache"
    assert fill_at_once(images, cache, base, settings, 4) == [-signal.SIGKILL]
    assert len(list((cache / "latents").glob("[!.]*.safetensors"))) == 4
    before = {path: path.stat().st_mtime_ns for path in (cache / "latents").glob("[!.]*")}
    found = latents(images, cache, base, settings)
    assert len(found) == 12
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


@pytest.mark.parametrize("damage", ["cut", "zeros", "other"])
def test_a_damaged_entry_is_made_again(damage, images, base, make_run, tmp_path, caplog):
    settings, cache = make_run().dataset, tmp_path / "cache"
    whole = latents(images, cache, base, settings)
    entry = min((cache / "latents").glob("*.safetensors"))
    content = entry.read_bytes()
    entry.unlink()
    if damage == "cut":
        entry.write_bytes(content[:-10])
    elif damage == "zeros":  # as some file systems leave files after a power cut
        entry.write_bytes(content[:-8] + bytes(8))
    else:
        entry.write_bytes(max((cache / "latents").glob("*.safetensors")).read_bytes())
    again = latents(images, cache, base, settings)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    assert "is torn and is made again" in caplog.text
    assert hashlib.sha256(entry.read_bytes()).digest() == hashlib.sha256(content).digest()


def test_a_cache_that_may_not_be_written_is_named(images, base, make_run, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(OSError) as error:
        latents(images, tmp_path / "cache", base, make_run().dataset)
    assert error.value.errno and os.fsdecode(error.value.filename).startswith(str(tmp_path))
