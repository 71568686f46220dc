"""Where a study is kept, and that one process at a time drives it."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from lorasweep.core import local_pages
from lorasweep.core.settings import SettingsError
from lorasweep.runs.run_folder import sweep_name

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

JOURNAL = "study.journal"
LOCK = ".driver.lock"


def open_storage(storage: str | None, folder: Path) -> BaseStorage:
    """The sweep's own journal in its folder, or the database or journal file that was named.

    Raises SettingsError for a database that can't be reached or whose driver is missing.
    """
    journal = journal_path(storage, folder)
    return _journal(journal) if journal is not None else _database(str(storage))


def journal_path(storage: str | None, folder: Path) -> Path | None:
    """The file that the sweep of a folder is kept in; None for a database."""
    if storage is None:
        return folder / JOURNAL
    return None if "://" in storage else Path(storage).expanduser()


@contextmanager
def only_driver(folder: Path, name: str, storage: str | None = None) -> Iterator[None]:
    """Hold the sweep's lock. Raises SettingsError, at once, if another process has it.

    The operating system keeps it (flock on a file in the sweep's folder, and beside a named
    journal), so it ends with the process, however that ends. It holds between machines that share
    the folder, as far as their file system has locks. PostgreSQL keeps one for all of its clients.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / ".driver"
    by = owner.read_text() if owner.exists() else "another process"
    with ExitStack() as held:
        if not _flocked(held, folder / LOCK):
            raise _driven(name, by)
        owner.write_text(f"process {os.getpid()} on {os.uname().nodename}")
        if storage is not None and not _storage_locked(held, storage, name):
            raise _driven(name, "another process, from another folder")
        yield


def _driven(name: str, by: str) -> SettingsError:
    return SettingsError(
        f"sweep {name} is being driven by {by}; wait for it, or give another study.name"
    )


def _flocked(held: ExitStack, path: Path) -> bool:
    try:
        held.enter_context(FileLock(path, timeout=0))
    except Timeout:
        return False
    return True


def _storage_locked(held: ExitStack, storage: str, name: str) -> bool:
    """Lock the study where it is kept; a database other than PostgreSQL has no such lock."""
    if "://" not in storage:
        journal = Path(storage).expanduser().absolute()
        journal.parent.mkdir(parents=True, exist_ok=True)
        return _flocked(held, journal.with_name(f".{journal.name}.{name}{LOCK}"))
    if not storage.startswith("postgresql"):
        return True
    return _advisory_locked(held, storage, name)


def _advisory_locked(held: ExitStack, url: str, name: str) -> bool:
    """A lock of the server's on the study's name, which ends with the connection."""
    from sqlalchemy import create_engine, text

    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
    with _explained(url):
        engine = create_engine(url, isolation_level="AUTOCOMMIT")
        held.callback(engine.dispose)
        connection = held.enter_context(engine.connect())
        taken = connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": key})
        return bool(taken.scalar())


def find_journal(sweep: str | None, output_root: Path, but: Path | None = None) -> Path:
    """The journal of a sweep by its name (as `pick` knows it), folder or file; else the newest.

    One may be left out. Raises SettingsError that lists what there is.
    """
    left_out = but.resolve() if but is not None else None
    found = [path for path in output_root.glob(f"*/*/{JOURNAL}") if path.resolve() != left_out]
    found.sort(key=lambda path: path.stat().st_mtime)
    if sweep is None:
        if not found:
            raise SettingsError(f"no sweep with a study is in {output_root}: lorasweep sweep NAME")
        return found[-1]
    given = Path(sweep).expanduser()
    for path in (given, given / JOURNAL):
        if path.is_file() and path.resolve() != left_out:
            return path.absolute()
    named = [path for path in found if sweep in (sweep_name(path.parent), path.parent.name)]
    if not named:
        known = ", ".join(sweep_name(path.parent) for path in found) or "none"
        other = " but this one" if but is not None else ""
        raise SettingsError(
            f"{sweep}: there is no such sweep{other} with a study; there are: {known}"
        )
    return named[-1]


def show(sweep: str | None, storage: str | None, output_root: Path, port: int) -> int:
    """Serve optuna-dashboard for a sweep's journal, or a database, on this machine only.

    Returns when interrupted. Raises SettingsError if there is no such sweep, or the port is taken.
    """
    try:
        from optuna_dashboard import wsgi
    except ImportError:
        raise SettingsError(
            "optuna-dashboard is not installed: pip install 'lorasweep[dashboard]'"
        ) from None
    where = storage if storage is not None else str(find_journal(sweep, output_root))
    opened = open_storage(where, output_root)
    print(f"optuna-dashboard shows {_safe(where) if '://' in where else where}")
    print(f"http://{local_pages.HOST}:{port}/  Stop it with Ctrl-C.", flush=True)
    local_pages.serve(wsgi(opened), port)  # its own server answers to any name
    return 0


def _journal(path: Path) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = path.absolute()
    if path.exists() and not path.is_file():
        raise SettingsError(f"{path} is not a file; give another study.storage")
    path.parent.mkdir(parents=True, exist_ok=True)
    # flock instead of Optuna's own file: a killed process leaves nothing to wait for
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with lock:
        _mend(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lock is not of Optuna's own class
        try:
            return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type]
        except (ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            raise SettingsError(
                f"{path} is damaged, or no journal of a study ({type(error).__name__}): move it"
                " away, or give another study.name"
            ) from None


def _mend(path: Path) -> None:
    """Cut a last line that a killed process left unfinished; Optuna would refuse the whole file."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("rb+") as file:
            file.truncate(whole)


def _database(url: str) -> BaseStorage:
    from optuna.storages import RDBStorage

    with _explained(url):  # pinged, for servers close connections that were idle for an epoch
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """What a database answers, in one line. Raises SettingsError."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except ImportError as error:
        raise SettingsError(f"study.storage: {error}; install the database's driver") from None
    except SQLAlchemyError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise SettingsError(f"study.storage={_safe(url)}: {reason}") from None


def _safe(url: str) -> str:
    """The address without its password."""
    from sqlalchemy import make_url

    return make_url(url).render_as_string(hide_password=True)
