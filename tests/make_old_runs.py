"""Makes tests/recorded/old_runs.tar.xz and old_runs.json, with the lorasweep of a commit:

    git worktree add /tmp/lorasweep-code 0257ede
    python tests/make_old_runs.py

in the environment of that commit. They are not to be made anew by a later one: what they are for is
that later ones can go on with what an earlier one left. It takes about three minutes.

The commands are given in /tmp/lorasweep-old, with images, base model and cache by relative paths,
for settings that say where images and models lie count in a run's digest (`run.json`). Other
paths are absolute, as a user's are; the archive has a mark in their place, and MLflow's store as
SQL. Files that are no texts are looked through for paths.

    finished    a run of 2 epochs of a DoRA, with pictures
    broken      a run of 3 epochs of a LoCon, killed in the second
    away        a run of 1 epoch of a LoRA with tracking.offline=true: MLflow has nothing of it yet
    grid        two LoHas of 1 and 3 epochs in a pack, killed when only one had ended
    search      a sweep of 4 trials (LoRA or LoKr) by TPE, killed when the last two were on the way
    again       options that `reproduce finished --as-config` wrote
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import psutil
from PIL import Image, ImageDraw

import old_runs
from old_runs import AWAY, BROKEN, CONFIG_DIR, FINISHED, GRID, IMAGES, MODEL, OPTIONS, SEARCH, SWEEP

HOME, CODE = Path("/tmp/lorasweep-old"), Path("/tmp/lorasweep-code")

SETTINGS = [
    "experiment=demo",
    f"dataset.image_dir={IMAGES}",
    "dataset.num_images=2",
    "dataset.num_holdout=1",
    "dataset.resolution=[32,32]",
    f"model.path={MODEL}",
    "cache_dir=cache",
    "captions=[empty,sidecar]",
    "captions.empty.repeats=3",
    "captions.sidecar.repeats=3",
    "adapter.rank=1",
    "adapter.alpha=1",
    "adapter.targets=[unet.up_blocks.*.attn1.to_out.0]",
    "optimizer.text_encoder_lr=0",
    "trainer.batch_size=2",
    "metrics.validation.max_tuples=2",
    "metrics.validation.num_probe_images=1",
    "metrics.validation.num_bootstrap=50",
    "metrics.prior_drift.num_timesteps=1",
]
STEPS = 6  # of an epoch
FAST = ["optimizer.unet_lr=1e-2"]
NO_PICTURES = ["sampling.every_n_epochs=0"]
PICTURES = [
    "sampling.every_n_epochs=2",
    "sampling.num_inference_steps=1",
    "sampling.prompts=[a red circle]",
]
TRAIN = {
    FINISHED: [
        *("train", f"name={FINISHED}", *SETTINGS, *PICTURES),
        *(*FAST, "adapter=dora", "trainer.max_train_epochs=2"),
    ],
    BROKEN: [
        *("train", f"name={BROKEN}", *SETTINGS, *NO_PICTURES),
        *(*FAST, "adapter=locon", "lr_scheduler=cosine"),
        *("trainer.max_train_epochs=3", "trainer.save_every_n_steps=4"),
    ],
    AWAY: [
        *("train", f"name={AWAY}", *SETTINGS, *NO_PICTURES),
        *(*FAST, "trainer.max_train_epochs=1", "tracking.offline=true"),
    ],
    GRID: [
        *("train", "-m", f"name={GRID}", *SETTINGS, *NO_PICTURES),
        *(*FAST, "adapter=loha", "trainer.max_train_epochs=1,3"),
    ],
    SEARCH: [
        *("sweep", SWEEP, "--config-dir", CONFIG_DIR),
        *(f"name={SEARCH}", *SETTINGS, *NO_PICTURES, "trainer.max_train_epochs=2"),
    ],
}
"""The commands; the same once more goes on with what was broken off."""

SWEEP_YAML = """\
# @package _global_
defaults:
  - override /hydra/sweeper: optuna
study:
  params:
    adapter: choice(lora,lokr)
    optimizer.unet_lr: tag(log,interval(1e-3,3e-2))
  n_trials: 4
launcher:
  max_pack: 2
"""


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    shutil.rmtree(HOME, ignore_errors=True)
    write_inputs()
    make_runs()
    pack()
    expected = what_becomes_of_it()
    if expected != what_becomes_of_it():
        sys.exit("going on twice came to different results: there is nothing to compare with")
    old_runs.EXPECTED.write_text(f"{json.dumps(expected, indent=1)}\n")


def write_inputs() -> None:
    """Images with captions beside them, the base model, and a sweep."""
    (HOME / IMAGES).mkdir(parents=True)
    for name, colour, sides in (
        ("circle", "red", 40),
        ("square", "blue", 4),
        ("wedge", "green", 3),
    ):
        image = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(image).regular_polygon((16, 16, 12), sides, fill=colour)
        image.save(HOME / IMAGES / f"{name}.png")
        (HOME / IMAGES / f"{name}.txt").write_text(f"a {colour} {name}\n")
    (HOME / MODEL).symlink_to(CODE / "src" / "lorasweep" / "embedded" / "base_model")
    (HOME / CONFIG_DIR / "sweeps").mkdir(parents=True)
    (HOME / CONFIG_DIR / "sweeps" / f"{SWEEP}.yaml").write_text(SWEEP_YAML)


def make_runs() -> None:
    """All of them."""
    lorasweep(HOME, *TRAIN[FINISHED])
    lorasweep(HOME, "reproduce", FINISHED, "--as-config", OPTIONS)
    lorasweep(HOME, *TRAIN[AWAY])

    def in_second_epoch(_: str) -> bool:
        return any(int(p.stem) > STEPS for p in HOME.glob(f"outputs/{BROKEN}/*/states/*.state"))

    kill(BROKEN, in_second_epoch)
    kill(GRID, lambda said: "epoch 2, " in said)
    kill(SEARCH, lambda said: f"epoch 1, val/score: {SEARCH}-2" in said)
    for path in sorted(HOME.rglob("run.json")):
        print(path.relative_to(HOME), json.loads(path.read_text())["status"])


def lorasweep(home: Path, *words: str) -> str:
    """What a command says, given in a folder and run to its end."""
    done = subprocess.run(command(words), cwd=home, env=environment(), capture_output=True)
    said = (done.stdout + done.stderr).decode()
    print(f"lorasweep {' '.join(words[:2])}: {done.returncode}\n{said}")
    assert done.returncode == 0
    return said


def kill(name: str, when: Callable[[str], bool]) -> None:
    """Kill a command by SIGKILL as soon as it is time, which is told of what it has said."""
    log = HOME.with_suffix(".log")
    with log.open("w") as file:
        driver = psutil.Popen(
            command(TRAIN[name]), cwd=HOME, env=environment(), stdout=file, stderr=file
        )
    while not when(log.read_text()):
        assert driver.poll() is None, log.read_text()
        time.sleep(0.001)
    workers = driver.children(recursive=True)
    driver.kill()
    driver.wait()
    psutil.wait_procs(workers, timeout=20)
    print(f"killed {name}\n{log.read_text()}")


def command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "lorasweep", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(CODE / "src")}


def pack() -> None:
    """Write the archive: no path of this machine is in it."""
    with closing(sqlite3.connect(HOME / old_runs.DATABASE)) as database:
        database.execute("BEGIN IMMEDIATE")  # a write that the kill cut short is taken back
        dump = "\n".join(database.iterdump()).encode()
    with tarfile.open(old_runs.ARCHIVE, "w:xz", preset=9) as archive:
        for path in old_runs.files(HOME):
            name = path.relative_to(HOME).as_posix()
            if name.startswith("cache/"):
                continue
            if name == old_runs.DATABASE:
                name, content = old_runs.DUMP, dump
            else:
                content = path.read_bytes()
            content = without_places(content, name)
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
            archive.addfile(entry, io.BytesIO(content))
    print(f"{old_runs.ARCHIVE}: {old_runs.ARCHIVE.stat().st_size} bytes")


def without_places(content: bytes, name: str) -> bytes:
    """A file with marks in the place of paths. Ends the program for one that can't have them."""
    for key, place in (("home", HOME), ("code", CODE)):
        assert old_runs.PLACES[key] not in content, name
        if bytes(place) in content:
            assert b"\0" not in content, f"{name} is no text, and holds {place}"
            content = content.replace(bytes(place), old_runs.PLACES[key])
    others = [b"lorasweep-old/", b"lorasweep-code", b"/tmp/", b"/home/", b"/root"]
    others += [sys.prefix.encode(), str(Path(tempfile.gettempdir())).encode()]
    if re.fullmatch(r"\w{6,}", socket.gethostname()):
        others.append(socket.gethostname().encode())
    found = [one for one in others if one in content]
    assert not found, f"{name} holds {found}"
    return content


def what_becomes_of_it() -> dict[str, object]:
    """What this very lorasweep makes of the archive."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        old_runs.unpack(home)
        said = lorasweep(home, "pick", f"{SEARCH}-{SWEEP}")
        (picked,) = re.findall(r"(\S+), picked by", said)
        for target in (BROKEN, str(old_runs.folder_of(home, GRID)), f"{SEARCH}-{SWEEP}"):
            lorasweep(home, "resume", target)
        lorasweep(home, "sync", AWAY)
        return {"machine": old_runs.machine(), "picked": picked, **old_runs.outcome(home)}


if __name__ == "__main__":
    main()
