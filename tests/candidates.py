"""Checkpoints as the tracking store has them, made up."""

from collections.abc import Sequence
from pathlib import Path

from lorasweep.tracking import Candidate

BY = "val/loss_rel"


def candidate(
    epoch: int, run: str = "a", terms: Sequence[float] = (), **scores: float
) -> Candidate:
    named = {f"val/{key}": value for key, value in scores.items()}
    return Candidate(
        name=f"{run}-e{epoch:03d}",
        run=run,
        sweep="s",
        epoch=epoch,
        path=Path(f"/{run}/{epoch}.safetensors"),
        scores=named,
        terms={BY: terms},
        run_id="r",
        model_id=f"m-{run}-{epoch}",
        experiment_id="1",
        created=epoch,
    )
