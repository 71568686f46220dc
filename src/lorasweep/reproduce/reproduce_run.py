"""Make a logged run again from its log alone, and say how far it is the same.

`prepare` finds its settings, images and captions, and tells every difference; `train` makes it
again; `judge` compares both. `command.py` is the whole way, as the command line takes it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lorasweep.core.failures import RunError
from lorasweep.reproduce import same_pack
from lorasweep.reproduce.compare import Comparison, compare
from lorasweep.reproduce.config_folder import write_config
from lorasweep.reproduce.original_run import find
from lorasweep.reproduce.plan import Options, Plan, prepare
from lorasweep.reproduce.recipe import ReproduceError
from lorasweep.runs import session as runs
from lorasweep.tracking.history import Log, LoggedRun

__all__ = [
    "Options",
    "Plan",
    "ReproduceError",
    "compare",
    "find",
    "judge",
    "prepare",
    "train",
    "write_config",
]

VERDICT_TAG = "lorasweep.reproduction"
REPORT = "reproduction.json"


def train(plan: Plan) -> None:
    """Train the run, and its companions where they are asked for.

    Raises RunError where it fails now and had not failed then.
    """
    data = runs.write_folders(plan.run)
    _take_out(data, plan.captions.removed)
    reason = same_pack.play(plan.schedule, plan.runs, plan.original.run.name)
    if reason is not None and plan.original.run.status != "FAILED":
        raise RunError(reason)


def judge(plan: Plan) -> tuple[LoggedRun, Comparison]:
    """Compare both, and record the verdict with the new run."""
    run = plan.run
    here = Log(run.tracking.resolve(run.output_root), run.tracking.experiment)
    new = next(iter(here.named(run.name, run.sweep)), None)
    if new is None:
        raise ReproduceError(f"{run.name} is trained, but not in MLflow yet: nothing is compared")
    original = plan.original
    result = compare(here, original.run, new, original.file, original.until)
    report = {
        "original": {"run": original.run.name, "run_id": original.run.run_id},
        "differences": [vars(one) for one in plan.differences],
        **result.as_json(),
    }
    here.add_text(new, REPORT, json.dumps(report, indent=1))
    if not plan.is_variation:
        here.tag(new, {VERDICT_TAG: result.verdict})
    return new, result


def _take_out(data: Path, removed: Sequence[str]) -> None:
    """Delete from the folders what was deleted there by hand before the run was trained."""
    for place in removed:
        path = data / place
        path.unlink(missing_ok=True)
        for caption in path.parent.glob(f"{path.stem}.*"):
            caption.unlink()
