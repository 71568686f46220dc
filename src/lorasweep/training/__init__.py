"""Training: adapters on a frozen base, from captioned images to one checkpoint a run and epoch.

In come the settings (`NativeTrainer`), runs (`TrainingRun`) and their data; each epoch gives the
checkpoints of all runs of the pack, and their states lie beside them on the disk. Open
native_trainer.py first; sd_scripts_trainer.py has kohya's sd-scripts do the same.
"""

from lorasweep.training.lr_schedulers import LRScheduler
from lorasweep.training.native_trainer import NativeTraining
from lorasweep.training.optimizers import Optimizer
from lorasweep.training.sd_scripts_trainer import SdScriptsTraining
from lorasweep.training.training_run import (
    NativeTrainer,
    SdScriptsTrainer,
    Stopped,
    TrainedEpoch,
    TrainerError,
    TrainingData,
    TrainingRun,
)

__all__ = [
    "LRScheduler",
    "NativeTrainer",
    "NativeTraining",
    "Optimizer",
    "SdScriptsTrainer",
    "SdScriptsTraining",
    "Stopped",
    "TrainedEpoch",
    "TrainerError",
    "TrainingData",
    "TrainingRun",
]
