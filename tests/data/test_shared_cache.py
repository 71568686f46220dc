"""Several processes fill one cache of latents: nothing torn is read, a killed one does no harm."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bad_files import encoded, file, picture
from lorasweep.data.kohya_folders import Arm, CaptionedImage
from lorasweep.data.latents import encode

FILL = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lorasweep.config.compose import compose
from lorasweep.data.kohya_folders import Arm, CaptionedImage
from lorasweep.data.latents import encode
from lorasweep.core.settings import build

images, cache, after = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
cfg = compose(["experiment=demo"])
base, settings = build(cfg.model, "model").load(), build(cfg.dataset, "dataset")
items = tuple(CaptionedImage(path, "") for path in sorted(images.glob("*.png")))
if after:  # die in the middle of the write after this many
    from lorasweep.core import atomic_write
    whole, written = atomic_write.os.fsync, []
    def die(handle):
        written.append(handle)
        if len(written) > after:
            import os, signal
            os.ftruncate(handle, 40)
            os.kill(os.getpid(), signal.SIGKILL)
        whole(handle)
    atomic_write.os.fsync = die
print("ready", flush=True)
sys.stdin.readline()
encode(base, [Arm("a", 1, items)], settings, cache)
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(12):
        file(f"{index:02}.png", encoded(picture(index)))(folder)
    return folder


def filling(images: Path, cache: Path, after: int = 0) -> subprocess.Popen[str]:
    """A process that loads the model, says so, and fills the cache once it is told to."""
    command = [sys.executable, "-c", FILL, str(images), str(cache), str(after)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(*processes: subprocess.Popen[str]) -> list[int]:
    """Let all begin at once; their exit codes."""
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=120)
    return [process.returncode for process in processes]


def latents(images: Path, cache: Path, base, settings) -> list[torch.Tensor]:
    items = tuple(CaptionedImage(path, "") for path in sorted(images.glob("*.png")))
    return [item.latents for item in encode(base, [Arm("a", 1, items)], settings, cache)]


def test_two_processes_fill_one_cache_and_one_is_killed_in_a_write(
    images, base, make_run, tmp_path, caplog
):
    settings = make_run().dataset
    cache = tmp_path / "cache"
    codes = go(filling(images, cache), filling(images, cache, after=4))
    assert codes == [0, -signal.SIGKILL]
    files = sorted((cache / "latents").glob("*.safetensors"))
    assert len(files) == 12  # what the killed one had begun lies beside, under no entry's name
    found = latents(images, cache, base, settings)
    assert "torn" not in caplog.text
    for ours, theirs in zip(latents(images, tmp_path / "own", base, settings), found, strict=True):
        assert torch.equal(ours, theirs)


def test_what_a_killed_process_left_is_gone_on_with(images, base, make_run, tmp_path):
    settings, cache = make_run().dataset, tmp_path / "cache"
    assert go(filling(images, cache, after=4)) == [-signal.SIGKILL]
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
