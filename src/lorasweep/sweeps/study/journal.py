"""Optuna's journal, read at a cost that does not grow with the trials of a study."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState


class Journal(JournalStorage):
    """Optuna's, which makes each list of trials anew, one by one, several times for each trial.

    Here those that have ended, and so can't change, are kept from list to list.
    """

    def __init__(self, log_storage: Any) -> None:
        super().__init__(log_storage)
        self._ended: dict[tuple[int, tuple[TrialState, ...]], list[FrozenTrial]] = {}
        self._num_ended: dict[tuple[int, tuple[TrialState, ...]], int] = {}  # of any state

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """As Optuna's."""
        if deepcopy:
            return super().get_all_trials(study_id, deepcopy, states)
        with self._thread_lock:
            self._sync_with_backend()
            self._replay_result.get_study(study_id)  # raises KeyError if there is none
            trials = self._replay_result._trials
            numbers = self._replay_result._study_id_to_trial_ids[study_id]
            wanted = tuple(one for one in TrialState if states is None or one in states)
            key = (study_id, wanted)
            ended, upto = self._ended.setdefault(key, []), self._num_ended.get(key, 0)
            while upto < len(numbers) and trials[numbers[upto]].state.is_finished():
                if trials[numbers[upto]].state in wanted:
                    ended.append(trials[numbers[upto]])
                upto += 1
            self._num_ended[key] = upto
            rest = [trials[number] for number in numbers[upto:]]
            return ended + [trial for trial in rest if trial.state in wanted]
