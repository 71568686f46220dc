"""A pick in one picture: what the bare base, the pick and the runner-up draw of each prompt."""

from __future__ import annotations

import logging
from io import BytesIO
from typing import TYPE_CHECKING

from lorasweep.core.foreign_files import ForeignFileError
from lorasweep.judging.contact_sheet import MAX_CELL, contact_sheet
from lorasweep.tracking.history import Log, LoggedRun

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from lorasweep.judging.pick_rule import Ranked
    from lorasweep.tracking import Candidate

log = logging.getLogger(__name__)

FILE_NAME = "comparison.png"  # beside the picked file
MAX_RIVALS = 3  # that are looked at for pictures
MAX_PROMPTS = 12


def comparison(
    uri: str, experiment: str, winner: Candidate, ranked: Sequence[Ranked[Candidate]]
) -> bytes | None:
    """The pictures that were logged of the base, the winner and the best rival, as one PNG.

    None where the winner's epoch drew none.
    """
    history = Log(uri, experiment)
    own = _drawn(history, winner)
    prompts = sorted(prompt for prompt, epoch in own if epoch == winner.epoch)[:MAX_PROMPTS]
    if not prompts:
        return None
    rivals = [one.file for one in ranked if winner not in one.checkpoints][:MAX_RIVALS]
    shown = [
        ("base", own, 0),
        (f"pick: {winner.name}", own, winner.epoch),
        *((f"next: {one.name}", _drawn(history, one), one.epoch) for one in rivals),
    ]
    whole = [
        (label, [drawn[prompt, epoch] for prompt in prompts])
        for label, drawn, epoch in shown
        if all((prompt, epoch) in drawn for prompt in prompts)
    ]
    try:
        rows = [(label, [_small(history.picture(*one)) for one in row]) for label, row in whole[:3]]
    except ForeignFileError as error:
        log.warning("no %s: %s", FILE_NAME, error)
        return None
    content = BytesIO()
    texts = [prompt.partition(" ")[2] for prompt in prompts]  # without their numbers
    contact_sheet(rows, texts).save(content, "PNG")
    return content.getvalue()


def _drawn(history: Log, one: Candidate) -> dict[tuple[str, int], tuple[LoggedRun, str]]:
    """What its run drew, by prompt and epoch: the arguments of `Log.picture`."""
    run = history.by_id(one.run_id)
    if run is None:
        return {}
    return {place: (run, name) for place, name in history.samples(run).items()}


def _small(image: Image.Image) -> Image.Image:
    """At most as large as a cell, whatever a store says that it is."""
    image.thumbnail((MAX_CELL, MAX_CELL))
    return image
