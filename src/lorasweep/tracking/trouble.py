"""Whose fault a failed write is: the store's, so that it is tried again, or its data's."""

from __future__ import annotations

from lorasweep.tracking.operations import Store
from lorasweep.tracking.store import TrackingError

_NOT_NOW = frozenset({"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"})
_NOT_YOU = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED"})
_REFUSED = frozenset({401, 403, 407, 408, 429})


def is_of_store(error: BaseException) -> bool:
    """Might the same write go well later? A server that is away, hangs or breaks; a full disk."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from requests.exceptions import HTTPError
    from sqlalchemy.exc import OperationalError

    if isinstance(error, HTTPError) and error.response is not None:
        return _is_transient(error.response.status_code)
    if isinstance(error, MlflowException):
        known = error.error_code in _NOT_NOW | _NOT_YOU
        return known or _is_transient(error.get_http_status_code())
    return isinstance(error, RequestException | OperationalError | OSError | TrackingError)


def answers(store: Store) -> bool:
    """Does the store answer a question that has an answer?"""
    try:
        store.client.get_experiment(store.experiment_id)
    except Exception as error:  # whatever it is, it is no answer
        return not is_of_store(error)
    return True


def _is_transient(status: int) -> bool:
    return status >= 500 or status in _REFUSED
