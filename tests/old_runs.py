"""Runs that the lorasweep of commit 0257ede left: tests/recorded/old_runs.tar.xz holds them as they
lay on its disk, old_runs.json what became of them when it went on with them itself.

`make_old_runs.py` has made both. Of lorasweep's own code nothing is used here, for it moves.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import struct
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ARCHIVE = HERE / "recorded" / "old_runs.tar.xz"
EXPECTED = HERE / "recorded" / "old_runs.json"
PLACES = {"home": b"@OLD_HOME@", "code": b"@OLD_CODE@"}
"""What stands in the archive's texts for the folder that the commands were given in, and for the
checkout that they ran from."""
DATABASE, DUMP = "outputs/mlflow.db", "outputs/mlflow.sql"
FINISHED, BROKEN, AWAY, GRID, SEARCH = "finished", "broken", "away", "grid", "search"
OPTIONS = "again"
"""Names of the runs, and the folder of options that were written of the finished one."""
IMAGES, MODEL, CONFIG_DIR, SWEEP = "images", "base_model", "options", "mine"


def unpack(home: Path) -> None:
    """Lay the runs out below `home`, as if their commands had been given there."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(home, filter="data")
    here = {PLACES["home"]: bytes(home), PLACES["code"]: bytes(HERE.parent)}
    for path in files(home):
        content = new = path.read_bytes()
        for mark, place in here.items():
            new = new.replace(mark, place)
        if new != content:
            changed = path.stat().st_mtime_ns  # by it the newest of a name is found
            path.write_bytes(new)
            os.utime(path, ns=(changed, changed))
    dump = home / DUMP
    with closing(sqlite3.connect(home / DATABASE)) as database:
        database.executescript(dump.read_text())
    dump.unlink()
    import lorasweep

    (home / MODEL).symlink_to(Path(lorasweep.__file__).parent / "embedded" / "base_model")


def files(home: Path) -> Iterator[Path]:
    """All files below a folder, in order; links are left out."""
    for folder, _, names in sorted(os.walk(home)):
        found = (Path(folder) / name for name in sorted(names))
        yield from (path for path in found if not path.is_symlink())


def folder_of(home: Path, name: str) -> Path:
    """The one folder of a run, or of a sweep."""
    (folder,) = (home / "outputs" / name).iterdir()
    return folder


def outcome(home: Path) -> dict[str, Any]:
    """What the runs have come to: each one's status, losses, scores and last weights; the study."""
    return {"runs": _logged(home), "trials": _trials(home)}


def _logged(home: Path) -> dict[str, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home / DATABASE}")
    found = {}
    for run in client.search_runs([client.get_experiment_by_name("lorasweep").experiment_id]):
        assert run.info.run_name not in found  # no run is there twice
        found[run.info.run_name] = {
            "uid": run.data.tags["lorasweep.uid"],
            "status": run.info.status,
            "train/loss": _curve(client, run, "train/loss", first=1),
            "val/loss_rel": _curve(client, run, "val/loss_rel", first=0),
            **_weights(Path(run.data.tags["lorasweep.output_dir"])),
        }
    return dict(sorted(found.items()))


def _curve(client: Any, run: Any, key: str, first: int) -> list[float]:
    """The values of a curve, which has every step once."""
    points = sorted(
        (one.step, one.value) for one in client.get_metric_history(run.info.run_id, key)
    )
    assert [step for step, _ in points] == list(range(first, first + len(points)))
    return [value for _, value in points]


def _weights(folder: Path) -> dict[str, Any]:
    """Hashes of a run's checkpoints, and the norms of the last one's tensors."""
    import numpy as np
    from safetensors.numpy import load_file

    checkpoints = sorted(folder.glob("*.safetensors"))
    tensors = load_file(checkpoints[-1])
    return {
        "checkpoints": {path.name: data_hash(path) for path in checkpoints},
        "norms": {
            key: float(np.linalg.norm(value.astype("float64")))
            for key, value in sorted(tensors.items())
            if not key.endswith(".alpha")
        },
    }


def data_hash(checkpoint: Path) -> str:
    """sha256 of a safetensors file behind its header, in which there are dates."""
    content = checkpoint.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return hashlib.sha256(content[8 + size :]).hexdigest()


def _trials(home: Path) -> list[dict[str, Any]]:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    journal = JournalStorage(JournalFileBackend(str(folder_of(home, SEARCH) / "study.journal")))
    (name,) = optuna.get_all_study_names(journal)
    return [
        {"state": one.state.name, "params": one.params, "values": one.values}
        for one in optuna.load_study(study_name=name, storage=journal).get_trials()
    ]


def machine() -> dict[str, Any]:
    """What decides how sums are rounded: on an equal one, runs are bit-equal."""
    import torch

    try:
        text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:  # another system than Linux
        text = ""
    lines = [[part.strip() for part in line.partition(":")[::2]] for line in text.splitlines()]
    kept = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags")
    cpu = {key: value for key, value in lines if key in kept}
    return {
        "cpu": cpu.get("model name"),
        "cpu_digest": hashlib.sha256(json.dumps(cpu, sort_keys=True).encode()).hexdigest(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
    }
