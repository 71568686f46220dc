"""A warm start: another study's trials, taken as knowledge for the samplers, once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from lorasweep.core.settings import SettingsError
from lorasweep.runs.run_folder import sweep_name
from lorasweep.sweeps.study.check_unchanged import begun_with, question
from lorasweep.sweeps.study.samplers import distribution
from lorasweep.sweeps.study.study import Study
from lorasweep.sweeps.study.study_settings import StudySettings
from lorasweep.sweeps.study.study_storage import find_journal, journal_path, open_storage
from lorasweep.sweeps.study.trial import excess
from lorasweep.sweeps.study.trial_attributes import (
    BEST,
    CURVE,
    LEARNED,
    ORIGIN,
    SOURCE,
    TERMS,
    THEIR_NUMBER,
    WARM_START,
)

log = logging.getLogger(__name__)


def warm_start(study: Study, output_root: Path, folder: Path) -> None:
    """Take the trials of `study.warm_start`, once and all: what a kill broke off is finished.

    Raises SettingsError if there is no such sweep, or its values are of something else.
    """
    other, known = study.settings.warm_start, learns_from(study)
    if has_learned(study):
        if other not in (None, known):
            said = "sweep %s took the trials of %s when it began; those of %s are not taken"
            log.warning(said, study.name, known, other)
        return
    if known is not None and other != known:
        raise SettingsError(
            f"sweep {study.name} was broken off while it took the trials of {known}: give"
            f" study.warm_start={known}, or another study.name"
        )
    if other is None:
        return
    found = known_trials(other, study.settings, output_root, folder)
    taken = learn(study, found, other)
    level = logging.INFO if taken else logging.WARNING
    said = (
        "warm start: %d of %d trials of %s fit this search space (same parameters, values within,"
        " a score for each constraint)"
    )
    log.log(level, said, taken, len(found), other)


def has_learned(study: Study) -> bool:
    """Has it taken all of another study's trials?"""
    return LEARNED in study.optuna_study.user_attrs


def learns_from(study: Study) -> str | None:
    """The other study of which it has trials; all of them, unless a kill came between."""
    sources = [one.user_attrs[SOURCE] for one in _taken(study)]
    name: str | None = study.optuna_study.user_attrs.get(LEARNED, sources[0] if sources else None)
    return name


def learn(study: Study, other: Sequence[FrozenTrial], name: str) -> int:
    """Take another study's trials as knowledge, once; how many fit this one."""
    if has_learned(study):
        return 0
    there = {one.user_attrs[THEIR_NUMBER] for one in _taken(study)}  # before a kill
    fitting = [one for one in (_as_ours(study, trial, name) for trial in other) if one is not None]
    for trial in fitting:
        if trial.user_attrs[THEIR_NUMBER] not in there:
            study.optuna_study.add_trial(trial)
    study.optuna_study.set_user_attr(LEARNED, name)
    return len(fitting)


def _taken(study: Study) -> list[FrozenTrial]:
    found = study.optuna_study.get_trials(deepcopy=False)
    return [trial for trial in found if trial.user_attrs.get(ORIGIN) == WARM_START]


def _as_ours(study: Study, trial: FrozenTrial, name: str) -> FrozenTrial | None:
    """Another study's trial as one of ours; None if it isn't a point of our space.

    Likewise without a score for each of our constraints: samplers would take it to keep them.
    Without its curve: pruners compare scores of the same images only. A pruned one's values are
    known all the same, and without a curve samplers would take it for the worst.
    """
    settings, space = study.settings, study.space
    scores, bounds = trial.user_attrs.get(BEST, {}).get("scores", {}), settings.constraints
    values = trial.values or [scores.get(objective) for objective in settings.objectives]
    if not space.holds(trial.params) or None in values:
        return None
    if len(values) != len(settings.objectives) or not bounds.keys() <= scores.keys():
        return None
    params = space.inside(trial.params)
    attrs = {k: v for k, v in trial.user_attrs.items() if k not in (CURVE, TERMS)}
    attrs |= {ORIGIN: WARM_START, SOURCE: name, THEIR_NUMBER: trial.number}
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE,
        params=params,
        distributions={key: distribution(space.parameters[key]) for key in params},
        values=values,
        user_attrs=attrs,
        constraints=excess(scores, bounds),
    )


def known_trials(
    sweep: str, settings: StudySettings, output_root: Path, folder: Path
) -> list[FrozenTrial]:
    """The trials of another sweep that ended with a value: of a database, or of its journal.

    It is not that of `folder`. Raises SettingsError if there is no such sweep, or if its values are
    of something else.
    """
    study = _other_study(sweep, settings.storage, output_root, folder)
    theirs = begun_with(study)
    for key, ours in question(settings).items():
        if theirs.get(key) != ours:
            raise SettingsError(
                f"study.warm_start={sweep}: its {key} is {theirs.get(key)}, not {ours}, so its"
                " values say nothing here; give another sweep, or null"
            )
    return study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))


def _other_study(sweep: str, storage: str | None, output_root: Path, folder: Path) -> optuna.Study:
    """Found in the storage by its name or folder; else in a journal of its own."""
    beside = ""
    if storage is not None:
        opened = open_storage(storage, output_root)
        kept = [one for one in optuna.get_all_study_names(opened) if one != sweep_name(folder)]
        for name in (sweep, sweep_name(Path(sweep).absolute())):
            if name in kept:
                return optuna.load_study(study_name=name, storage=opened)
        beside = f"; in study.storage there are: {', '.join(kept) or 'none'}"
    try:
        journal = find_journal(sweep, output_root, but=journal_path(storage, folder))
    except SettingsError as error:
        raise SettingsError(f"study.warm_start: {error}{beside}") from None
    opened = open_storage(str(journal), journal.parent)
    names = optuna.get_all_study_names(opened)
    if len(names) != 1 and sweep not in names:
        raise SettingsError(
            f"study.warm_start={sweep}: {journal} holds several studies, or none; give one of"
            f" their names with study.storage={journal}: {', '.join(names) or 'none'}"
        )
    name = sweep if sweep in names else names[0]
    return optuna.load_study(study_name=name, storage=opened)
