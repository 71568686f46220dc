"""Stands in for the worker processes: runs have scripted scores, and nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from lorasweep.config.run import Run
from lorasweep.lora_files.checkpoint import Checkpoint
from lorasweep.runs.session import EpochReport, Failure, Finished, Report, Started

Script = Callable[[Run, int], "dict[str, float] | Failure"]


class FakePool:
    """One device that trains `max_pack` runs at once, an epoch of each at every `events()`."""

    def __init__(self, script: Script, max_pack: int = 4) -> None:
        self.script, self.max_pack = script, max_pack
        self.epochs: dict[str, int] = {}
        self.submitted: list[Run] = []
        self.most = 0
        self._live: dict[str, Run] = {}
        self._dropped: set[str] = set()

    def ready(self, number: int | None) -> AbstractContextManager[None]:
        return nullcontext()

    def __enter__(self) -> FakePool:
        return self

    def __exit__(self, *error: object) -> None:
        self._live.clear()

    @property
    def has_room(self) -> bool:
        return len(self._live) - len(self._dropped) < self.max_pack

    def has_room_for(self, run: Run) -> bool:
        others = [one for one in self._live.values() if not one.can_share_pack(run)]
        return self.has_room and run.name not in self._live and not others

    def submit(self, run: Run) -> bool:
        if not self.has_room_for(run):
            return False
        self._live[run.name] = run
        self.submitted.append(run)
        return True

    def drop(self, name: str) -> None:
        self._dropped.add(name)

    def events(self) -> list[Report]:
        found: list[Report] = []
        for name in sorted(self._dropped):
            del self._live[name]
            found.append(Finished(run=name, dropped=True))
        self._dropped.clear()
        self.most = max(self.most, len(self._live))
        for run in list(self._live.values()):
            found += self._epoch(run)
        return found

    def _epoch(self, run: Run) -> list[Report]:
        found: list[Report] = []
        if run.name not in self.epochs:
            found.append(Started(run=run.name, device="fake"))
        epoch = self.epochs[run.name] = self.epochs.get(run.name, 0) + 1
        scored = self.script(run, epoch)
        if isinstance(scored, Failure):
            del self._live[run.name]
            return [*found, scored]
        path = Path(run.output_dir) / f"{run.name}-{epoch:06d}.safetensors"
        checkpoint = Checkpoint(path=path, run=run.name, epoch=epoch, step=epoch)
        scored = {"val/score": scored["val/loss_rel"], **scored}
        of = {name: scored[name] for name in ("val/score", "val/loss_rel")}
        terms = {name: [value + 0.01 * i for i in range(8)] for name, value in of.items()}
        found.append(EpochReport(run=run.name, checkpoint=checkpoint, scores=scored, terms=terms))
        if epoch == run.max_train_epochs:
            del self._live[run.name]
            found.append(Finished(run=run.name, dropped=False))
        return found
