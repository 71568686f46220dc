"""From the settings to a store that is open, and to the thread that writes to it."""

from __future__ import annotations

from pathlib import Path

from lorasweep.tracking.operations import Store
from lorasweep.tracking.store import Tracking, client_of, create_store, public_uri, sqlite_path
from lorasweep.tracking.writer import Writer


def writer_for(settings: Tracking, output_root: Path) -> Writer:
    """The thread that writes to the store that the settings name."""
    uri = settings.resolve(output_root)
    return Writer(
        None if settings.offline else lambda: _connect(settings, output_root),
        place=public_uri(uri),
        patience=settings.max_wait_seconds,
        can_hang=sqlite_path(uri) is None,
    )


def _connect(settings: Tracking, output_root: Path) -> Store:
    uri, artifacts = settings.resolve(output_root), settings.artifacts(output_root)
    if artifacts is None or sqlite_path(uri) is not None:  # a server, or safe by itself
        experiment_id = create_store(uri, settings.experiment, artifacts)
        return Store(client_of(uri), experiment_id)
    from filelock import FileLock

    output_root.mkdir(parents=True, exist_ok=True)
    with FileLock(output_root / ".mlflow.lock"):  # two workers can't make the tables at once
        experiment_id = create_store(uri, settings.experiment, artifacts)
    return Store(client_of(uri), experiment_id)
