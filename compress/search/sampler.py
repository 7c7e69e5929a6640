"""Which settings are tried next: Optuna's samplers over the knobs of a space.

The study is in memory and made anew from what is written down of finished trials, so that a search goes on after
anything; nothing but results is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from compress.config import Range, SearchConfig, Space
from compress.search.decide import OBJECTIVES
from compress.search.space import Params, choices, knobs

STUDY = "search"
POPULATION = (8, 50)  # of NSGA-II: a sixth of the trials within these


@dataclass(frozen=True)
class Limits:
    """What a trial breaks is what it is above: delta NE, milliseconds (infinite where no limit is set)."""

    delta_ne: float
    ms: float

    def violations(self, result: Mapping[str, Any]) -> dict[str, float]:
        """By how much, relative to the limit, each is broken; 0 and below where it is held."""
        broken = {"delta_ne": result["delta_ne"] / self.delta_ne - 1.0}
        return broken if self.ms == float("inf") else {**broken, "ms": result["ms"] / self.ms - 1.0}


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """The knobs as Optuna draws them."""
    return {
        name: FloatDistribution(knob.low, knob.high, log=knob.log)
        if isinstance(knob, Range)
        else CategoricalDistribution(list(choices(knob)))
        for name, knob in knobs(space).items()
    }


def make_sampler(search: SearchConfig, finished: int) -> BaseSampler:
    """The sampler that a search asks for; a grid is given to the study, and drawn at random beyond its end.

    `finished`: trials that an earlier process saw, so that another seed draws the next ones.
    """

    seed = search.seed + 1009 * finished
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental options
        if search.algorithm == "tpe":
            return TPESampler(seed=seed, multivariate=True, n_startup_trials=search.start)
        if search.algorithm == "nsga2":
            size = min(max(search.trials // 6, POPULATION[0]), POPULATION[1])
            return NSGAIISampler(seed=seed, population_size=size)
        return RandomSampler(seed=seed)


def make_study(
    search: SearchConfig,
    limits: Limits,
    finished: Iterable[Mapping[str, Any]],
    first: Sequence[Params],
) -> tuple[optuna.storages.BaseStorage, BaseSampler]:
    """A study that knows what finished trials came to, and asks for `first` before anything else."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    known = [trial for trial in finished if "error" not in trial]
    sampler = make_sampler(search, len(known))
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(
        storage=storage, sampler=sampler, study_name=STUDY, directions=["minimize"] * len(OBJECTIVES)
    )
    for trial in known:
        values = [float(trial[name]) for name in OBJECTIVES]
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE,
                values=values,
                params=trial["params"],
                distributions=distributions(search.space),
                constraints=limits.violations(trial),
            )
        )
    for params in first:
        study.enqueue_trial(params)
    return storage, sampler
