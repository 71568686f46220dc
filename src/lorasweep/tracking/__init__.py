"""MLflow: every run's settings, curves, pictures and checkpoints. The only home of mlflow.

Writing goes through a `Tracker`: to the disk at once, and from there to MLflow in order, on one
thread beside the training (`sync` sends what is left). Reading (`sweeps`,
`candidates`) and recording a choice (`record_choice`) are plain functions over a store's URI.
"""

from lorasweep.tracking.opening import NewRun
from lorasweep.tracking.operations import Status
from lorasweep.tracking.reading import (
    Candidate,
    candidates,
    config_of,
    fetch_file,
    record_choice,
    sweeps,
)
from lorasweep.tracking.server import experiment_page, page, serve
from lorasweep.tracking.spool import InUseError
from lorasweep.tracking.store import (
    PRUNED_TAG,
    TRIAL_TAG,
    Tracking,
    TrackingError,
    create_store,
    public_uri,
    sqlite_path,
)
from lorasweep.tracking.sync import Synced, sync, unsent
from lorasweep.tracking.tracker import RunLog, Tracker, mark_broken

__all__ = [
    "PRUNED_TAG",
    "TRIAL_TAG",
    "Candidate",
    "InUseError",
    "NewRun",
    "RunLog",
    "Status",
    "Synced",
    "Tracker",
    "Tracking",
    "TrackingError",
    "candidates",
    "config_of",
    "create_store",
    "experiment_page",
    "fetch_file",
    "mark_broken",
    "page",
    "public_uri",
    "record_choice",
    "serve",
    "sqlite_path",
    "sweeps",
    "sync",
    "unsent",
]
