"""MLflow's outages: whose fault a failed write is, the store's (it waits) or its data's (refused).

While the store is away all waits on the disk, and is tried again with growing pauses. What a store
that answers doesn't take is refused: at the second time, or the fifth if it may be the store's. A
server that has too many requests (429) is left alone for as long as it asks, up to a bound.
"""

from __future__ import annotations

import re

from lorasweep.tracking.store import MlflowStore, TrackingError, is_server

LONGEST_ASKED = 300.0  # seconds; a server may name any number
PROBE_SECONDS = 10.0
TRIES = 5  # of a write that fails while the store answers otherwise

_TOO_MANY = re.compile(r"\b429 error\b|\berror code 429\b")  # of urllib3, of MLflow
_QUESTION = "/api/2.0/mlflow/experiments/get?experiment_id=0"
_TRY_LATER = frozenset({401, 403, 407, 408, 429})


class OutageError(RuntimeError):
    """The store is away; its cause is what a write failed with."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.pause = pause
        """Seconds for which the store asks not to be asked."""


def is_refused(error: Exception, store: MlflowStore, item: str) -> bool:
    """Is an item refused, once and for all? Else it is to be tried again at once.

    Raises OutageError where it is the store that failed, and all is to be tried again later.
    """
    if (pause := asked_pause(error, store.client.tracking_uri)) is not None:
        raise OutageError(pause) from error
    of_store = is_of_store(error)
    if of_store and not answers(store):
        raise OutageError from error
    store.failures[item] += 1
    if of_store and store.failures[item] < TRIES:
        raise OutageError from error
    return store.failures[item] > 1


def is_of_store(error: BaseException) -> bool:
    """Might the same write go well later? A server that is away, hangs or breaks; a full disk."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from requests.exceptions import HTTPError
    from sqlalchemy.exc import OperationalError

    if isinstance(error, HTTPError) and error.response is not None:
        return _is_transient(error.response.status_code)
    if isinstance(error, MlflowException):
        return _is_transient(error.get_http_status_code())
    return isinstance(error, RequestException | OperationalError | OSError | TrackingError)


def asked_pause(error: BaseException, address: str) -> float | None:
    """The seconds that a server which answers 429 asks for (`Retry-After`); None for other errors.

    MLflow, when it may not try again by itself, loses the answer's headers. So the server is asked
    once more, in place of the question whether it answers.
    """
    import requests
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    if not is_server(address) or not _TOO_MANY.search(str(error)):
        return None
    try:
        found = requests.get(f"{address.rstrip('/')}{_QUESTION}", timeout=PROBE_SECONDS)
        told = found.headers.get("Retry-After")
        after = Retry(0).parse_retry_after(told) if told else 0.0
    except (requests.RequestException, InvalidHeader):
        return 0.0
    return min(after, LONGEST_ASKED)


def answers(store: MlflowStore) -> bool:
    """Does the store answer a question that has an answer?"""
    try:
        store.client.get_experiment(store.experiment_id)
    except Exception as error:  # whatever it is, it is no answer
        return not is_of_store(error)
    return True


def _is_transient(status: int) -> bool:
    return status >= 500 or status in _TRY_LATER
