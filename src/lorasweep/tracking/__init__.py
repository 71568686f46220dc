"""MLflow: every run's settings, curves, pictures and checkpoints. The only home of mlflow.

A run is logged into its own folder (`tracker.py` writes `records.py`); MLflow is brought up to date
from there (`publish.py`), on one thread beside the training or by `lorasweep sync`. Candidates and
logged runs are read back from MLflow (`read_candidates.py`, `history.py`). Open `tracker.py` first.
"""

from lorasweep.tracking.model_registry import record_choice
from lorasweep.tracking.read_candidates import Candidate, candidates, config_of, fetch_file
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
    "candidates",
    "config_of",
    "fetch_file",
    "record_choice",
    "sync",
]
