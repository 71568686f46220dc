"""Settings of a study: conf/hydra/sweeper/optuna.yaml and the sweeps say what each is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from lorasweep.core.settings import Settings, SettingsError
from lorasweep.judging.pick_rule import sign

SamplerName = Literal["tpe", "gp", "cmaes", "random", "grid", "qmc", "nsgaii", "nsgaiii"]
PrunerName = Literal["median", "percentile", "hyperband", "asha", "wilcoxon", "patient", "none"]


@dataclass(frozen=True, kw_only=True)
class StudySettings(Settings):
    """How a sweep searches."""

    name: str
    params: Mapping[str, str | int | float | bool | None]
    conditions: Mapping[str, str]
    vars: Mapping[str, Any]
    sampler: SamplerName
    sampler_options: Mapping[str, Any]
    pruner: PrunerName
    pruner_options: Mapping[str, Any]
    startup_trials: NonNegativeInt
    min_epochs: PositiveInt
    n_trials: PositiveInt | None
    max_hours: PositiveFloat | None
    objectives: Sequence[str]
    maximize: Sequence[str]
    constraints: Mapping[str, float]
    enqueue: Sequence[Mapping[str, Any]]
    seed: int
    max_failures: PositiveInt | None
    retries: NonNegativeInt
    warm_start: str | None
    storage: str | None
    batch_size: PositiveInt

    def __post_init__(self) -> None:
        if not self.objectives:
            raise SettingsError("study.objectives is empty: name a score, e.g. [val/score]")
        if len(set(self.objectives)) < len(self.objectives):
            raise SettingsError("study.objectives names a score twice")
        for name in self.maximize:
            if name not in self.objectives:
                raise SettingsError(f"study.maximize: {name} is not among study.objectives")
        if self.n_trials is None and self.sampler != "grid":
            raise SettingsError("study.n_trials is missing: give the number of trials in all")
        if len(self.objectives) > 1 and self.sampler == "cmaes":
            raise SettingsError(
                "study.sampler=cmaes takes one objective; for several choose nsgaii, tpe or gp"
            )
        if self.constraints and self.sampler in ("cmaes", "qmc"):
            raise SettingsError(
                f"study.constraints have no effect with study.sampler={self.sampler}; choose tpe,"
                " gp or nsgaii"
            )

    def check_scores(self, scores: Collection[str], terms: Collection[str]) -> None:
        """Raise SettingsError for what the runs' scores, and those with terms, don't allow."""
        named = dict.fromkeys(self.objectives, "objectives")
        for name, key in {**dict.fromkeys(self.constraints, "constraints"), **named}.items():
            if name not in scores:
                having = ", ".join(sorted(scores)) or "none"
                raise SettingsError(
                    f"study.{key}: the runs have no score {name}; they have {having}"
                )
        first = self.objectives[0]
        if self.pruner == "wilcoxon" and first not in terms:
            having = ", ".join(sorted(terms)) or "none of the runs' scores"
            raise SettingsError(
                f"study.pruner=wilcoxon compares image by image, and {first} has no values by image"
                f" ({having} has): choose another pruner, or put another first of study.objectives"
            )

    @property
    def pareto(self) -> bool:
        """Are there several objectives?"""
        return len(self.objectives) > 1

    @property
    def signs(self) -> tuple[int, ...]:
        """For each objective 1, or -1 where larger is better."""
        return tuple(-1 if name in self.maximize else sign(name) for name in self.objectives)
