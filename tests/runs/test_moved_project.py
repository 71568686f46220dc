"""A project that was moved or renamed: every command finds all of it where it lies now, and writes
nothing at the old place."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

import old_runs
from command_line import exit_code
from lorasweep.config.begun_command import begun_by
from lorasweep.export import picture_check
from lorasweep.tracking import ui_server
from old_runs import BROKEN, FINISHED, SEARCH


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A project at its first place: where its database says that it lies."""
    home = tmp_path / "old"
    home.mkdir()
    old_runs.unpack(home)
    return home


@pytest.fixture
def moved(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project, as a whole, at its new place; the old one is gone."""
    home = tmp_path / "elsewhere" / "with a space"
    home.parent.mkdir()
    shutil.move(old, home)
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def renamed(old: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project, of which output_root alone has another name."""
    (old / "outputs").rename(old / "results")
    monkeypatch.chdir(old)
    return old


def places(database: Path) -> set[str]:
    """Below which the store looks for files."""
    with closing(sqlite3.connect(database)) as opened:
        rows = opened.execute(
            "SELECT artifact_uri FROM runs UNION SELECT artifact_location FROM logged_models"
            " UNION SELECT artifact_location FROM experiments WHERE experiment_id > 0"
        )
        return {row[0].partition("/mlartifacts")[0] for row in rows}


def test_pick_sync_and_export_work_at_the_present_place(
    moved: Path,
    old: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = Image.new("RGB", (8, 8))  # what is exported is not the question here
    monkeypatch.setattr(picture_check, "draw", lambda *_, **__: picture)
    monkeypatch.setattr(picture_check, "draw_with", lambda *_, **__: picture)
    assert exit_code("pick") == 0
    assert list((moved / "outputs" / "picked").rglob("*.safetensors"))
    assert "the project was moved" in caplog.text
    caplog.clear()
    assert exit_code("sync") == 0
    assert exit_code("export", FINISHED, "--to", "kohya") == 0
    assert "the project was moved" not in caplog.text  # said once
    assert places(moved / "outputs" / "mlflow.db") == {(moved / "outputs").as_uri()}
    assert not old.exists()


def test_ui_serves_the_present_place(
    moved: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ui_server, "_become_server", lambda *_: 0)
    assert exit_code("ui", "--port", "5999") == 0
    assert places(moved / "outputs" / "mlflow.db") == {(moved / "outputs").as_uri()}
    assert not old.exists()


def test_a_broken_off_run_goes_on_at_the_present_place(moved: Path, old: Path) -> None:
    (folder,) = (moved / "outputs" / BROKEN).iterdir()
    assert exit_code("resume", BROKEN) == 0
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert not old.exists()


def test_a_finished_run_is_made_again_at_the_present_place(moved: Path, old: Path) -> None:
    assert exit_code("reproduce", FINISHED) == 0
    assert not old.exists()


def test_a_renamed_output_root_is_gone_on_in(renamed: Path) -> None:
    assert exit_code("pick", "output_root=results") == 0
    assert exit_code("resume", BROKEN, "output_root=results") == 0
    assert places(renamed / "results" / "mlflow.db") == {(renamed / "results").as_uri()}
    assert not (renamed / "outputs").exists()


def test_a_sweep_goes_on_where_it_lies(moved: Path, old: Path) -> None:
    folder = moved / "outputs" / SEARCH / "mine"
    begun = begun_by(folder)
    assert begun.cwd == moved
    assert not [word for word in begun.argv if str(old) in word]


def test_a_copy_is_a_project_of_its_own(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(old, copy, symlinks=True)
    monkeypatch.chdir(copy)
    assert exit_code("pick") == 0
    assert places(copy / "outputs" / "mlflow.db") == {(copy / "outputs").as_uri()}
    assert places(old / "outputs" / "mlflow.db") == {(old / "outputs").as_uri()}
    assert not (old / "outputs" / "picked").exists()
