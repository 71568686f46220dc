"""Samplers and pruners from the options that the user gives to them under Optuna's names."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from lorasweep.core.settings import SettingsError, unknown_key
from lorasweep.sweeps.study.study_settings import StudySettings


def build_from_options(
    kind: type[Any],
    what: Literal["sampler", "pruner"],
    settings: StudySettings,
    own: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Any:
    """Build it from what we set, `startup_trials` where it takes such, and the user's options.

    Raises SettingsError for an option that it doesn't have or refuses.
    """
    where = f"study.{what}_options"
    known = [key for key in inspect.signature(kind).parameters if key != "study"]
    for key in options:
        if key not in known:
            raise SettingsError(unknown_key(f"{where}.{key}", [f"{where}.{one}" for one in known]))
    startup = {"n_startup_trials": settings.startup_trials}
    ours = {key: value for key, value in {**startup, **own}.items() if key in known}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a method is experimental
            return kind(**{**ours, **options})
    except (TypeError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        name = settings.sampler if what == "sampler" else settings.pruner
        raise SettingsError(f"{where} of {name}: {reason}") from None
