"""Which logged run a word on the command line means: a name, an id of MLflow, or a LoRA file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasweep.data.dataset import listed
from lorasweep.lora_files import checkpoint
from lorasweep.reproduce.recipe import ReproduceError
from lorasweep.tracking.history import Log, LoggedRun


@dataclass(frozen=True)
class Original:
    """A logged run that is to be made again."""

    log: Log
    run: LoggedRun
    file: Path | None = None
    """A checkpoint of it that its user has."""
    until: int | None = None
    """The epoch of that file; there is no need to train further."""

    def text(self, name: str) -> str | None:
        """A text among the run's artifacts."""
        return self.log.text(self.run, name)

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """What was written and what from. Raises ReproduceError where it wasn't logged."""
        text = self.text("manifest.json")
        if text is None:
            raise ReproduceError(
                f"{self.run.name}: its manifest.json is not in the log, so its images are not known"
            )
        loaded: Mapping[str, Any] = json.loads(text)
        return loaded

    @cached_property
    def last_epoch(self) -> int:
        """How far it is trained again: as far as it went, or as the file is."""
        if self.until is not None:
            return self.until
        epochs = [*self.log.checkpoints(self.run), 0]
        if not any(epochs) and self.run.status != "FAILED":
            raise ReproduceError(f"{self.run.name} has ended no epoch: there is nothing to compare")
        return max(epochs) + (self.run.status == "FAILED")  # what broke it comes in the next one


def find(word: str, log: Log) -> Original | None:
    """The run that `word` means; None for a LoRA file that no run of the log has made.

    Raises ReproduceError for a word that means nothing here.
    """
    if word.endswith(".safetensors") or Path(word).is_file():
        return _of_file(Path(word), log)
    found = log.by_id(word) or next(iter(log.named(word)), None)
    if found is not None:
        return Original(log, found)
    names = listed(log.names()) or "none yet"
    raise ReproduceError(
        f"{word} is neither a run's name or MLflow's id nor a .safetensors file; runs are: {names}."
        " Runs below another folder are found by output_root=FOLDER"
    )


def _of_file(path: Path, log: Log) -> Original | None:
    """By the hash of the data itself: it tells a renamed file, and one without metadata."""
    checkpoint.read_metadata(path)  # says what is wrong with a file that is none
    found = log.by_hash(checkpoint.data_hash(path))
    if found is None:
        return None
    run, one = found
    return Original(log, run, path, one.epoch)
