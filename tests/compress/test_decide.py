"""compress/search/decide.py: who sees which rows, the front, who comes to the gate, and what it says."""

from __future__ import annotations

from dataclasses import asdict
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from compress_builders import World

from compress.search.decide import (
    FEWEST_ROWS,
    candidates,
    chain,
    chance,
    described,
    front_of,
    gate,
    holds,
    in_time,
    split_rows,
    split_sizes,
    why,
)
from compress.search.objective import Quality, rows_to_resolve
from trainer.data.reader import read_split
from trainer.errors import DataError


def trial(number: int, size: float, loss: float, ms: float = 1.0, **more: Any) -> dict[str, Any]:
    """A finished trial whose bound is a little above its loss."""
    found = {"number": number, "params": {"budget": size / 1000}, "stopped": False, "plan": {}, "seconds": 1.0}
    found |= {"table_bytes": size, "artifact_bytes": size + 10, "delta_ne": loss, "delta_ne_upper": loss + 0.0002}
    return {**found, "delta_auc": -loss, "delta_auc_lower": -2 * loss, "overlap": 0.9, "ms": ms, **more}


def point(size: float, upper: float, ms: float = 1.0, measured: float | None = None) -> dict[str, Any]:
    """A point of the front as it comes to the choice."""
    return described(trial(0, size, 0.0, ms), {"delta_ne_upper": upper}) | {"measured_ms": measured}


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "asked", "expected"),
    [
        (4000, (1000, 1000, 2000), (1000, 1000, 2000)),
        (9000, (1000, 1000, 2000), (1000, 1000, 2000)),
        (1000, (1000, 1000, 2000), (350, 250, 400)),
        (1000, (100, 1000, 2000), (100, 250, 650)),
        (1000, (100, 100, 2000), (100, 100, 800)),
        (1000, (1000, 1000, 300), (350, 250, 300)),
    ],
)
def test_split_too_small_is_shared(rows: int, asked: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    assert split_sizes(rows, asked) == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_of_search_selection_and_gate_never_meet(world: World, seed: int) -> None:
    rows = read_split(world.dataset, "val")
    parts = split_rows(rows, (10**6, 10**6, 10**6), seed)
    assert [len(p) for p in parts] == list(split_sizes(len(rows), (10**6,) * 3))
    numbered = [marks(p) for p in parts]
    assert sum(len(set(n)) for n in numbered) == len(set().union(*numbered))
    assert sorted(sum(numbered, [])) == sorted(marks(rows))
    again = split_rows(rows, (10**6, 10**6, 10**6), seed)
    assert [marks(p) for p in again] == numbered
    assert [marks(p) for p in split_rows(rows, (10**6,) * 3, seed + 1)] != numbered


def marks(rows: Any) -> list[tuple]:
    """What tells rows apart: all that they hold."""
    sparse = [rows.encoded.sparse[n] for n in ("user_id", "item_id", "city")]
    values = [np.asarray(r.values) for r in sparse]
    return [
        (*(int(v[i]) for v in values), *rows.encoded.dense[i].tolist(), float(rows.labels[i, 0]))
        for i in range(len(rows))
    ]


def test_too_few_rows_are_refused(world: World) -> None:
    rows = read_split(world.dataset, "val").take(np.arange(FEWEST_ROWS - 1))
    with pytest.raises(DataError, match=f"299 validation rows: .* need {FEWEST_ROWS} at least"):
        split_rows(rows, (10, 10, 10), 0)


# -- front -------------------------------------------------------------------------------------------------------------


def test_front_is_what_no_whole_trial_beats() -> None:
    rng = np.random.default_rng(0)
    trials = [trial(n, float(rng.integers(100, 200)), float(rng.random()), float(rng.random())) for n in range(60)]
    trials[3] |= {"stopped": True, "artifact_bytes": 1.0}
    trials[4] |= {"delta_ne_upper": float("nan"), "artifact_bytes": 1.0}
    trials.append({"number": 60, "params": {}, "error": "no", "seconds": 0.0})
    whole = [t for i, t in enumerate(trials[:60]) if i not in (3, 4)]
    keys = ("artifact_bytes", "delta_ne", "ms")

    def beaten(one: dict[str, Any]) -> bool:
        return any(all(o[k] <= one[k] for k in keys) and any(o[k] < one[k] for k in keys) for o in whole)

    front = front_of(trials)
    assert sorted(t["number"] for t in front) == [t["number"] for t in whole if not beaten(t)]
    assert [t["table_bytes"] for t in front] == sorted(t["table_bytes"] for t in front)
    assert 3 < len(front) < 30


def test_front_has_no_two_alike_and_may_be_empty() -> None:
    assert [t["number"] for t in front_of([trial(0, 5, 0.1), trial(1, 5, 0.1), trial(2, 9, 0.2)])] in ([0], [1])
    assert front_of([]) == []
    assert front_of([trial(0, 5, 0.1, stopped=True), {"number": 1, "error": "no"}]) == []


def test_point_of_the_front_keeps_what_readers_need() -> None:
    found = described(trial(7, 5, 0.1), {"delta_ne_upper": 0.2})
    assert found["number"] == 7
    assert found["selection"] == {"delta_ne_upper": 0.2}
    assert found["measured_ms"] is None
    assert not {"plan", "seconds", "stopped"} & set(found)


# -- choice ------------------------------------------------------------------------------------------------------------


def test_candidates_are_those_that_hold_the_smallest_first() -> None:
    front = [point(100, 0.002), point(300, 0.0005), point(200, 0.001), point(400, -0.1), point(200, 0.0, ms=0.5)]
    assert candidates(front, 0.001, None) == [4, 2, 1, 3]


def test_candidates_are_quick_enough_by_measurement_where_there_is_one() -> None:
    front = [
        point(100, 0.0, 5.0),
        point(200, 0.0, 5.0, measured=1.0),
        point(300, 0.0, 1.0, measured=5.0),
        point(400, 0.0),
    ]
    assert candidates(front, 0.001, 2.0) == [1, 3]
    assert [holds(p, 0.001, 2.0) for p in front] == [False, True, False, True]


def test_where_none_holds_the_closest_comes() -> None:
    front = [point(100, 0.02), point(200, 0.003, ms=9.0), point(300, 0.004)]
    assert candidates(front, 0.001, None) == [1]
    assert candidates(front, 0.001, 2.0) == [2]  # of those that are quick enough
    assert candidates(front, 0.001, 0.5) == [1]  # none is


# -- gate --------------------------------------------------------------------------------------------------------------


def quality(upper: float) -> dict[str, Any]:
    return {**asdict(Quality(upper - 0.0004, upper, 0.0, -0.1)), "overlap": 0.8}


def run_gate(uppers: dict[int, float], order: list[int]) -> tuple[int, dict[str, Any]]:
    """The gate over points of known bounds."""
    return gate(order, [quality(uppers[i]) for i in order], 0.001, 5000)


def test_gate_takes_the_last_before_the_first_refusal() -> None:
    bounds = {4: 0.0, 2: 0.0009, 7: 0.002, 1: 0.0}
    chosen, verdict = run_gate(bounds, [4, 2, 7, 1])
    assert (chosen, verdict["passed"], verdict["tried"]) == (2, True, [4, 2, 7])
    assert verdict["refused"] == [{"index": 7, "delta_ne_upper": 0.002}]
    assert verdict["delta_ne_upper"] == 0.0009
    assert verdict["rows"] == 5000
    assert "rows_to_resolve" not in verdict
    assert run_gate(bounds, [4, 2])[0] == 2


def test_gate_that_refuses_the_safest_gives_it_and_the_rows_it_would_take() -> None:
    chosen, verdict = run_gate({0: 0.003, 1: 0.0}, [0, 1])
    assert (chosen, verdict["passed"], verdict["tried"]) == (0, False, [0])
    found = quality(0.003)
    assert verdict["rows_to_resolve"] == rows_to_resolve(
        Quality(*(found[k] for k in Quality.__dataclass_fields__)), 5000, 0.001
    )


def test_gate_never_lets_a_bound_that_is_not_a_number_pass() -> None:
    chosen, verdict = run_gate({0: 0.0, 1: float("nan"), 2: 0.0}, [0, 1, 2])
    assert (chosen, verdict["tried"]) == (0, [0, 1])


def test_gate_lets_a_bad_plan_pass_once_in_twenty_searches_at_most() -> None:
    """The first of three plans is good, the others lose just more than the budget: by how often one of those wins."""
    rng = np.random.default_rng(0)
    error, searches = 0.0003, 2000

    def measured(truth: float) -> dict[str, Any]:
        estimate = truth + error * rng.standard_normal()
        return {**quality(estimate + error * NormalDist().inv_cdf(0.95)), "delta_ne": estimate}

    won = [gate([0, 1, 2], [measured(t) for t in (0.0, 0.001, 0.001)], 0.001, 1000)[0] > 0 for _ in range(searches)]
    assert 0.03 < np.mean(won) < 0.065


def test_chance_agrees_with_drawing_the_gate() -> None:
    """Of many truths that would have shown what the samples show, how many pass."""
    rows = (2000, 1000, 4000)
    spread, truth_change = 0.02, 0.0004
    shown = {"delta_ne": truth_change, "delta_ne_upper": truth_change + 1.6449 * spread / 2000**0.5}
    selection = {"delta_ne": truth_change, "delta_ne_upper": truth_change + 1.6449 * spread / 1000**0.5}
    rng = np.random.default_rng(1)
    truths = truth_change + spread / 3000**0.5 * rng.standard_normal(200_000)
    bounds = truths + spread / 4000**0.5 * (rng.standard_normal(200_000) + 1.6449)
    found = chance({**shown, "selection": selection}, 0.001, rows)
    assert found == pytest.approx((bounds <= 0.001).mean(), abs=0.01)
    assert chance({**shown, "selection": selection}, 0.01, rows) > found


def test_chain_falls_in_size_and_in_chance_and_keeps_both_ends() -> None:
    rng = np.random.default_rng(2)
    front = [{"artifact_bytes": int(b)} for b in rng.permutation(40) + 100]
    chances = rng.random(40).tolist()
    links = chain(front, range(40), chances, 100)
    sizes = [front[i]["artifact_bytes"] for i in links]
    assert links[0] == int(np.argmax(chances))
    assert sizes == sorted(set(sizes), reverse=True)
    assert [chances[i] for i in links] == sorted((chances[i] for i in links), reverse=True)
    left_out = set(range(40)) - set(links)
    for i in left_out:  # a link is as small and likelier
        assert any(sizes[k] <= front[i]["artifact_bytes"] and chances[j] >= chances[i] for k, j in enumerate(links))
    few = chain(front, range(40), chances, 2)
    assert few == [links[0], links[-1]]
    assert chain(front, [3], chances, 5) == [3]


def test_verdict_does_not_pass_above_the_limit_of_time() -> None:
    _, verdict = run_gate({0: 0.0}, [0])
    assert in_time(verdict, 3.0, None) == verdict
    assert in_time(verdict, 3.0, 3.0)["passed"]
    late = in_time(verdict, 3.0, 2.0)
    assert (late["passed"], late["ms"], late["max_ms"]) == (False, 3.0, 2.0)
    front = [{"number": 3, "artifact_bytes": 1000}]
    assert why(front, 0, late, 0.001) == "No plan on the front is within 2 ms: trial 3 (1,000 bytes) takes 3 ms."


def test_why_is_one_sentence_that_names_the_trial_its_bytes_and_the_bound() -> None:
    front = [{"number": 3, "artifact_bytes": 1234567}, {"number": 9, "artifact_bytes": 1000}]
    verdict = {"passed": True, "delta_ne_upper": 0.0005, "refused": []}
    assert why(front, 0, verdict, 0.001) == (
        "Trial 3 is the smallest artifact (1,234,567 bytes) whose bound of delta NE holds 0.10% on the selection rows "
        "and, with +0.05%, on the gate's."
    )
    again = {**verdict, "refused": [{"index": 1, "delta_ne_upper": 0.002}]}
    assert "trial 9, was refused there (+0.20%)" in why(front, 0, again, 0.001)
    assert why(front, 0, {**verdict, "passed": False}, 0.001).startswith("No plan was shown to hold delta NE of 0.10%")
