"""A stranger's run folder: `sync` and `resume` read and write nothing outside it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from logged import SETTINGS, finish, log_epochs, new_run
from lorasweep import tracking
from lorasweep.cli import main
from lorasweep.core.foreign_files import ForeignFileError
from lorasweep.core.settings import SettingsError
from lorasweep.runs import provenance, resume, run_folder
from lorasweep.tracking import Tracker, TrackingError
from lorasweep.training import saved_states

SECRET = b"-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of this machine that is nobody else's business."""
    path = tmp_path / "home" / "id_rsa"
    path.parent.mkdir()
    path.write_bytes(SECRET)
    return path


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Path:
    """An output_root with a run's folder, of which MLflow has nothing."""
    root = tmp_path / "outputs"
    root.mkdir()
    shutil.copy(empty_store, root / "mlflow.db")
    with Tracker(replace(SETTINGS, offline=True), root) as tracker:
        log = tracker.open_run(new_run(root))
        log_epochs(log, root / "a", last=1)
        finish(log)
    return root


def change(path: Path, edit: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def holds(folder: Path, content: bytes) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and content in p.read_bytes()]


@pytest.mark.parametrize("kind", ["absolute", "..", "link"])
@pytest.mark.parametrize("place", ["file", "picture", "checkpoint"])
def test_sync_sends_no_file_that_lies_outside_the_folder(
    kind: str, place: str, root: Path, secret: Path
) -> None:
    folder = root / "a"
    path = {"absolute": str(secret), "..": "../../home/id_rsa", "link": "key.safetensors"}[kind]
    if kind == "link":
        (folder / path).symlink_to(secret)
    if place == "file":
        change(folder / "mlflow.json", lambda run: run["files"].update({path: None}))
    elif place == "picture":
        change(folder / "epochs/000001.json", lambda one: one["pictures"].update({"0": path}))
    else:
        change(folder / "epochs/000001.json", lambda one: one["checkpoint"].update(file=path))
    (result,) = tracking.sync(SETTINGS, root)
    assert not result.is_done
    assert "outside" in result.line() or "leads out of" in result.line()
    assert "\n" not in result.line()
    assert holds(root / "mlartifacts", SECRET) == []
    assert b"id_rsa" not in (root / "mlflow.db").read_bytes()


@pytest.mark.parametrize("uri", ["http://evil.example:5000", "sqlite:////tmp/x/theirs.db"])
def test_sync_sends_nothing_to_an_address_that_only_the_folder_names(
    uri: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = uri.replace("/tmp/x", str(tmp_path))
    change(root / "a/mlflow.json", lambda run: run.update(uri=uri))
    opened: list[str | None] = []
    monkeypatch.setattr(
        tracking.sync.__globals__["PublishThread"],
        "__init__",
        lambda _self, settings, _root: opened.append(settings.uri),
    )
    (result,) = tracking.sync(SETTINGS, root)
    assert not result.is_done
    assert f"give tracking.uri={uri}" in result.line()
    assert opened == []
    assert not (tmp_path / "theirs.db").exists()


def test_one_folder_that_is_left_out_does_not_hold_up_the_others(root: Path) -> None:
    shutil.copytree(root / "a", root / "b")
    change(root / "b/mlflow.json", lambda run: run.update(uid="f" * 32, uri="http://evil.example"))
    first, second = tracking.sync(SETTINGS, root)
    assert (first.is_done, second.is_done) == (True, False)


def test_a_folder_with_the_names_of_ones_own_run_replaces_no_run(root: Path) -> None:
    tracking.sync(SETTINGS, root)
    shutil.copytree(root / "a", root / "b")
    (root / "b/.tracking/published.json").unlink()
    change(root / "b/mlflow.json", lambda run: run.update(uid="f" * 32))
    for path in (root / "b/epochs").glob("*.json"):
        change(path, lambda one: one.update(uid="f" * 32))
    (result,) = tracking.sync(SETTINGS, root)
    assert result.is_done
    with sqlite3.connect(root / "mlflow.db") as store:
        stages = store.execute("SELECT name, lifecycle_stage FROM runs").fetchall()
    assert len(stages) == 2
    assert {stage for _, stage in stages} == {"active"}


def test_sync_writes_nothing_through_a_link_out_of_the_folder(root: Path, secret: Path) -> None:
    for name in (".tracking", "epochs"):
        shutil.rmtree(root / "a" / name)
        (root / "a" / name).symlink_to(secret.parent)
    (result,) = tracking.sync(SETTINGS, root)
    assert "leads out of" in result.line()
    assert list(secret.parent.iterdir()) == [secret]


@pytest.mark.parametrize("experiment", ["", "x" * 1000])
def test_sync_leaves_out_what_no_store_takes(experiment: str, root: Path) -> None:
    change(root / "a/mlflow.json", lambda run: run.update(experiment=experiment))
    (result,) = tracking.sync(SETTINGS, root)
    assert "tracking.experiment" in result.line()


def test_escapes_in_a_record_do_not_reach_the_screen(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(root / "a/mlflow.json", lambda run: run.update(uri="http://evil.example/\x1b[2J"))
    change(root / "a/mlflow.json", lambda run: run["new"].update(name="\x1b]0;x\x07"))
    with pytest.raises(SystemExit) as end:
        main.main(["sync", f"output_root={root}"])
    assert end.value.code == 1
    told = capsys.readouterr()
    assert "left out" in told.out
    assert "\x1b" not in told.out + told.err


def test_sync_of_a_folder_without_runs_says_so(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    with pytest.raises(TrackingError, match="is no run's folder, and holds none"):
        tracking.sync(SETTINGS, tmp_path, str(tmp_path / "etc"))


OLD_STATE = {
    "uid": "a" * 32,
    "uri": None,
    "experiment": "e",
    "name": "a",
    "sweep": "a",
    "epochs": [],
    "steps": {},
    "is_open": True,
}
SAMPLE = {"stem": "samples~0 a+step+1", "png": "AAAA"}
OLD_EPOCH = {"kind": "epoch", "epoch": 1, "points": [], "scores": [], "model": None}


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"run": 3, "operation": {"kind": "tag"}},
        {"run": OLD_STATE, "operation": {"kind": "epoch"}},
        {
            "run": {**OLD_STATE, "name": "../../../home/x"},
            "operation": {**OLD_EPOCH, "samples": [SAMPLE]},
        },
    ],
    ids=["empty", "number", "half", "name"],
)
def test_an_older_versions_files_of_another_shape_are_left_out(
    entry: dict[str, Any], tmp_path: Path, secret: Path
) -> None:
    folder = tmp_path / "outputs" / "old"
    (folder / ".tracking").mkdir(parents=True)
    (folder / "samples").mkdir()
    (folder / ".tracking" / "000001.json").write_text(json.dumps(entry))
    (result,) = tracking.sync(SETTINGS, tmp_path / "outputs")
    assert result.left_out is not None
    assert list(secret.parent.iterdir()) == [secret]


@pytest.mark.parametrize("name", ["states", "run.json", "samples", "deep/er"])
def test_resume_does_not_begin_in_a_folder_with_a_link_out_of_it(
    name: str, tmp_path: Path, secret: Path
) -> None:
    folder = tmp_path / "theirs"
    (folder / "deep").mkdir(parents=True)
    if name != "run.json":
        (folder / "run.json").write_text("{}")
    (folder / name).symlink_to(secret if name == "run.json" else secret.parent)
    with pytest.raises(ForeignFileError, match="leads out of"):
        resume.find(str(folder), tmp_path)
    assert list(secret.parent.iterdir()) == [secret]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        '{"name": 3}',
        '{"name": "a", "status": "x", "settings": "", "data": ""}',
        "[" * 100_000,
    ],
    ids=["empty", "list", "number", "types", "status", "deep"],
)
def test_a_record_of_another_shape_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(SettingsError, match=r"run\.json") as error:
        run_folder.read_record(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[]", '{"x": {}}', '{"1": {"members": 3}}', "{" * 9999])
def test_a_pack_of_another_shape_is_begun_anew(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "pack.json").write_text(text)
    path = provenance.note_companions(tmp_path, "a", [("a", 2), ("b", 1)], {})
    assert "pack.json" in caplog.text
    assert set(json.loads(path.read_text())) == {"2"}


def test_scores_of_another_shape_count_as_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / run_folder.OLD_SCORES / "000001.json"
    path.parent.mkdir()
    for text in ("3", '{"scores": {"x": "1"}, "terms": {}}', '{"scores": []}'):
        path.write_text(text)
        assert run_folder.read_scores(tmp_path, 1) is None
    assert len(caplog.records) == 3


def test_a_state_with_a_right_checksum_and_another_shape_is_no_state(tmp_path: Path) -> None:
    import hashlib

    import torch
    from safetensors.torch import save

    for value in ([], {"run": "a"}, {"run": 3, "pack": [], "started": 1.0, "snapshot": {}}):
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        content = save({saved_states._JSON: text})
        path = tmp_path / "1.state"
        path.write_bytes(hashlib.sha256(content).digest() + content)
        with pytest.raises(saved_states.StateError):
            saved_states.read(path)


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(SettingsError, match="pipe"):
        run_folder.read_record(tmp_path)


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o002, 0o664), (0o022, 0o644)])
def test_who_may_read_what_is_logged_is_up_to_the_umask(
    mask: int, mode: int, tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        with Tracker(SETTINGS, tmp_path) as tracker:
            log = tracker.open_run(new_run(tmp_path))
            log_epochs(log, tmp_path / "a", last=1)
            finish(log)
        run_folder.write_sweep(tmp_path, "x", "unfinished")
    finally:
        os.umask(before)
    paths = [tmp_path / "mlflow.db", tmp_path / "sweep.json"]
    paths += [*(tmp_path / "a").rglob("*.json"), *(tmp_path / "mlartifacts").rglob("*.yaml")]
    assert len(paths) > 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {mode}
