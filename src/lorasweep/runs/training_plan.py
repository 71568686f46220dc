"""What a training is going to be, in lines for a person to read before it begins."""

from __future__ import annotations

from lorasweep.config.run import Run
from lorasweep.core.text import shown
from lorasweep.judging.metrics.metric import Images
from lorasweep.training.training_batches import steps_per_epoch


def plan(run: Run, images: Images) -> list[str]:
    """The captions of each arm by an example, and what an epoch is."""
    first = {item.arm: item for item in reversed(images.trained)}
    captions = [f"{arm} {shown(item.prompt, 60)!r}" for arm, item in sorted(first.items())]
    seen = sum(item.repeats for item in images.trained)
    size, held_back = run.trainer.batch_size, run.trainer.gradient_accumulation_steps
    steps = steps_per_epoch(images.trained, size, held_back)
    batches = f"batches of {size}" + (f", {held_back} a step" if held_back > 1 else "")
    return [
        f"captions, such as of {next(iter(first.values())).path.name}: {'; '.join(captions)}",
        f"an epoch: {seen} images, with their repeats, in {batches}: {steps} steps; in all"
        f" {run.num_steps(steps)} steps, epochs: {run.num_epochs(steps)}",
    ]
