"""compress/search/sampler.py: a study made anew from finished trials asks for what is enqueued, then draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from compress.config import Choice, Range, SearchConfig, Space
from compress.methods.dense import DensePlan
from compress.search.decide import OBJECTIVES
from compress.search.sampler import POPULATION, STUDY, Limits, distributions, make_sampler, make_study
from compress.search.space import Params, grid, setting, start_points

SPACE = Space(
    budget=Range(low=0.01, high=0.5, log=True),
    trust=Choice(choice=(0.0, 1.0)),
    dense=Choice(choice=(DensePlan(), DensePlan(dtype="int8"))),
)
ALGORITHMS = {"tpe": TPESampler, "nsga2": NSGAIISampler, "random": RandomSampler, "grid": RandomSampler}
LIMITS = Limits(0.001, float("inf"))


def search(algorithm: str = "tpe", **more: Any) -> SearchConfig:
    return SearchConfig(algorithm=algorithm, space=SPACE, start=4, **more)


def finished(params: Params, number: int = 0, **more: Any) -> dict[str, Any]:
    """A trial whose loss falls with its bytes, as trials.jsonl has it."""
    size = float(params["budget"])
    return {
        "number": number,
        "params": params,
        "artifact_bytes": 1e6 * size,
        "delta_ne": 1e-4 / size,
        "delta_ne_upper": 2e-4 / size,
        "ms": 2.0,
        **more,
    }


def drawn(algorithm: str, known: list[dict[str, Any]], first: list[Params], count: int, seed: int = 0) -> list[Params]:
    """What a study asks for, each answered at once."""
    storage, sampler = make_study(search(algorithm, seed=seed), LIMITS, known, first)
    study = optuna.load_study(study_name=STUDY, storage=storage, sampler=sampler)
    asked = []
    for _ in range(count):
        trial = study.ask(distributions(SPACE))
        asked.append(dict(trial.params))
        result = finished(trial.params)
        study.tell(trial, [result[name] for name in OBJECTIVES])
    return asked


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_draws_settings_of_the_space(algorithm: str) -> None:
    known = [finished(p, n) for n, p in enumerate(start_points(SPACE, 4))]
    found = drawn(algorithm, known, [], 12)
    for params in found:
        setting(SPACE, params)
    assert len({str(p) for p in found}) > 8
    assert len({p["dense"] for p in found}) == 2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_enqueued_comes_first_and_in_order(algorithm: str) -> None:
    first = [*grid(SPACE, 3, 1), *start_points(SPACE, 3)]
    known = [finished(p, n) for n, p in enumerate(grid(SPACE, 5, 2))]
    assert drawn(algorithm, known, first, 7)[:6] == first


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_draws_repeat_with_the_seed_and_change_with_what_is_known(algorithm: str) -> None:
    known = [finished(p, n) for n, p in enumerate(grid(SPACE, 6, 2))]
    assert drawn(algorithm, known, [], 4) == drawn(algorithm, known, [], 4)
    assert drawn(algorithm, known, [], 4) != drawn(algorithm, known, [], 4, seed=1)
    # a search that goes on does not draw again what it drew before
    assert drawn(algorithm, known, [], 4) != drawn(algorithm, known[:3], [], 4)


def test_study_knows_finished_trials_and_what_they_break() -> None:
    points = start_points(SPACE, 3)
    known = [
        finished(points[0], 0, delta_ne=0.0005),
        {"number": 1, "params": points[1], "error": "table t: too few bits", "seconds": 1.0},
        finished(points[2], 2, delta_ne=0.003, ms=8.0),
        finished(points[1], 3, delta_ne=0.002, stopped=True),
    ]
    storage, sampler = make_study(search(), Limits(0.001, 4.0), known, [])
    study = optuna.load_study(study_name=STUDY, storage=storage, sampler=sampler)
    assert [t.params for t in study.trials] == [points[0], points[2], points[1]]
    assert all(t.state == TrialState.COMPLETE for t in study.trials)
    assert study.trials[1].values == [known[2][n] for n in OBJECTIVES]
    broken = [{k: pytest.approx(v) for k, v in t.constraints.items()} for t in study.trials]
    assert broken == [{"delta_ne": -0.5, "ms": -0.5}, {"delta_ne": 2.0, "ms": 1.0}, {"delta_ne": 1.0, "ms": -0.5}]
    assert [t.number for t in study.best_trials] == [0]  # the only one that holds


def test_violations_are_relative_and_only_of_limits_that_are_set() -> None:
    result = {"delta_ne": 0.003, "ms": 8.0}
    assert Limits(0.002, float("inf")).violations(result) == {"delta_ne": pytest.approx(0.5)}
    assert Limits(0.002, 4.0).violations(result) == {"delta_ne": pytest.approx(0.5), "ms": pytest.approx(1.0)}
    assert max(Limits(0.003, 8.0).violations(result).values()) == 0.0


@pytest.mark.parametrize(("algorithm", "kind"), ALGORITHMS.items())
def test_sampler_is_the_one_that_was_asked_for(algorithm: str, kind: type[BaseSampler]) -> None:
    assert type(make_sampler(search(algorithm), 0)) is kind


@pytest.mark.parametrize(("trials", "population"), [(10, POPULATION[0]), (120, 20), (5000, POPULATION[1])])
def test_population_is_a_sixth_of_the_trials_within_bounds(trials: int, population: int) -> None:
    sampler = make_sampler(search("nsga2", trials=trials), 0)
    assert sampler._population_size == population


def test_tpe_finds_where_the_objectives_are_better_than_chance_does() -> None:
    """One corner of the space holds the limit; TPE draws there more often."""

    def share(algorithm: str) -> float:
        found = []
        for seed in range(3):
            storage, sampler = make_study(search(algorithm, seed=seed), Limits(0.001, float("inf")), [], [])
            study = optuna.load_study(study_name=STUDY, storage=storage, sampler=sampler)
            for _ in range(40):
                trial = study.ask(distributions(SPACE))
                bad = 0.01 * (trial.params["dense"] == "fp32") + 0.01 * (trial.params["trust"] == "0")
                study.tell(trial, [1e6 * trial.params["budget"] * (1 + 100 * bad), 1e-3 + bad, 1.0 + bad])
                found.append(trial.number >= 20 and bad == 0)
        return float(np.mean(found)) * 2

    assert share("tpe") > share("random") + 0.15
