"""What must stay as it was when a sweep goes on: objectives, space, overrides and settings."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna

from lorasweep.config.conf_folder import PACKAGE
from lorasweep.config.run import Run
from lorasweep.config.settings_digest import changes_nothing, that_count
from lorasweep.core.components import with_short_names
from lorasweep.core.settings import SettingsError
from lorasweep.core.text import listed
from lorasweep.judging.pick_rule import LOSS, SCORE
from lorasweep.sweeps.study.search_space import Space
from lorasweep.sweeps.study.study_settings import StudySettings
from lorasweep.sweeps.study.trial_attributes import BASIS

log = logging.getLogger(__name__)


def runs_basis(fixed: Sequence[str], runs: Mapping[str, Run]) -> dict[str, Any]:
    """What must stay of a sweep's runs: `fixed` overrides, and the settings of runs by their point.

    How it searches and where it runs may change.
    """
    names = {one: one.lstrip("+~").partition("=")[0] for one in fixed}
    return {
        "overrides": sorted(one for one, name in names.items() if not _is_free(name)),
        "settings": _settings(next(iter(runs.values()))),  # for files are edited too
        "points": _varying({point: _settings(run) for point, run in runs.items()}),
    }


def study_basis(
    settings: StudySettings, space: Space, of_runs: Mapping[str, Any]
) -> dict[str, Any]:
    """The study's question and space, and what must stay of its runs."""
    return {
        **question(settings),
        "study.constraints": dict(settings.constraints),  # old trials' bounds
        "study.params": {n: repr(p) for n, p in space.parameters.items()},
        "study.conditions": {n: repr(c) for n, c in space.conditions.items()},
        **of_runs,
    }


def question(settings: StudySettings) -> dict[str, list[str]]:
    """What the values of a study's trials are."""
    return {
        "study.objectives": list(settings.objectives),
        "study.maximize": sorted(settings.maximize),
    }


def begun_with(study: optuna.Study) -> dict[str, Any]:
    """The basis that a study was begun with; {} of a new one."""
    logged = json.dumps(study.user_attrs.get(BASIS, {}))
    basis: dict[str, Any] = json.loads(with_short_names(logged))
    return basis


def as_begun(study: optuna.Study, settings: StudySettings) -> StudySettings:
    """The settings, but of a study that an older version began by LOSS its objectives."""
    older = [LOSS if name == SCORE else name for name in settings.objectives]
    if SCORE not in settings.objectives or begun_with(study).get("study.objectives") != older:
        return settings
    log.info("sweep %s was begun by %s, and goes on by it", study.study_name, listed(older))
    return replace(settings, objectives=older)


def changed(study: optuna.Study, ours: Mapping[str, Any]) -> str | None:
    """What of the basis is not as it was when the study was begun."""
    theirs = begun_with(study)
    return next((key for key in theirs if ours.get(key) != theirs[key]), None)


def check_basis(study: optuna.Study, ours: Mapping[str, Any], settings: StudySettings) -> None:
    """Note the basis of a new study; raise SettingsError if an older one had another."""
    theirs = begun_with(study)
    if not theirs:
        study.set_user_attr(BASIS, ours)
    elif key := changed(study, ours):
        keep = f" (and study.warm_start={study.study_name} to keep what it knows)"
        hint = "" if key in question(settings) else keep
        raise SettingsError(
            f"sweep {study.study_name} was begun {_difference(key, theirs, ours)}; give another"
            f" study.name{hint}"
        )


def _varying(points: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What is not the same at all points, by point and key."""
    first, *others = points.values()
    same = {key for key in first if all(key in o and o[key] == first[key] for o in others)}
    return {
        f"{point}: {key}": value
        for point, settings in points.items()
        for key, value in settings.items()
        if key not in same
    }


def _settings(run: Run) -> dict[str, Any]:
    """The settings of a run of the sweep that must stay."""
    plain = {key: value for key, value in that_count(run.params).items() if not _is_free(key)}
    text = json.dumps(plain, default=str)
    found: dict[str, Any] = json.loads(text.replace(str(PACKAGE), ""))  # may be installed elsewhere
    return found


def _is_free(key: str) -> bool:
    searches = key.startswith("study.") and not key.startswith("study.vars")
    return searches or changes_nothing(key)


def _difference(key: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What of the basis has changed, short."""
    then, now = theirs.get(key), ours.get(key)
    if key == "overrides" and isinstance(then, list) and isinstance(now, list):
        gone, new = ([o for o in a if o not in b] for a, b in ((then, now), (now, then)))
        said = [f"with {', '.join(gone)} (not given now)"] if gone else []
        said += [f"without {', '.join(new)}"] if new else []
        return " and ".join(said)
    if isinstance(then, dict) and isinstance(now, dict):

        def known(basis: Mapping[str, Any], name: str) -> Any:
            """Of a point: what all points have the same is among the settings alone."""
            return basis[key].get(name, basis.get("settings", {}).get(name.rpartition(": ")[2]))

        none = object()
        names = [n for n in [*then, *now] if then.get(n, none) != now.get(n, none)]
        name = next((n for n in names if known(theirs, n) != known(ours, n)), names[0])
        if key in ("settings", "points", "study.constraints"):
            place = f"{key}." if key == "study.constraints" else ""
            return f"with {place}{name}={known(theirs, name)}, not {known(ours, name)}"
        return f"with another {key}.{name}"
    return f"with {key}={then}, not {now}"
