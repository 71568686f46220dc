"""Judging checkpoints: scores and pictures from their files, contact sheets, the rule of picking.

A base model, images and the files of some checkpoints come in; scores with what they are means of,
and pictures, go out. Open judge.py first; each metric has a file in metrics/.
"""

from lorasweep.judging.judge import Judge, load_pack
from lorasweep.judging.metrics.metric import Images, Metric, Scored, Scores, Terms
from lorasweep.judging.pick_rule import rank
from lorasweep.judging.sampling import Sampling

__all__ = [
    "Images",
    "Judge",
    "Metric",
    "Sampling",
    "Scored",
    "Scores",
    "Terms",
    "load_pack",
    "rank",
]
