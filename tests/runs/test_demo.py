"""What the demo promises: after its default training the style is there. A minute or two."""

import numpy as np
import pytest
from PIL import Image

from lorasweep.config.build_run import build_run
from lorasweep.config.compose import compose
from lorasweep.runs.session import EpochReport, run_pack


def dark(picture):
    """Share of pixels that are nearly black."""
    return float((np.asarray(picture.convert("L")) < 64).mean())


@pytest.mark.slow
def test_the_demo_learns_the_style_on_concepts_it_never_saw(tmp_path):
    options = ["experiment=demo", "optimizer.unet_lr=3e-3", f"output_root={tmp_path}"]
    cfg = compose([*options, f"cache_dir={tmp_path / 'cache'}"])
    run = build_run(cfg, output_dir=tmp_path / "run", sweep="demo")
    reports = [report for report in run_pack([run]) if isinstance(report, EpochReport)]
    best = min(reports, key=lambda report: report.scores["val/loss_rel"])
    assert best.scores["val/loss_rel"] < 0.85

    def icons(epoch):
        files = sorted((run.output_dir / "samples").glob(f"*_e{epoch:06d}_0[0-4].png"))
        return float(np.mean([dark(Image.open(file)) for file in files]))

    images = list(run.dataset.image_dir.glob("*.png"))
    real = float(np.mean([dark(Image.open(path)) for path in images]))
    assert icons(0) < 0.1
    assert icons(best.checkpoint.epoch) > real / 2
