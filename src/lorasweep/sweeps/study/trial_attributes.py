"""What a study notes of itself and of its trials as Optuna's user attributes.

The names are kept in studies of earlier versions too: none may change.
"""

from __future__ import annotations

import optuna
from optuna.trial import FrozenTrial, TrialState

# of a trial
BEST = "best"  # epoch, path, scores and terms of its best candidate so far
EPOCHS = "epochs"  # how many it has reported
PLANNED = "planned_epochs"  # how many it trains if nothing stops it
CURVE = "curve"  # epoch -> first objective of the best candidate so far, if there are several
TERMS = "terms"  # epoch -> the terms of the best candidate so far
PRUNED = "pruned"  # its run was stopped early, though Optuna may call it complete
PRUNER_NOTES = "pruner_notes"  # what Optuna's pruner notes of it, if there are several objectives
ORIGIN = "origin"  # why it was asked with given parameters: guess, grid, …
WARM_START = "warm start"  # the origin of another study's trials
GIVEN = "given"  # the parameters that it was asked with
ATTEMPT = "attempt"  # how many times it failed and was begun again
REASON = "reason"  # why it failed last
SOURCE, THEIR_NUMBER = "warm_start", "warm_start_number"  # of a warm start: which study's, and its

# of the study
BASIS = "basis"  # what must stay the same when it is continued
SETUP_FAILED = "lacking"  # it was stopped because no run could be set up
LEARNED = "learned"  # the other study, all of whose trials were taken


def was_pruned(trial: FrozenTrial) -> bool:
    """Was its run stopped early? With several objectives Optuna has it as complete."""
    is_marked = bool(trial.user_attrs.get(PRUNED)) and trial.state != TrialState.FAIL
    return is_marked or trial.state == TrialState.PRUNED


def own_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Without those of a warm start, whose scores are of other images."""
    found = study.get_trials(deepcopy=False)
    return [trial for trial in found if trial.user_attrs.get(ORIGIN) != WARM_START]
