"""The MLflow store: its settings, its address without secrets, opening it, making it safely."""

from __future__ import annotations

import gc
import logging
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import PositiveFloat

from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.settings import Settings
from lorasweep.core.text import listed, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, LoggedModel
    from mlflow.entities import Run as MlflowRun


SWEEP_TAG = "lorasweep.sweep"
RUN_TAG = "lorasweep.run"
CHECKPOINT_TAG = "lorasweep.checkpoint"
EPOCH_TAG = "lorasweep.epoch"
PATH_TAG = "lorasweep.path"
PICKED_TAG = "lorasweep.picked"
CHOSEN_BY_TAG = "lorasweep.chosen_by"
REASON_TAG = "lorasweep.reason"
TERMS_TAG = "lorasweep.terms"
TRIAL_TAG = "lorasweep.trial"
PRUNED_TAG = "lorasweep.pruned"
FOLDERS_TAG = "lorasweep.folders"  # of a run: its data set, in kohya's folders
FOLDER_TAG = "lorasweep.folder"  # of the run, where it was trained
UID_TAG = "lorasweep.uid"  # made where a run is begun, so that it is found without MLflow's id
TRAINED_AS_TAG = "lorasweep.trained_as"  # of a run that was copied: whose weights it has
SUSPENDED_TAG = "lorasweep.suspended"
SETTING_TAG = "lorasweep.setting"  # of a checkpoint: a digest of its settings without the seed
SEED_TAG = "lorasweep.seed"  # of a checkpoint
HASH_TAG = "lorasweep.hash"  # of a checkpoint's data: kohya's sshs_model_hash
NOTE_TAG = "mlflow.note.content"  # MLflow shows it above a run

BEST = "best/"  # metrics of a run's best checkpoint so far: best/val/loss_rel, best/epoch

MAX_PARAM = 6000  # characters, MLflow's limits
MAX_TAG = 8000
MAX_KEY = 250
RUNS_A_PAGE = 200  # each has some hundred params
MODELS_A_PAGE = 800  # MLflow's 100 take twice the time
MAX_EXPERIMENT = 500
MAX_REGISTERED_MODEL = 256

_CAUSES = (
    "connection refused",
    "timed out",
    "name or service not known",
    "no route to host",
    "network is unreachable",
    "connection reset",
)
_KINDS = {"sqlite", "postgresql", "mysql", "mssql", "http", "https"}  # MLflow's, before a +driver
_SECRETS = "(?i:password|passwd|secret|token|credential|api_?key|access_?key)"  # in queries


class TrackingError(RuntimeError):
    """The tracking store can't be read or written; the message is one line with the remedy."""


@dataclass(frozen=True, kw_only=True)
class Tracking(Settings):
    """Where runs are logged."""

    uri: str | None
    experiment: str
    registered_model: str = field(compare=False)  # pick's alone: the runs may share a pack
    upload: Literal["none", "picked", "all"]
    offline: bool
    max_wait_seconds: PositiveFloat

    def __post_init__(self) -> None:
        if self.uri is not None:
            _check_address(self.uri)
        longest = {"experiment": MAX_EXPERIMENT, "registered_model": MAX_REGISTERED_MODEL}
        for key, length in longest.items():
            name = getattr(self, key)
            if not name.strip():
                raise ValueError(f"tracking.{key} is empty: give it a name")
            if len(name) > length:
                raise ValueError(f"tracking.{key}={shown(name, 20)}: use at most {length} letters")
        if set(self.registered_model) & set("/:"):
            raise ValueError(
                f"tracking.registered_model={self.registered_model}: use no / and no : in it"
            )

    @property
    def is_remote(self) -> bool:
        """Is the store anything but a SQLite file?"""
        return self.uri is not None and sqlite_path(self.uri) is None

    def resolve(self, output_root: Path) -> str:
        """The store's absolute URI; null is a SQLite file under `output_root`."""
        if self.uri is None:
            return _sqlite_uri(output_root.resolve() / "mlflow.db")
        database = sqlite_path(self.uri)
        if database is None:
            return self.uri
        _, mark, options = self.uri.partition("?")
        return f"{_sqlite_uri(database.resolve())}{mark}{options}"

    @property
    def public_uri(self) -> str | None:
        """The URI as it is given, without secrets; None is a SQLite file under output_root."""
        return None if self.uri is None else public_uri(self.uri)

    def artifacts(self, output_root: Path) -> Path | None:
        """Where pictures and files go; a server (None) decides that itself."""
        return None if is_server(self.uri or "") else output_root.resolve() / "mlartifacts"


@dataclass
class MlflowStore:
    """An open store, as the publishing thread uses it."""

    client: MlflowClient
    experiment_id: str
    uri: str | None
    """As in the settings, without secrets."""
    experiment: str
    datasets: Path
    """The written data sets, whose packed images are logged too."""
    run_ids: dict[str, str] = field(default_factory=dict)
    """MLflow's ids of the runs that were found or begun, by our uids."""
    failures: Counter[str] = field(default_factory=Counter)
    """How often an item could not be sent while the store answered otherwise."""


def _check_address(uri: str) -> None:
    """Raise ValueError for what can't be an address of a store."""
    told = "give sqlite:///PATH/mlflow.db, a server's http(s):// address, or null"
    try:
        parts = urlsplit(uri)
        has_place = bool(parts.port or parts.hostname or parts.path.strip("/"))
    except ValueError:  # a port of six digits, half of an IPv6 address
        raise ValueError(f"tracking.uri={public_uri(uri)}: is no address; {told}") from None
    kind = parts.scheme.partition("+")[0]
    if kind in ("", "file"):
        raise ValueError(
            f"tracking.uri={public_uri(uri)}: MLflow no longer keeps runs in plain files; {told}"
        )
    if kind not in _KINDS:
        raise ValueError(f"tracking.uri={public_uri(uri)}: MLflow keeps nothing by {kind}; {told}")
    if not has_place or (is_server(uri) and not parts.hostname):
        raise ValueError(f"tracking.uri={public_uri(uri)}: names no place; {told}")


def open_store(settings: Tracking, output_root: Path) -> MlflowStore:
    """Open the store that the settings name, and make it if need be. Raises TrackingError."""
    from filelock import FileLock

    uri, artifacts = settings.resolve(output_root), settings.artifacts(output_root)
    if artifacts is None or sqlite_path(uri) is not None:  # a server, or safe by itself
        experiment_id = create_store(uri, settings.experiment, artifacts)
    else:
        output_root.mkdir(parents=True, exist_ok=True)
        with FileLock(output_root / ".mlflow.lock"):  # two workers can't make the tables at once
            experiment_id = create_store(uri, settings.experiment, artifacts)
    return MlflowStore(
        client_of(uri),
        experiment_id,
        settings.public_uri,
        settings.experiment,
        output_root / "datasets",
    )


def create_store(uri: str, experiment: str, artifacts: Path | None) -> str:
    """Make the store and its experiment where they don't exist; returns the experiment's id.

    Safe when several processes start at once. Raises TrackingError when it can't be opened.
    """
    from filelock import FileLock

    quieten_mlflow()
    database = sqlite_path(uri)
    if database is None:
        return _ensure_experiment(uri, experiment, artifacts)
    _check_file(database)
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        # MLflow's own set-up is not safe: of four processes on a fresh file it kills three.
        with FileLock(database.with_name(f".{database.name}.lock")):
            if not database.exists():
                _create_database(database)
            return _ensure_experiment(uri, experiment, artifacts)
    except OSError as error:
        raise TrackingError(
            f"tracking store {database} can't be written ({error.strerror or error}); "
            "give another output_root or tracking.uri"
        ) from error


def open_experiment(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """A client and the experiment's id; TrackingError where nothing was ever logged."""
    database = sqlite_path(uri)
    missing = f"nothing is tracked yet in {public_uri(uri)}, experiment {experiment}: train first"
    if database is not None and not database.exists():
        raise TrackingError(missing)
    _check_file(database)
    client = client_of(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        others = [one.name for one in client.search_experiments() if one.name != "Default"]
        there = f"; or give tracking.experiment=NAME, there are: {listed(others)}" if others else ""
        raise TrackingError(f"{missing}{there}")
    _check_is_there(found)
    return client, str(found.experiment_id)


def check_experiment(uri: str, experiment: str) -> None:
    """Raise TrackingError if somebody has deleted the experiment; nothing is made or changed.

    A store that doesn't say is left to those who open it.
    """
    from mlflow.exceptions import MlflowException

    database = sqlite_path(uri)
    if database is not None and not _has_experiments(database):
        return  # MLflow would make its tables there
    try:
        found = client_of(uri).get_experiment_by_name(experiment)
    except MlflowException:
        return
    if found is not None:
        _check_is_there(found)


def _has_experiments(database: Path) -> bool:
    import sqlite3

    if not database.is_file():
        return False
    with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as opened:
        tables = opened.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'")
        return tables.fetchone() is not None


def _check_is_there(experiment: Experiment) -> None:
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"tracking.experiment={shown(experiment.name)} was deleted in MLflow; give another"
            f" name, or restore it: `mlflow experiments restore -x {experiment.experiment_id}` with"
            " MLFLOW_TRACKING_URI set to the store"
        )


def _check_file(database: Path | None) -> None:
    """Raise TrackingError for what MLflow would try to open for minutes."""
    if database is not None and database.exists() and not database.is_file():
        raise TrackingError(
            f"tracking store {database} is not a file; give another output_root or tracking.uri"
        )


def client_of(uri: str) -> MlflowClient:
    """MLflow's client of the store; TrackingError when it can't be opened."""
    quieten_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, SQLAlchemyError) as error:
        raise unreachable(uri, error) from error


def explain(error: Exception) -> str | None:
    """One line for what MLflow, or the database behind it, raised; None for any other error."""
    origin = type(error).__module__.partition(".")[0]
    if origin not in ("mlflow", "sqlalchemy", "alembic"):
        return None
    lines = str(error).splitlines() or [type(error).__name__]
    return f"the tracking store refuses: {public_uri(lines[0])[:300]}"


def sqlite_path(uri: str) -> Path | None:
    """The file behind a `sqlite:///` URI, or None for any other store."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(unquote(path)) if uri.startswith("sqlite:///") else None


def _sqlite_uri(database: Path) -> str:
    """With what would be taken as a part of the URI (`a%20b`, `a?b`) written as SQLAlchemy does.

    MLflow makes an empty folder of that spelling (`a%2520b`) too.
    """
    return f"sqlite:///{str(database).replace('%', '%25').replace('?', '%3F')}"


def is_server(uri: str) -> bool:
    """Is the store behind an MLflow server?"""
    return urlsplit(uri).scheme in ("http", "https")


def public_uri(text: str) -> str:
    """The URI, or any text with URIs in it, without user names, passwords and tokens."""
    text = re.sub(r"(\w://)[^/\s'\"<>]*@", r"\1***@", text)
    return re.sub(rf"([?&][\w.-]*(?:{_SECRETS})[\w.-]*=)[^&\s'\"<>#]+", r"\1***", text)


def short_reason(error: BaseException) -> str:
    """The error in part of a line, without secrets."""
    text = str(error)
    for cause in _CAUSES:  # requests wraps these in its classes' names, twice
        if text.startswith("API request to") and cause.lower() in text.lower():
            return cause
    return public_uri(text.partition("\n")[0])[:300] or type(error).__name__


def tagged(tags: Mapping[str, str | None]) -> str:
    """MLflow's filter for what has these tags; None leaves one out."""
    return " AND ".join(
        f"tags.`{tag}` = {quoted(value)}" for tag, value in tags.items() if value is not None
    )


def quoted(value: str) -> str:
    """A text in MLflow's filters."""
    return f'"{value}"' if "'" in value else f"'{value}'"


def safe_key(key: str) -> str:
    """A name that MLflow takes for a param, metric or tag."""
    return re.sub(r"[^\w\-. /]", "_", key).strip("/")[:MAX_KEY]


def search_runs(
    client: MlflowClient, experiment_id: str, where: str = "", *, deleted: bool = False
) -> list[MlflowRun]:
    """The runs of an experiment that fit MLflow's filter, newest first; all if it is empty.

    Those that are there, or with `deleted` those that somebody has deleted in MLflow.
    """
    return list(each_run(client, experiment_id, where, deleted=deleted))


def differing(params: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys in which runs' params differ, sorted."""
    keys = sorted({key for one in params for key in one})
    return [key for key in keys if len({one.get(key) for one in params}) > 1]


def each_run(
    client: MlflowClient, experiment_id: str, where: str = "", *, deleted: bool = False
) -> Iterator[MlflowRun]:
    """The runs of `search_runs`, of which only some are in memory at a time."""
    from mlflow.entities import ViewType

    return _all_pages(
        lambda token: client.search_runs(
            [experiment_id],
            where,
            ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY,
            max_results=RUNS_A_PAGE,
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
    )


def newest_run(client: MlflowClient, experiment_id: str, where: str) -> MlflowRun | None:
    """The newest run that fits MLflow's filter; the others are not read."""
    order = ["attributes.start_time DESC"]
    found = client.search_runs([experiment_id], where, max_results=1, order_by=order)
    return found[0] if found else None


def search_models(client: MlflowClient, experiment_id: str, where: str = "") -> list[LoggedModel]:
    """The models (checkpoints) of an experiment that fit MLflow's filter; all if it is empty."""
    return list(each_model(client, experiment_id, where))


def each_model(client: MlflowClient, experiment_id: str, where: str = "") -> Iterator[LoggedModel]:
    """The models of `search_models`, of which only some are in memory at a time."""
    return _all_pages(
        lambda token: client.search_logged_models(
            [experiment_id],
            filter_string=where or None,
            max_results=MODELS_A_PAGE,
            page_token=token,
        )
    )


def _all_pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    token = None
    while True:
        with _no_collector():
            page = search(token)
        token = page.token
        yield from page
        del page  # before the next one is read
        if not token:
            return


@contextmanager
def _no_collector() -> Iterator[None]:
    """Without Python's search for cyclic garbage: it doubles the time of a large page of MLflow's.

    Each model there is some twenty objects of SQLAlchemy's, which all live until the page ends.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def quieten_mlflow() -> None:
    """Settings that MLflow reads from the environment; those of the user stand, but for retries."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLflow sends again what may have arrived, which makes runs twice; `publish` looks first
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    # a line for each migration, and "Waiting up to 300 seconds" for what is there at once
    for name in ("alembic", "mlflow.store.model_registry.abstract_store"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # a traceback for every write that meets a locked database; we try again, and say so
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def _create_database(database: Path) -> None:
    """Make MLflow's tables, which take seventy migrations, in one step: whole or not at all.

    Each migration is flushed to the disk, 5 s in all where the work takes 1 s. So they are made
    in SQLite's memory, which the two connections share by its name, and written from there.
    """
    import sqlite3

    from mlflow import MlflowClient

    draft = f"file:lorasweep-{uuid.uuid4().hex}?mode=memory&cache=shared"
    with closing(sqlite3.connect(draft, uri=True)) as connection:
        MlflowClient(f"sqlite:///{draft}&uri=true")
        write_atomically(database, connection.serialize())


def _ensure_experiment(uri: str, name: str, artifacts: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    client = client_of(uri)
    location = artifacts.as_uri() if artifacts else None
    try:
        found = client.get_experiment_by_name(name)
        if found is not None:
            _check_is_there(found)
        return str(found.experiment_id if found else client.create_experiment(name, location))
    except MlflowException as error:
        if error.error_code == "RESOURCE_ALREADY_EXISTS":  # made by another process just now
            return str(client.get_experiment_by_name(name).experiment_id)
        raise unreachable(uri, error) from error


def unreachable(uri: str, error: BaseException) -> TrackingError:
    """What is said of a store that can't be opened, in one line."""
    advice = "start the server" if is_server(uri) else "give another"
    return TrackingError(
        f"tracking.uri={public_uri(uri)} can't be opened: {short_reason(error)}; {advice}, or"
        " tracking.offline=true to send everything later, or tracking.uri=null for a file"
    )
