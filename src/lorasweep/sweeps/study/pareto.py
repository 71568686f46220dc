"""Pruning with several objectives: by the first of them."""

from __future__ import annotations

from collections.abc import Mapping

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from lorasweep.sweeps.study.methods import CURVE, was_pruned


class FirstObjective:
    """A study of several objectives as if the first were the only one.

    Optuna prunes with one objective only, so the pruner is shown a copy of the study in memory that
    has just this one. The copy is kept, and a decision costs what has changed since the last, not
    what all trials together hold.
    """

    def __init__(self, study: optuna.Study, storage: BaseStorage) -> None:
        self._study, self._storage = study, storage
        self._memory = optuna.storages.InMemoryStorage()
        self._copy = optuna.create_study(
            direction=study.directions[0], study_name=study.study_name, storage=self._memory
        )
        self._live: set[int] = set()  # trials that had not ended when they were last read
        self._known = 0

    def should_prune(self, number: int) -> bool:
        """Ask the study's pruner about a trial. What it notes of the trial is written back."""
        trials = self._study.get_trials(deepcopy=False)
        self._live |= set(range(self._known, len(trials)))
        for one in sorted(self._live):
            self._take(trials[one])
        self._known = len(trials)
        decision = self._study.pruner.prune(self._copy, self._memory.get_trial(self._id(number)))
        noted = self._memory.get_trial(self._id(number)).system_attrs
        for key in noted.keys() - trials[number].system_attrs.keys():
            self._storage.set_trial_system_attr(trials[number]._trial_id, key, noted[key])
        return decision

    def _take(self, trial: FrozenTrial) -> None:
        """Bring one trial of the copy up to date, or add it."""
        if trial.number >= self._known:
            self._copy.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING))
        ours = self._memory.get_trial(self._id(trial.number))
        curve: Mapping[str, float] = trial.user_attrs.get(CURVE, {})
        for epoch, value in curve.items():
            if ours.intermediate_values.get(int(epoch)) != value:
                self._memory.set_trial_intermediate_value(ours._trial_id, int(epoch), value)
        for key, attr in trial.user_attrs.items():
            if ours.user_attrs.get(key) != attr:
                self._memory.set_trial_user_attr(ours._trial_id, key, attr)
        for key in trial.system_attrs.keys() - ours.system_attrs.keys():
            self._memory.set_trial_system_attr(ours._trial_id, key, trial.system_attrs[key])
        if trial.state.is_finished():
            state = TrialState.PRUNED if was_pruned(trial) else trial.state
            values = trial.values[:1] if state == TrialState.COMPLETE else None
            self._memory.set_trial_state_values(ours._trial_id, state, values)
            self._live.discard(trial.number)

    def _id(self, number: int) -> int:
        return self._memory.get_trial_id_from_study_id_trial_number(self._copy._study_id, number)
