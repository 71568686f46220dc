"""Rules of choosing, replayed over recorded sweeps: which one picks what looks best?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import show

Values = NDArray[np.float64]
Rule = Callable[["Grid"], Values]
"""A sweep's scores by checkpoint; the largest is chosen."""

TRUTHS = ("likeness", "recognised", "likeness, unrelated", "recognised, unrelated")
NOISIER = slice(4, 8)
RESAMPLINGS = 10_000


class Grid:
    """A recorded sweep."""

    def __init__(self, recorded: Mapping[str, Any]) -> None:
        self.base, self.checkpoints = recorded["base"], recorded["checkpoints"]
        self.truth = np.array([one["truth"] for one in self.checkpoints])
        self.epochs = self.of("epoch")

    def of(self, *keys: str) -> Values:
        """A value of each checkpoint."""
        return np.array([_at(one, keys) for one in self.checkpoints], dtype=float)

    def loss(self, part: slice = slice(None)) -> Values:
        """Held-out loss over a part of the schedule."""
        return self.of("kosmos", "own")[:, part].mean(1)

    def gain(self, part: slice = slice(None), arm: str = "kosmos") -> Values:
        """Caption gain over a part of the schedule."""
        above, below = self.of(arm, "excess")[:, part], self.of(arm, "own")[:, part]
        gain: Values = above.sum(1) / below.sum(1)
        return gain

    def base_gain(self, part: slice = slice(None), arm: str = "kosmos") -> float:
        own = self.base[arm]
        return float(np.sum(own["excess"][part]) / np.sum(own["own"][part]))

    def few(self, name: str, images: int) -> Values:
        """By the first so many held-out images alone: `name` is own, excess, with _all, …"""
        return self.of("kosmos", name)[:, :, :images].mean((1, 2))

    def prior_gain(self, part: slice = NOISIER) -> Values:
        """What is left of the base's own gain on pictures of unrelated prompts."""
        return self.gain(part, "prior") / self.base_gain(part, "prior")


def ranks(values: Values) -> Values:
    """0 for the smallest; equal ones share the mean."""
    less_and_equal = [((values < one).sum(), (values == one).sum()) for one in values]
    return np.array([less + (equal - 1) / 2 for less, equal in less_and_equal])


def spearman(a: Values, b: Values) -> float:
    """Rank correlation; 0 where all are equal."""
    x, y = ranks(a), ranks(b)
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def subject_to(values: Values, holds: NDArray[np.bool_]) -> Values:
    """Those that hold come first."""
    found: Values = ranks(values) + np.where(holds, len(values), 0)
    return found


def _small(grid: Grid, images: int) -> Values:
    return grid.few("excess_noisier", images) / grid.few("own_noisier", images)


RULES: Mapping[str, Rule] = {
    "last epoch": lambda g: g.epochs,
    "training loss": lambda g: -g.of("train"),
    "loss": lambda g: -g.loss(),
    "loss, noisier half": lambda g: -g.loss(NOISIER),
    "loss, cleaner half": lambda g: -g.loss(slice(0, 4)),
    "loss, 8 images": lambda g: -g.few("own_all", 8),
    "gain": lambda g: g.gain(),
    "gain, noisier half": lambda g: g.gain(NOISIER),
    "gain, noisiest quarter": lambda g: g.gain(slice(6, 8)),
    "gain, noisiest eighth": lambda g: g.gain(slice(7, 8)),
    "gain, middle half": lambda g: g.gain(slice(2, 6)),
    "gain, cleaner half": lambda g: g.gain(slice(0, 4)),
    "gain, noisier half, not divided by the loss": lambda g: g.of("kosmos", "excess")[
        :, NOISIER
    ].mean(1),
    "gain, noisier half, 4 images": lambda g: _small(g, 4),
    "gain, noisier half, 8 images": lambda g: _small(g, 8),
    "gain / loss": lambda g: g.gain() / g.loss(),
    "gain, noisier half / loss": lambda g: g.gain(NOISIER) / g.loss(),
    "rank sum of loss and gain": lambda g: ranks(-g.loss()) + ranks(g.gain(NOISIER)),
    "loss, if the gain is the base's": lambda g: subject_to(
        -g.loss(), g.gain(NOISIER) >= g.base_gain(NOISIER)
    ),
    "gain, if the drift is below the median": lambda g: subject_to(
        g.gain(NOISIER), g.of("drift") <= np.median(g.of("drift"))
    ),
    "gain x prior gain": lambda g: g.gain(NOISIER) * g.prior_gain().clip(0.01),
    "rank sum of gain and prior gain": lambda g: ranks(g.gain(NOISIER)) + ranks(g.prior_gain()),
    "rank sum of gain and little drift": lambda g: ranks(g.gain(NOISIER)) + ranks(-g.of("drift")),
    "prior gain": lambda g: g.prior_gain(),
    "least drift": lambda g: -g.of("drift"),
}


def replay(recorded: Mapping[str, Any]) -> None:
    """Print the tables of all sweeps."""
    grids = {name: Grid(one) for name, one in recorded.items()}
    _tell_sweeps(grids)
    for truth in (0, 1):
        _tell_rules(grids, truth)
    _tell_agreement(grids)
    _tell_burnt(grids)


def _tell_sweeps(grids: Mapping[str, Grid]) -> None:
    rows = []
    for name, grid in grids.items():
        truth = grid.truth[:, 0]
        best = grid.checkpoints[int(truth.argmax())]
        worse = int((truth < grid.base["truth"][0]).sum())
        base = f"{grid.base['truth'][0]:.3f}"
        where = f"run {best['run']}, epoch {best['epoch']}"
        rows.append([name, str(len(truth)), base, f"{truth.max():.3f}", where, str(worse)])
    columns = ["sweep", "checkpoints", "base", "oracle", "which", "worse than the base"]
    show("Likeness to the true pictures", columns, rows)


def _tell_rules(grids: Mapping[str, Grid], truth: int) -> None:
    """Regret in the truth's units, with its 95 % interval over sweeps, and rank in truth."""
    rows = []
    for name, rule in RULES.items():
        regrets, places, tenth, below = [], [], 0, 0
        for grid in grids.values():
            of_truth = grid.truth[:, truth]
            chosen = int(rule(grid).argmax())
            regrets.append(float(of_truth.max() - of_truth[chosen]))
            place = int((of_truth > of_truth[chosen]).sum()) + 1
            places.append(place)
            tenth += place <= max(1, len(of_truth) // 10)
            below += bool(of_truth[chosen] < grid.base["truth"][truth])
        low, high = _interval(regrets)
        mean = float(np.mean(regrets))
        rows.append(
            [
                name,
                f"{mean:.3f} [{low:.3f}, {high:.3f}]",
                " ".join(map(str, places)),
                f"{tenth} of {len(grids)}",
                str(below),
            ]
        )
    rows.sort(key=lambda row: row[1])
    columns = ["rule", "mean regret", "ranks", "in the best tenth", "worse than the base"]
    show(f"Truth: {TRUTHS[truth]}; sweeps: {', '.join(grids)}", columns, rows)


def _tell_agreement(grids: Mapping[str, Grid]) -> None:
    rows = []
    for name, rule in RULES.items():
        found = [spearman(rule(grid), grid.truth[:, 0]) for grid in grids.values()]
        rows.append([name, f"{np.mean(found):.2f}", *(f"{one:.2f}" for one in found)])
    show("Spearman correlation with likeness", ["rule", "mean", *grids], rows)


def _tell_burnt(grids: Mapping[str, Grid]) -> None:
    """Which score says what was forgotten of unrelated prompts?"""
    rows = []
    for name in ("least drift", "prior gain", "gain, noisier half", "loss"):
        for truth in (2, 3):
            found = [spearman(RULES[name](grid), grid.truth[:, truth]) for grid in grids.values()]
            rows.append(
                [name, TRUTHS[truth], f"{np.mean(found):.2f}", *(f"{x:.2f}" for x in found)]
            )
    show("Spearman correlation with unrelated prompts", ["score", "truth", "mean", *grids], rows)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    draw = np.random.default_rng(0)
    chosen = draw.integers(len(values), size=(RESAMPLINGS, len(values)))
    low, high = np.quantile(np.array(values)[chosen].mean(1), (0.025, 0.975))
    return float(low), float(high)


def _at(value: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        value = value[key]
    return value
