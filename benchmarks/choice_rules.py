"""Rules of choosing, replayed over recorded sweeps: which one picks what looks best?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import show
from lorasweep.judging.pick_rule import reaches_zero

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

    def base_loss(self) -> float:
        return float(np.mean(self.base["kosmos"]["own"]))

    def base_gain(self, part: slice = slice(None), arm: str = "kosmos") -> float:
        own = self.base[arm]
        return float(np.sum(own["excess"][part]) / np.sum(own["own"][part]))

    def terms(self, images: int = 16, weight: float = 1) -> Values:
        """val/score of each checkpoint by image, of the first so many: loss - weight x gain."""
        first = slice(0, images)
        own, of_base = (
            one[..., first] for one in (self.by_image("own_all"), self.by_image("own_all", True))
        )
        noisier, excess = (self.by_image(f"{name}_noisier")[:, first] for name in ("own", "excess"))
        gain = excess.sum(1, keepdims=True) / noisier.sum(1, keepdims=True)
        of_gain = gain + (excess - gain * noisier) / noisier.mean(1, keepdims=True)
        found: Values = own / of_base.mean() - weight * of_gain
        return found

    def by_image(self, name: str, of_base: bool = False) -> Values:
        """Own losses or what swaps add, over a part of the schedule: (checkpoints, images)."""
        values = np.array(self.base["kosmos"][name]) if of_base else self.of("kosmos", name)
        found: Values = values.mean(-2)
        return found

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


def standardised(values: Values) -> Values:
    found: Values = (values - values.mean()) / values.std()
    return found


def score(weight: float = 1, images: int = 16) -> Rule:
    """val/score: loss - weight x gain."""
    return lambda g: -g.terms(images, weight).mean(1)


def least_drift(rule: Rule, weight: float) -> Rule:
    """Of those within 2 % of the base's loss that can't be told from the best, the least drift."""

    def found(g: Grid) -> Values:
        terms, best = g.terms(weight=weight), int(rule(g).argmax())
        close = np.abs(terms.mean(1) - terms[best].mean()) <= 0.02
        tied = [reaches_zero(list(one - terms[best])) for one in terms]
        return subject_to(-g.of("drift"), close & np.array(tied))

    return found


def surely_listening(g: Grid) -> Values:
    """The gain, if the interval of the largest lies above 0; else the loss."""
    gain = g.gain(NOISIER)
    best = int(gain.argmax())
    own, excess = (g.by_image(f"{name}_noisier")[best] for name in ("own", "excess"))
    chosen = np.random.default_rng(0).integers(len(own), size=(1000, len(own)))
    low = np.quantile(excess[chosen].sum(1) / own[chosen].sum(1), 0.025)
    return gain if low > 0 else -g.loss()


RULES: Mapping[str, Rule] = {
    "loss": lambda g: -g.loss(),
    "loss, ties by least drift": least_drift(lambda g: -g.loss(), 0),
    "loss - gain": score(),
    "loss - gain, ties by least drift": least_drift(score(), 1),
    "loss - gain, 8 images": score(images=8),
    "loss - gain, 4 images": score(images=4),
    "loss - gain / 4": score(1 / 4),
    "loss - gain / 2": score(1 / 2),
    "loss - 2 x gain": score(2),
    "loss - 4 x gain": score(4),
    "gain": lambda g: g.gain(NOISIER),
    "gain, all timesteps": lambda g: g.gain(),
    "gain, cleaner half": lambda g: g.gain(slice(0, 4)),
    "gain / loss": lambda g: g.gain(NOISIER) / g.loss(),
    "gain x (base's loss - loss)": lambda g: g.gain(NOISIER) * (g.base_loss() - g.loss()),
    "rank sum of loss and gain": lambda g: ranks(-g.loss()) + ranks(g.gain(NOISIER)),
    "sum of standardised loss and gain": lambda g: (
        standardised(-g.loss()) + standardised(g.gain(NOISIER))
    ),
    "gain, or the loss where no gain is surely above 0": surely_listening,
    "loss, if the gain is the base's": lambda g: subject_to(
        -g.loss(), g.gain(NOISIER) >= g.base_gain(NOISIER)
    ),
    "gain, if the drift is below the median": lambda g: subject_to(
        g.gain(NOISIER), g.of("drift") <= np.median(g.of("drift"))
    ),
    "gain x prior gain": lambda g: g.gain(NOISIER) * g.prior_gain().clip(0.01),
    "training loss": lambda g: -g.of("train"),
    "last epoch": lambda g: g.epochs,
    "least drift": lambda g: -g.of("drift"),
    "prior gain": lambda g: g.prior_gain(),
}
DEFAULT, BEFORE = "loss - gain", "loss"
FORETELLING = ("loss", "loss - gain", "gain", "training loss")


def replay(recorded: Mapping[str, Any]) -> None:
    """Print the tables: of the sweeps that the rules were thought of with, and of fresh ones."""
    grids = {name: Grid(one) for name, one in recorded.items()}
    _tell_sweeps(grids)
    known = {name: grid for name, grid in grids.items() if name.endswith("-0")}
    fresh = {name: grid for name, grid in grids.items() if name not in known}
    for title, some in (("development", known), ("fresh", fresh), ("all", grids)):
        for truth in (0, 1) if some else ():
            _tell_rules(title, some, truth)
    _tell_agreement(grids)
    _tell_early({name: grid for name, grid in grids.items() if "-short-" in name})
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


def _tell_rules(title: str, grids: Mapping[str, Grid], truth: int) -> None:
    """Regret in the truth's units, with its 95 % interval over sweeps, and rank in truth."""
    rows = []
    before = _regrets(RULES[BEFORE], grids, truth)
    for name, rule in RULES.items():
        places, tenth, below = [], 0, 0
        for grid in grids.values():
            of_truth = grid.truth[:, truth]
            chosen = int(rule(grid).argmax())
            place = int((of_truth > of_truth[chosen]).sum()) + 1
            places.append(place)
            tenth += place <= max(1, len(of_truth) // 10)
            below += bool(of_truth[chosen] < grid.base["truth"][truth])
        regrets = _regrets(rule, grids, truth)
        row = [name, _mean(regrets), _mean(regrets - before) if name != BEFORE else ""]
        rows.append([*row, " ".join(map(str, places)), f"{tenth} of {len(grids)}", str(below)])
    rows.sort(key=lambda row: row[1])
    guess = [
        float(one.truth[:, truth].max() - one.truth[:, truth].mean()) for one in grids.values()
    ]
    rows.append(["any, at random", _mean(np.array(guess)), _mean(guess - before), "", "", ""])
    columns = ["rule", "mean regret", f"less {BEFORE}'s", "ranks", "best tenth", "below base"]
    show(f"{title}; truth: {TRUTHS[truth]}; sweeps: {', '.join(grids)}", columns, rows)


def _regrets(rule: Rule, grids: Mapping[str, Grid], truth: int) -> Values:
    """How much worse its choice is than the best checkpoint of each sweep."""
    found = [(grid.truth[:, truth], int(rule(grid).argmax())) for grid in grids.values()]
    return np.array([of_truth.max() - of_truth[chosen] for of_truth, chosen in found])


def _tell_agreement(grids: Mapping[str, Grid]) -> None:
    rows = []
    for name, rule in RULES.items():
        found = [spearman(rule(grid), grid.truth[:, 0]) for grid in grids.values()]
        rows.append([name, f"{np.mean(found):.2f}", *(f"{one:.2f}" for one in found)])
    show("Spearman correlation with likeness", ["rule", "mean", *grids], rows)


def _tell_early(grids: Mapping[str, Grid]) -> None:
    """Which score at an early epoch foretells how good what is picked of a run will be?"""
    rows = []
    for name in FORETELLING:
        for epoch in sorted({int(one) for grid in grids.values() for one in grid.epochs})[:-1]:
            found = [_foretells(grid, RULES[name], epoch) for grid in grids.values()]
            rows.append(
                [name, str(epoch), _mean(np.array(found)), *(f"{one:.2f}" for one in found)]
            )
    show(
        "Spearman correlation of runs: best so far, likeness in the end", ["", "", "", *grids], rows
    )


def _foretells(grid: Grid, rule: Rule, epoch: int) -> float:
    by, default, runs = rule(grid), RULES[DEFAULT](grid), grid.of("run")
    so_far, final = [], []
    for run in sorted(set(runs)):
        so_far.append(by[(runs == run) & (grid.epochs <= epoch)].max())
        final.append(grid.truth[runs == run, 0][default[runs == run].argmax()])
    return spearman(np.array(so_far), np.array(final))


def _tell_burnt(grids: Mapping[str, Grid]) -> None:
    """Which score says what was forgotten of unrelated prompts?"""
    rows = []
    for name in ("least drift", "prior gain", "gain", "loss"):
        for truth in (2, 3):
            found = [spearman(RULES[name](grid), grid.truth[:, truth]) for grid in grids.values()]
            mean = _mean(np.array(found))
            rows.append([name, TRUTHS[truth], mean, *(f"{one:.2f}" for one in found)])
    show("Spearman correlation with unrelated prompts", ["score", "truth", "mean", *grids], rows)
    far = [one for grid in grids.values() for one in grid.checkpoints if one["drift"] >= 1]
    seen = [one["truth"][3] for one in far]
    print(f"{len(far)} checkpoints drift by 1 or more; recognised of unrelated prompts: {seen}")


def _mean(values: Values) -> str:
    low, high = _interval(list(values))
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def _interval(values: Sequence[float]) -> tuple[float, float]:
    draw = np.random.default_rng(0)
    chosen = draw.integers(len(values), size=(RESAMPLINGS, len(values)))
    low, high = np.quantile(np.array(values)[chosen].mean(1), (0.025, 0.975))
    return float(low), float(high)


def _at(value: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        value = value[key]
    return value
