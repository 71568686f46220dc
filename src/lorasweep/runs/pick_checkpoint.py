"""Choose a checkpoint of a sweep: by rule or by a person, recorded and ready for use."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from lorasweep import tracking
from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.foreign_files import ForeignFileError, inside, parse_yaml
from lorasweep.core.text import listed, shown
from lorasweep.judging.contact_sheet import FILE_NAME as CONTACT_SHEET
from lorasweep.judging.pick_rule import (
    GAIN,
    LOSS,
    SCORE,
    Ranked,
    comparable,
    rank,
    with_finite_score,
)
from lorasweep.runs.pick_pictures import FILE_NAME as COMPARISON
from lorasweep.runs.pick_pictures import comparison
from lorasweep.runs.pick_words import Listening
from lorasweep.runs.picked_readme import ChosenBy, readme, value_at
from lorasweep.tracking import Candidate, Tracking
from lorasweep.tracking.model_registry import own_choice
from lorasweep.tracking.read_candidates import newest_sweep, sweeps


class PickError(ValueError):
    """There is nothing to pick, or not what was asked for; the message lists what there is."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is to be chosen, and among what."""

    winner: Candidate
    ranked: Sequence[Ranked[Candidate]]
    """Best first; without those in `left_out`."""
    left_out: Sequence[str]
    """One line for each candidate that has no usable score."""
    by: str
    """The score that was ranked by; that which was asked for if all have it."""
    chosen_by: ChosenBy
    before: Candidate | None
    """The sweep's choice until now."""
    uri: str
    notes: Sequence[str] = ()
    """What is to be known of the winner, in lines for a person."""

    @property
    def of_winner(self) -> Ranked[Candidate] | None:
        """What the winner is ranked as; None for one without a usable score."""
        return _of(self.winner, self.ranked)


@dataclass(frozen=True, kw_only=True)
class Pick(Choice):
    """A choice that was recorded, and where the copy of its file lies."""

    folder: Path
    version: str
    """Number of the registered version that the alias `best` points at."""


def choose(
    settings: Tracking,
    output_root: Path,
    *,
    by: str,
    sweep: str | None = None,
    run: str | None = None,
    epoch: int | None = None,
) -> Choice:
    """Choose a checkpoint of a sweep (the newest by default), and record nothing.

    `run` and `epoch` together are a person's own choice; one alone narrows what the rule sees.
    Raises PickError, or TrackingError when nothing is tracked.
    """
    uri = settings.resolve(output_root)
    found = _find(uri, settings.experiment, sweep)
    asked, by = by, comparable(found, by)
    usable = with_finite_score(found, by)
    scored = {one.model_id for one in usable}
    left_out = [
        f"{one.name} is left out: it has no finite {by}"
        for one in found
        if one.model_id not in scored
    ]
    ranked = rank(usable, by)
    by_person = run is not None and epoch is not None
    # newest first: a run that was trained again under its name is meant in its last form
    if by_person:
        winner = _fitting(found, run, epoch, by)[-1]
    else:
        winner = rank(_fitting(usable, run, epoch, by), by)[0].file
    return Choice(
        winner=winner,
        ranked=ranked,
        left_out=left_out,
        by=by,
        chosen_by="person" if by_person else "rule",
        before=next((one for one in found if one.chosen_by), None),
        uri=uri,
        notes=[*_instead(asked, by), *_said_of(uri, winner, ranked)],
    )


def record(choice: Choice, settings: Tracking, output_root: Path, *, replaces: bool) -> Pick:
    """Record a choice and copy its file out.

    A person's choice gives way to the rule's only if the new one `replaces` it; else PickError.
    """
    uri, winner, chosen_by = choice.uri, choice.winner, choice.chosen_by
    if settings.upload != "none":
        tracking.check_place(uri, winner)
    config = _config_of(uri, winner)
    settings = replace(settings, registered_model=_registered_model(config.values, settings))
    if chosen_by == "rule" and not replaces:
        _check_no_own_choice(choice, settings.registered_model)
    pictures = comparison(uri, settings.experiment, winner, choice.ranked)
    how_to_use = readme(winner, config.values, choice.by, chosen_by, choice.of_winner, choice.notes)
    folder = _copy_out(uri, winner, output_root, config, how_to_use, pictures)
    upload = None if settings.upload == "none" else folder
    version = tracking.record_choice(uri, settings, winner, chosen_by=chosen_by, upload=upload)
    return Pick(**vars(choice), folder=folder, version=version)


def _check_no_own_choice(choice: Choice, registered_model: str) -> None:
    """Neither in this sweep nor, as it holds the alias `best`, in another of the same name."""
    own = own_choice(choice.uri, registered_model)
    if choice.before and choice.before.chosen_by == "person":
        own = choice.before.model_id, choice.before.name
    if own is not None and own[0] != choice.winner.model_id:
        raise PickError(
            f"{shown(own[1])} is a person's choice and stays: --show only looks at the candidates,"
            f" --replace puts {choice.winner.name}, the rule's choice, in its place"
        )


def _instead(asked: str, by: str) -> list[str]:
    if asked == by:
        return []
    return [f"Ranked by {LOSS}: some have no {SCORE}, or not both of its parts (older runs)."]


def _said_of(uri: str, winner: Candidate, ranked: Sequence[Ranked[Candidate]]) -> list[str]:
    if _of(winner, ranked) is None:
        return []
    of_base = tracking.base_score(uri, winner, GAIN) if GAIN in winner.scores else None
    listening = Listening(ranked, of_base)
    words = listening.words(winner)
    return [*([words] if words else []), *listening.warnings(winner)]


def _find(uri: str, experiment: str, sweep: str | None) -> list[Candidate]:
    name = sweep or newest_sweep(uri, experiment)
    if name is None:
        raise PickError(f"experiment {experiment} holds no runs yet: train first")
    found = tracking.candidates(uri, experiment, name)
    if found:
        return found
    names = sweeps(uri, experiment)
    if name in names:
        raise PickError(f"sweep {name} holds no checkpoint yet; there are: {listed(names)}")
    raise PickError(f"there is no sweep {name}; there are: {listed(names) or 'none yet'}")


def _of(winner: Candidate, ranked: Sequence[Ranked[Candidate]]) -> Ranked[Candidate] | None:
    return next((one for one in ranked if winner in one.checkpoints), None)


def _fitting(
    candidates: Sequence[Candidate], run: str | None, epoch: int | None, by: str
) -> list[Candidate]:
    """The candidates of that run and epoch (None: any), of which there is at least one."""
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
    return fitting


@dataclass(frozen=True)
class _Config:
    """How the winner was trained."""

    text: str
    values: Mapping[str, Any]


def _config_of(uri: str, winner: Candidate) -> _Config:
    text = tracking.config_of(uri, winner)
    return _Config(text, parse_yaml(text, f"config.yaml of {shown(winner.run)} in MLflow"))


def _copy_out(
    uri: str,
    winner: Candidate,
    output_root: Path,
    config: _Config,
    how_to_use: str,
    pictures: bytes | None,
) -> Path:
    """Put the file, its config and how to use it into a folder of their own, once all are there."""
    content = tracking.read_checkpoint(uri, winner, output_root)
    folder = _own_folder(winner, output_root, content)
    files = {
        f"{winner.name}.safetensors": content,
        "config.yaml": config.text.encode(),
        "README.md": how_to_use.encode(),
    }
    if sheet := _contact_sheet(winner, output_root):
        files[CONTACT_SHEET] = sheet
    if pictures:
        files[COMPARISON] = pictures
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{winner.name[:100]}.") as draft:
        for name, content in files.items():
            write_atomically(Path(draft, name), content)
        folder.mkdir(exist_ok=True)
        for name in files:  # a link of that name is replaced, not written through
            Path(draft, name).replace(folder / name)
    return folder


def _own_folder(winner: Candidate, output_root: Path, content: bytes) -> Path:
    """`picked/SWEEP/NAME`, with a number if another file was put there before."""
    sweep = re.sub(r"[^\w-]", "_", winner.sweep)[:100]
    for number in count(1):
        name = winner.name if number == 1 else f"{winner.name}-{number}"
        folder = inside(output_root, Path("picked", sweep, name))
        file = folder / f"{winner.name}.safetensors"
        if not folder.exists() or (file.is_file() and file.read_bytes() == content):
            return folder
    raise AssertionError("there is always a next number")


def _contact_sheet(winner: Candidate, output_root: Path) -> bytes | None:
    """The picture that lies beside the winner's file in its run's folder."""
    file = tracking.local_file(winner, output_root)
    if file is None:
        return None
    try:
        content = inside(file.parent, CONTACT_SHEET).read_bytes()
    except (ForeignFileError, OSError):
        return None
    return content if content.startswith(b"\x89PNG\r\n") else None


def _registered_model(config: Mapping[str, Any], settings: Tracking) -> str:
    """The name that the winner's own run was to be registered under."""
    name = value_at(config, "tracking", "registered_model")
    return name if isinstance(name, str) and name.strip() else settings.registered_model
