"""Choose a checkpoint of a sweep: by rule or by a person, recorded and ready for use."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorasweep import tracking
from lorasweep.core.text import harmless, listed
from lorasweep.judging.contact_sheet import FILE_NAME as CONTACT_SHEET
from lorasweep.judging.pick_rule import rank, with_finite_score
from lorasweep.runs.picked_readme import ChosenBy, readme, value_at
from lorasweep.tracking import Candidate, Tracking
from lorasweep.tracking.read_candidates import sweeps


class PickError(ValueError):
    """There is nothing to pick, or not what was asked for; the message lists what there is."""


@dataclass(frozen=True, kw_only=True)
class Pick:
    """What was chosen, among what, and where its copy lies."""

    winner: Candidate
    ranked: Sequence[Candidate]
    """Best first; without those in `left_out`."""
    left_out: Sequence[str]
    """One line for each candidate that has no usable score."""
    by: str
    chosen_by: ChosenBy
    folder: Path
    version: str
    """Number of the registered version that the alias `best` points at."""
    uri: str


def pick(
    settings: Tracking,
    output_root: Path,
    *,
    by: str,
    sweep: str | None = None,
    run: str | None = None,
    epoch: int | None = None,
) -> Pick:
    """Choose a checkpoint of a sweep (the newest by default), record it and copy it out.

    `run` and `epoch` together are a person's own choice; one alone narrows what the rule sees.
    Raises PickError, or TrackingError when nothing is tracked.
    """
    uri = settings.resolve(output_root)
    found = _find(uri, settings.experiment, sweep)
    usable = with_finite_score(found, by)
    left_out = [
        f"{one.name} is left out: it has no finite {by}" for one in found if one not in usable
    ]
    ranked = rank(usable, by)
    by_person = run is not None and epoch is not None
    # newest first: a run that was trained again under its name is meant in its last form
    winner = _choose(found[::-1] if by_person else ranked, run, epoch, by)
    chosen_by: ChosenBy = "person" if by_person else "rule"
    folder = _copy_out(uri, winner, output_root / "picked", by, chosen_by)
    upload = None if settings.upload == "none" else folder
    settings = replace(settings, registered_model=_registered_model(folder, settings))
    version = tracking.record_choice(uri, settings, winner, chosen_by=chosen_by, upload=upload)
    return Pick(
        winner=winner,
        ranked=ranked,
        left_out=left_out,
        by=by,
        chosen_by=chosen_by,
        folder=folder,
        version=version,
        uri=uri,
    )


def _find(uri: str, experiment: str, sweep: str | None) -> list[Candidate]:
    names = sweeps(uri, experiment)
    if not names:
        raise PickError(f"experiment {experiment} holds no runs yet: train first")
    if sweep is not None and sweep not in names:
        raise PickError(f"there is no sweep {sweep}; there are: {listed(names)}")
    name = sweep or names[0]
    found = tracking.candidates(uri, experiment, name)
    if not found:
        raise PickError(f"sweep {name} holds no checkpoint yet; there are: {listed(names)}")
    return found


def _choose(
    candidates: Sequence[Candidate], run: str | None, epoch: int | None, by: str
) -> Candidate:
    """The first candidate of that run and epoch (None: any)."""
    if not candidates:
        raise PickError(f"no checkpoint has a finite {by}: set pick.by, or give --run and --epoch")
    of_run = [one for one in candidates if run in (None, one.run)]
    if not of_run:
        runs = listed(sorted({one.run for one in candidates}))
        sweep = candidates[0].sweep
        raise PickError(
            f"there is no run {run} in sweep {sweep}; there are: {runs}. Another sweep is named"
            " before --run"
        )
    fitting = [one for one in of_run if epoch in (None, one.epoch)]
    if not fitting:
        epochs = listed([str(number) for number in sorted({one.epoch for one in of_run})])
        raise PickError(f"there is no checkpoint of epoch {epoch}; there are: {epochs}")
    return fitting[0]


def _copy_out(uri: str, winner: Candidate, root: Path, by: str, chosen_by: ChosenBy) -> Path:
    """Put the file, its config and how to use it into a folder of their own."""
    if not re.fullmatch(r"[\w-]+", winner.name):  # a shared store is written by others too
        raise PickError(f"{harmless(winner.name)!r} is no name of a checkpoint")
    folder = root / winner.name
    folder.mkdir(parents=True, exist_ok=True)
    tracking.fetch_file(uri, winner, folder / f"{winner.name}.safetensors")
    config = tracking.config_of(uri, winner)
    (folder / "config.yaml").write_text(config)
    sheet = winner.path.parent / CONTACT_SHEET
    if sheet.exists():
        shutil.copyfile(sheet, folder / CONTACT_SHEET)
    (folder / "README.md").write_text(readme(winner, config, by, chosen_by))
    return folder


def _registered_model(folder: Path, settings: Tracking) -> str:
    """The name that the winner's own run was to be registered under."""
    import yaml  # type: ignore[import-untyped]

    config = yaml.safe_load((folder / "config.yaml").read_text())
    return str(value_at(config, "tracking", "registered_model") or settings.registered_model)
