"""What is logged while MLflow is away or the process dies arrives whole, and each thing once."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from mlflow import MlflowClient

from logged import SETTINGS, finish, log_epochs, new_run, snapshot
from lorasweep import tracking
from lorasweep.tracking import Tracker, store

CALLS = """search_runs create_run log_batch log_inputs log_artifacts log_artifact set_tag delete_tag
    create_logged_model log_outputs log_model_artifacts finalize_logged_model set_terminated
    update_run search_logged_models"""


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, to copy: making one takes a second."""
    database = tmp_path_factory.mktemp("tables") / "mlflow.db"
    store.quieten_mlflow()
    store._create_database(database)
    return database


@pytest.fixture
def root(tmp_path: Path, tables: Path) -> Path:
    shutil.copy(tables, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tables: Path) -> list[dict[str, Any]]:
    """What MLflow has of a run that nothing disturbed."""
    root = tmp_path_factory.mktemp("unbroken")
    shutil.copy(tables, root / "mlflow.db")
    train(root)
    return snapshot(SETTINGS.resolve(root))


def train(root: Path, *, goes_on: bool = False) -> None:
    """A whole run; what was logged before is logged again, as after a resume."""
    with Tracker(SETTINGS, root) as tracker:
        log = tracker.open_run(new_run(root), goes_on=goes_on)
        log_epochs(log, root / "a")
        finish(log)


def die_in(train: Callable[[Path], None], root: Path, *, call: int, patched: list[Any]) -> bool:
    """Train in a process that dies right after the call with that number; did it come so far?"""

    def child() -> None:
        done = 0

        def dying(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                nonlocal done
                result = original(*args, **kwargs)
                done += 1
                if done == call:
                    os._exit(9)
                return result

            return wrapper

        for owner, name in patched:
            patch.object(owner, name, dying(getattr(owner, name))).start()
        train(root)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, 9)
    return process.exitcode == 9


CLIENT = [(MlflowClient, name) for name in CALLS.split()]


@pytest.mark.parametrize("first", range(6))
def test_a_process_killed_after_any_call_loses_nothing_and_repeats_nothing(
    first: int, tmp_path: Path, tables: Path, unbroken: list[dict[str, Any]]
) -> None:
    call = first + 1
    for call in range(first + 1, 1000, 6):
        root = tmp_path / str(call)
        root.mkdir()
        shutil.copy(tables, root / "mlflow.db")
        died = die_in(train, root, call=call, patched=CLIENT)
        if not died:
            break
        train(root, goes_on=True)
        assert snapshot(SETTINGS.resolve(root)) == unbroken, f"killed after call {call}"
        assert tracking.unsent(root) == []
    assert call > 18
