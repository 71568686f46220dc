"""MLflow's outages: whose fault a failed write is, the store's (it waits) or its data's (refused).

While the store is away all waits on the disk, and is tried again with growing pauses. What a store
that answers doesn't take is refused: at the second time, or the fifth if it may be the store's.
"""

from __future__ import annotations

from lorasweep.tracking.store import MlflowStore, TrackingError

TRIES = 5  # of a write that fails while the store answers otherwise

_TRY_LATER = frozenset({401, 403, 407, 408, 429})


class OutageError(RuntimeError):
    """The store is away; its cause is what a write failed with."""


def is_refused(error: Exception, store: MlflowStore, item: str) -> bool:
    """Is an item refused, once and for all? Else it is to be tried again at once.

    Raises OutageError where it is the store that failed, and all is to be tried again later.
    """
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


def answers(store: MlflowStore) -> bool:
    """Does the store answer a question that has an answer?"""
    try:
        store.client.get_experiment(store.experiment_id)
    except Exception as error:  # whatever it is, it is no answer
        return not is_of_store(error)
    return True


def _is_transient(status: int) -> bool:
    return status >= 500 or status in _TRY_LATER
