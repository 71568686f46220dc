"""Optuna's side of a sweep: in come a search space and settings, out go trials and a summary.

Open study.py first: `Study.next` gives a `Trial` (trial.py), which is told each epoch's scores.
samplers.py and pruners.py have them by name, search_space.py the parameters, study_storage.py the
journal or database and its lock, check_unchanged.py what must stay the same when a sweep goes on,
warm_start.py another study's trials, continue_trial.py the one use of Optuna's private parts.

Nothing is imported here, so that settings are read without Optuna, which takes seconds to import.
"""
