"""Settings of a study, and its search space of a rank and a learning rate."""

from lorasweep.sweeps.study.search_space import Choice, Number, Space
from lorasweep.sweeps.study.study_settings import StudySettings

SCORE = "val/loss_rel"
SETTINGS = StudySettings(
    name="s",
    params={},
    conditions={},
    vars={},
    sampler="random",
    sampler_options={},
    pruner="none",
    pruner_options={},
    startup_trials=2,
    min_epochs=1,
    n_trials=6,
    max_hours=None,
    objectives=[SCORE],
    maximize=[],
    constraints={},
    enqueue=[],
    seed=0,
    max_failures=None,
    retries=1,
    warm_start=None,
    storage=None,
    batch_size=4,
)
RANK = Choice("adapter.rank", (4, 8, 16), ("4", "8", "16"))
RATE = Number("optimizer.unet_lr", 1e-5, 1e-3, log=True)
SPACE = Space({"adapter.rank": RANK, "optimizer.unet_lr": RATE}, {})
