"""Which logged run a word on the command line means, and what was logged of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasweep.core.settings import SettingsError, name_for_files
from lorasweep.core.text import listed, shown
from lorasweep.lora_files import checkpoint
from lorasweep.reproduce import logged_files
from lorasweep.runs import provenance
from lorasweep.tracking.history import Log, LoggedRun
from lorasweep.tracking.store import RUN_TAG


class ReproduceError(SettingsError):
    """What keeps a run from being made again; the message names it and the remedy."""


@dataclass(frozen=True)
class OriginalRun:
    """A logged run that is to be made again."""

    log: Log
    run: LoggedRun
    file: Path | None = None
    """A checkpoint of it that its user has."""
    until: int | None = None
    """The epoch of that file; there is no need to train further."""

    def __post_init__(self) -> None:
        name_for_files(self.run.name, f"{RUN_TAG} of MLflow run {shown(self.run.run_id)}")

    def text(self, name: str) -> str | None:
        """A text among the run's artifacts, None if it was not logged."""
        return self.log.text(self.run, name)

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """Images, arms and captions as they were drawn. Raises ReproduceError if not logged."""
        text = self.text("manifest.json")
        if text is None:
            raise ReproduceError(
                f"{self.run.name}: its manifest.json is not in the log, so its images are not known"
            )
        return logged_files.read_manifest(text, f"{self.run.name}'s manifest.json")

    @cached_property
    def origin(self) -> Mapping[str, Any] | None:
        """Base model, versions, code and device; None where an older lorasweep logged none."""
        text = self.text(provenance.ORIGIN) or "null"
        return logged_files.read_origin(text, f"{self.run.name}'s {provenance.ORIGIN}")

    @cached_property
    def pack(self) -> Mapping[int, Mapping[str, Any]]:
        """The runs it trained with, by its epoch, as `provenance.read_pack` gives them."""
        name = f"{self.run.name}'s {provenance.PACK}"
        return provenance.read_pack(self.text(provenance.PACK), name)

    @cached_property
    def last_epoch(self) -> int:
        """How far it is trained again: as far as it went, or as the file is."""
        if self.until is not None:
            return self.until
        epochs = [*self.log.checkpoints(self.run), 0]
        if not any(epochs) and self.run.status != "FAILED":
            raise ReproduceError(f"{self.run.name} has ended no epoch: there is nothing to compare")
        return max(epochs) + (self.run.status == "FAILED")  # it failed in the next one


def find_original(word: str, log: Log) -> OriginalRun | None:
    """The run of that name, MLflow id or LoRA file; None for a file that no run here has made.

    A file is known by the hash of its data, so that it may be renamed and lack its metadata.
    Raises ReproduceError for a word that means nothing here.
    """
    path = Path(word)
    if path.suffix == ".safetensors" or path.is_file():
        checkpoint.read_metadata(path)  # says what is wrong with a file that is no checkpoint
        made = log.by_hash(checkpoint.data_hash(path))
        return None if made is None else OriginalRun(log, made[0], path, made[1].epoch)
    found = log.by_id(word) or next(iter(log.named(word)), None)
    if found is not None:
        return OriginalRun(log, found)
    names = listed(log.names()) or "none yet"
    raise ReproduceError(
        f"{word} is neither a run's name or MLflow's id nor a .safetensors file; runs are: {names}."
        " Runs below another folder are found by output_root=FOLDER"
    )
