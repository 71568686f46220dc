"""Makes a logged run again from its log alone, and says how far it is the same.

In comes a run's name, its MLflow id or a LoRA file; out come a new run in MLflow, a table of what
differs, and a verdict. Open reproduce.py first, then reproduce_run.py. A LoRA file that was made
elsewhere gives an experiment instead (foreign_lora.py), as presets of kohya_ss and TOMLs do
(preset.py).
"""

from lorasweep.reproduce.compare import Comparison
from lorasweep.reproduce.original_run import OriginalRun, ReproduceError, find_original
from lorasweep.reproduce.reproduce_run import Options, Plan, judge, prepare, train, write_config

__all__ = [
    "Comparison",
    "Options",
    "OriginalRun",
    "Plan",
    "ReproduceError",
    "find_original",
    "judge",
    "prepare",
    "train",
    "write_config",
]
