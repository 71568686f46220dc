"""Hydra's loader reads each YAML file once for all jobs of a multirun or sweep.

So that a file that is edited while a sweep runs does not change the trials that come after. It
replaces `repository`, which Hydra's loader has but does not document:
`tests/sweeps/test_multirun.py` fails where another version of Hydra has it no more.
"""

from __future__ import annotations

import copy
from typing import Any


def read_yaml_once(loader: Any) -> None:
    """Let Hydra's loader keep what it reads from now on.

    Hydra's own launchers send the loader along with each job.
    """
    if not isinstance(loader.repository, _ReadOnce):
        loader.repository = _ReadOnce(loader.repository)


class _ReadOnce:
    """A config repository of Hydra's, with what it has read.

    Hydra copies its repository for each job, as the job's searchpath may change where it looks:
    copies share what was read as long as they look in the same places.
    """

    def __init__(self, repository: Any, read: dict[Any, Any] | None = None) -> None:
        self._repository, self._read = repository, {} if read is None else read

    def __deepcopy__(self, memo: dict[int, Any]) -> _ReadOnce:
        return _ReadOnce(copy.deepcopy(self._repository, memo), self._read)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of this class, when it is unpickled
            raise AttributeError(name)
        return getattr(self._repository, name)

    def load_config(self, config_path: str) -> Any:
        """The file's content, for the caller to change."""
        key = (config_path, *((source.scheme(), source.path) for source in self.get_sources()))
        if key not in self._read:
            self._read[key] = self._repository.load_config(config_path)
        return copy.deepcopy(self._read[key])
