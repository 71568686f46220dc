"""A checkpoint as the tracking store tells of it, for tests that need no store."""

from pathlib import Path

from lorasweep.tracking import Candidate


def candidate(epoch: int, run: str = "a", **scores: float) -> Candidate:
    return Candidate(
        name=f"{run}-e{epoch:03d}",
        run=run,
        sweep="s",
        epoch=epoch,
        path=Path(f"/{run}/{epoch}.safetensors"),
        scores={f"val/{key}": value for key, value in scores.items()},
        terms={},
        run_id="r",
        model_id=f"m-{run}-{epoch}",
        experiment_id="1",
        created=epoch,
    )
