"""MLflow: every run's settings, curves, pictures and checkpoints. The only home of mlflow.

A run is logged into its own folder (`tracker.py` writes `records.py`); MLflow is brought up to date
from there (`publish.py`), on one thread beside the training or by `lorasweep sync`. Candidates and
logged runs are read back from MLflow (`read_candidates.py`, `history.py`). Open `tracker.py` first.
"""

from lorasweep.tracking.model_registry import check_place, record_choice
from lorasweep.tracking.read_candidates import (
    Candidate,
    base_score,
    candidates,
    config_of,
    local_file,
    read_checkpoint,
)
from lorasweep.tracking.records import NewRun
from lorasweep.tracking.store import Tracking, TrackingError
from lorasweep.tracking.sync import sync
from lorasweep.tracking.tracker import Tracker

__all__ = [
    "Candidate",
    "NewRun",
    "Tracker",
    "Tracking",
    "TrackingError",
    "base_score",
    "candidates",
    "check_place",
    "config_of",
    "local_file",
    "read_checkpoint",
    "record_choice",
    "sync",
]
