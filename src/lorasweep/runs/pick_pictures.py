"""A pick in one picture: what the bare base, the pick and the runner-up draw of each prompt."""

from __future__ import annotations

import logging
from io import BytesIO
from typing import TYPE_CHECKING

from lorasweep.core.foreign_files import ForeignFileError
from lorasweep.judging.contact_sheet import contact_sheet
from lorasweep.tracking.history import Log, LoggedRun

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasweep.judging.pick_rule import Ranked
    from lorasweep.tracking import Candidate

log = logging.getLogger(__name__)

FILE_NAME = "comparison.png"  # beside the picked file
MAX_RIVALS = 3  # that are looked at for pictures
MAX_ROWS = 3


def comparison(
    uri: str, experiment: str, winner: Candidate, ranked: Sequence[Ranked[Candidate]]
) -> bytes | None:
    """The pictures that were logged of the base, the winner and the best rival, as one PNG.

    None where the winner's epoch drew none.
    """
    history = Log(uri, experiment)
    prompts = sorted(_drawn(history, winner, winner.epoch))
    if not prompts:
        return None
    rivals = [one.file for one in ranked if winner not in one.checkpoints][:MAX_RIVALS]
    shown = [
        ("base", _drawn(history, winner, 0)),
        (f"pick: {winner.name}", _drawn(history, winner, winner.epoch)),
        *((f"next: {one.name}", _drawn(history, one, one.epoch)) for one in rivals),
    ]
    whole = [(label, drawn) for label, drawn in shown if drawn.keys() >= set(prompts)]
    try:
        rows = [
            (label, [history.picture(*drawn[prompt]) for prompt in prompts])
            for label, drawn in whole[:MAX_ROWS]
        ]
    except ForeignFileError as error:
        log.warning("no %s: %s", FILE_NAME, error)
        return None
    content = BytesIO()
    texts = [prompt.partition(" ")[2] for prompt in prompts]  # without their numbers
    contact_sheet(rows, texts).save(content, "PNG")
    return content.getvalue()


def _drawn(history: Log, one: Candidate, epoch: int) -> dict[str, tuple[LoggedRun, str]]:
    """What was drawn of each prompt after an epoch: the arguments of `Log.picture`."""
    run = history.by_id(one.run_id)
    if run is None:
        return {}
    found = history.samples(run)
    return {prompt: (run, name) for (prompt, at), name in found.items() if at == epoch}
