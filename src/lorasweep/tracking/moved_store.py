"""A store that was moved with its output_root: the places of its files are mended in it, once.

MLflow writes the absolute place of every experiment's, run's and checkpoint's files into its
database, and its client can change none of them. So a project that was moved would look for its
files at the old place, and write new ones there. Only a SQLite file is mended: of a server or a
team's database nobody here knows who else reads it.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lorasweep.tracking.store import Tracking, sqlite_path

log = logging.getLogger(__name__)

_PLACES = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}
"""MLflow's tables and their columns that name places of files."""


def follow_move(settings: Tracking, output_root: Path) -> None:
    """Let the store name the files below the present `output_root`, if it was moved there.

    It says so when it does. A file that is no store is left to those who open it.
    """
    database, here = sqlite_path(settings.resolve(output_root)), settings.artifacts(output_root)
    if database is None or here is None or not database.is_file():
        return
    is_own = database.is_relative_to(output_root.resolve())
    try:
        with closing(_opened(database)) as opened:
            moved = [uri for uri in _roots(opened, here) if _has_moved(opened, uri, here, is_own)]
            for uri in moved:
                _mend(opened, uri, here)
                log.warning("the project was moved: its tracking store looks in %s now", here)
    except sqlite3.OperationalError as error:
        if "no such" not in str(error):  # tables of another program, or of an MLflow before them
            log.warning("%s names files of a place that they left, and stays so: %s", here, error)
    except sqlite3.DatabaseError:
        return


def _opened(database: Path) -> sqlite3.Connection:
    uri = f"{database.absolute().as_uri()}?mode=rw"
    return sqlite3.connect(uri, uri=True, timeout=20, isolation_level=None)


def _roots(opened: sqlite3.Connection, here: Path) -> list[str]:
    """The places of experiments that we have made in another output_root."""
    found = opened.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
    uris = [uri for (uri,) in found if isinstance(uri, str) and uri.startswith("file:///")]
    return [uri for uri in uris if _path(uri).name == here.name and _real(uri) != here]


def _has_moved(opened: sqlite3.Connection, uri: str, here: Path, is_own: bool) -> bool:
    """Do the files of this place lie `here` by now?

    A store below the output_root (`is_own`) has its files beside it, also those to come. One
    elsewhere may serve several projects, of which one is not to take another's files.
    """
    is_gone = not _path(uri).exists()
    return (is_own and is_gone) or ((is_own or is_gone) and _has_files(opened, uri, here))


def _has_files(opened: sqlite3.Connection, uri: str, here: Path) -> bool:
    known = opened.execute(
        "SELECT artifact_uri FROM runs WHERE substr(artifact_uri, 1, ?) = ?",
        (len(uri) + 1, f"{uri}/"),
    )
    return any((here / unquote(one[len(uri) + 1 :])).is_dir() for (one,) in known)


def _mend(opened: sqlite3.Connection, uri: str, here: Path) -> None:
    """All at once or, if the process dies, nothing."""
    opened.execute("BEGIN IMMEDIATE")
    for table, column in _PLACES.items():
        opened.execute(
            f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
            f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
            (here.as_uri(), len(uri) + 1, uri, len(uri) + 1, f"{uri}/"),
        )
    opened.execute("COMMIT")


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path))


def _real(uri: str) -> Path:
    return Path(os.path.realpath(_path(uri)))
