"""What Optuna's CMA-ES kept in a study is read back as that, and as no other pickle.

Optuna writes the state of the method into the study as a pickle, and loads what it finds there
later. A study may come from a stranger, as a journal or from a shared database. The name `pickle`
in Optuna's module is private; `tests/sweeps/test_study.py` fails where a version has it no more.
"""

from __future__ import annotations

import io
import pickle
from types import SimpleNamespace
from typing import Any

from lorasweep.core.settings import SettingsError

_CLASSES = {
    ("cmaes._cma", "CMA"),
    ("cmaes._sepcma", "SepCMA"),
    ("cmaes._cmawm", "CMAwM"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),  # of numpy 1
    ("numpy.core.multiarray", "_reconstruct"),
}


def load_states_only() -> None:
    """Let Optuna's CMA-ES load nothing but its own states from now on."""
    from optuna.samplers import _cmaes

    only: Any = SimpleNamespace(dumps=pickle.dumps, loads=_loads)
    _cmaes.pickle = only  # type: ignore[attr-defined]


def _loads(content: bytes) -> Any:
    return _StateReader(io.BytesIO(content)).load()


class _StateReader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _CLASSES:
            raise SettingsError(
                "study.sampler=cmaes: this study holds a pickle that is no state of the sampler's,"
                " and is not loaded; take another sampler, or another study.name"
            )
        return super().find_class(module_name, global_name)
