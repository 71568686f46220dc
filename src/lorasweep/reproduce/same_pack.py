"""The pack that a run trained in, again: which runs join and which leave, epoch by epoch."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.config.run import Run
from lorasweep.core.progress import Screen
from lorasweep.reproduce.original_run import ReproduceError
from lorasweep.runs.session import EpochReport, Failure, Session


@dataclass(frozen=True)
class PackEpoch:
    """One epoch of a pack: the runs that join before it and those that leave."""

    joining: Sequence[str]
    leaving: Sequence[str] = ()


@dataclass(frozen=True)
class Schedule:
    """The epochs of a run in its pack, up to the run's last one."""

    epochs: Sequence[PackEpoch]
    names: Sequence[str]
    """All runs in them, the run itself first."""
    caveats: Sequence[str] = ()
    """What of the pack can't be made again, in sentences."""


def alone(name: str, epochs: int) -> Schedule:
    """The run by itself."""
    return Schedule([PackEpoch([name]), *[PackEpoch([]) for _ in range(epochs - 1)]], [name])


def companions(pack: Mapping[int, Mapping[str, Any]], name: str) -> set[str]:
    """The runs that trained together with this one, for at least an epoch."""
    return {
        str(other)
        for of in pack.values()
        for other in [*(member for member, _ in of["members"]), *of["failed"]]
    } - {name}


def together(
    pack: Mapping[int, Mapping[str, Any]], name: str, epochs: int, gone: Sequence[str] = ()
) -> Schedule:
    """The run with those it trained with, each joining and leaving when it did.

    `pack` is its pack.json, `gone` are runs whose settings are no longer logged. Companions that
    had begun before the run train their earlier epochs first.
    """
    begins: dict[str, int] = {}  # in epochs of the run; its own first is 1
    for epoch in range(1, epochs + 1):
        for member, own in pack[epoch]["members"]:
            if member in gone:
                continue
            begins.setdefault(member, epoch - own + 1)
    earliest = min(begins.values())
    schedule: list[PackEpoch] = []
    before: list[str] = []
    for epoch in range(earliest, epochs + 1):
        present = [one for one in _present(pack, begins, epoch, before) if one not in gone]
        joining = [member for member in present if member not in before]
        leaving = [member for member in before if member not in present]
        schedule.append(PackEpoch(joining, leaving))
        before = present
    names = [name, *sorted(companions(pack, name) - set(gone))]
    return Schedule(schedule, names, _caveats(pack, begins, epochs, gone))


def _present(
    pack: Mapping[int, Mapping[str, Any]], begins: Mapping[str, int], epoch: int, before: list[str]
) -> list[str]:
    """The runs that begin this epoch, in the pack's order; those that failed in it too."""
    if epoch < 1:  # before the run came: runs that left again before it are not known
        order = [member for member, _ in pack[1]["members"]]
        return [member for member in order if begins.get(member, 1) <= epoch]
    members = [member for member, _ in pack[epoch]["members"]]
    broken = [member for member in pack[epoch]["failed"] if member not in members]
    return [*[one for one in before if one in broken], *members] + [
        one for one in broken if one not in before
    ]


def _caveats(
    pack: Mapping[int, Mapping[str, Any]],
    begins: Mapping[str, int],
    epochs: int,
    gone: Sequence[str],
) -> list[str]:
    told = [f"{name}, of its pack, is no longer logged: its place stays empty" for name in gone]
    if early := sorted(member for member, begin in begins.items() if begin < 1):
        told.append(
            f"{', '.join(early)} had begun before it; who trained with them then and left is not"
            " trained again, which can change their rounding"
        )
    broken = {one for epoch in range(1, epochs + 1) for one in pack[epoch]["failed"]}
    if broken:
        told.append(
            f"{', '.join(sorted(broken))} broke off inside an epoch; bit-equal only if that happens"
            " at the same step again"
        )
    return told


def train(schedule: Schedule, runs: Mapping[str, Run], name: str) -> str | None:
    """Train the epochs, scored and logged as any run; why the run `name` failed, if it did.

    Companions end with the last epoch. Raises ReproduceError if the pack doesn't fit here.
    """
    first, *rest = schedule.epochs
    ahead, reason = deque(rest), None
    joining = [runs[member] for member in first.joining]
    with Screen() as screen, Session(joining[0], show=screen.show) as session:
        coming = {run.name for run in joining}
        for reports in session.train(joining):
            for report in reports:
                if isinstance(report, Failure) and report.run == runs[name].name:
                    reason = report.reason
            if coming and not any(isinstance(report, EpochReport) for report in reports):
                coming -= {report.run for report in reports}
                continue
            if coming:
                raise ReproduceError(
                    f"only some of its pack of {len(joining)} fit on {session.device}; without"
                    " --same-pack it is trained alone"
                )
            coming = _change_pack(session, ahead, runs)
    return reason


def _change_pack(session: Session, ahead: deque[PackEpoch], runs: Mapping[str, Run]) -> set[str]:
    """Between two epochs: drop the runs that leave and add those that join; the names of these."""
    if not ahead:
        for member in list(session.names):
            session.drop(member)
        return set()
    now = ahead.popleft()
    for member in now.leaving:
        if runs[member].name in session.names:
            session.drop(runs[member].name)
    for member in now.joining:
        session.join(runs[member])
    return {runs[member].name for member in now.joining}
