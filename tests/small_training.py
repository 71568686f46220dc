"""Small trainings in this process, and what they leave: losses, checkpoints, reports, weights."""

import math
from dataclasses import replace

from lorasweep.data import kohya_folders, latents
from lorasweep.lora_files import checkpoint
from lorasweep.runs.prepare import write_folders
from lorasweep.runs.session import EpochReport, run_pack
from lorasweep.training.native_trainer import NativeTraining
from lorasweep.training.training_run import TrainingData


def load(run, base):
    """The images that a run trains on, encoded."""
    arms = kohya_folders.read(write_folders(run) / "train")
    return TrainingData(latents.encode(base, arms, run.dataset, run.cache_dir), run.dataset)


def half_of(data):
    """Two steps an epoch where all of the small demo's images would make four."""
    return replace(data, items=data.items[: len(data.items) // 2])


def train(base, data, *runs):
    """Train to the end: losses by run, the last checkpoint by run, failures by run."""
    losses, last, failures = Losses(), {}, {}
    training = NativeTraining(runs[0].trainer, base, runs, data, on_step=losses.note)
    for epoch in training:
        last.update({one.run: one for one in epoch.checkpoints})
        failures.update(epoch.failures)
    return {run.name: losses[run.name] for run in runs}, last, failures


class Losses:
    """What a training says of its steps: the losses of a run in the order of its steps."""

    def __init__(self):
        self.by_step = {}

    def note(self, run, step, values):
        self.by_step.setdefault(run, {})[step] = values["train/loss"]

    def __getitem__(self, run):
        return [loss for _, loss in sorted(self.by_step[run].items())]


def tensors(one):
    """The tensors of a checkpoint's file."""
    return checkpoint.read(one.path)[0]


def relative_difference(a, b):
    """||a - b|| / ||b|| over all tensors of two files."""
    squared = sum(float((a[name] - b[name]).square().sum()) for name in a)
    return math.sqrt(squared / sum(float(tensor.square().sum()) for tensor in b.values()))


def reports(*runs):
    """Every epoch's report of runs that train as one pack, scored and logged."""
    return [report for report in run_pack(runs) if isinstance(report, EpochReport)]
