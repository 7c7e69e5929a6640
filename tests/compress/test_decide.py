"""compress/search/decide.py: who sees which rows, the front, who comes to the gate, and what it says."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from compress_builders import World

from compress.search.decide import (
    FEWEST_ROWS,
    candidates,
    described,
    front_of,
    gate,
    holds,
    quality_of,
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
    return {**quality_of(Quality(upper - 0.0004, upper, 0.0, -0.1)), "overlap": 0.8}


def run_gate(uppers: dict[int, float], order: list[int], tries: int) -> tuple[int, dict[str, Any], list]:
    """The gate over points of known bounds, and what it asked for."""
    asked: list[tuple[int, float]] = []

    def measure(index: int, confidence: float) -> dict[str, Any]:
        asked.append((index, confidence))
        return quality(uppers[index])

    chosen, verdict = gate(order, tries, 0.001, 5000, measure)
    return chosen, verdict, asked


def test_gate_takes_the_first_that_holds_and_asks_no_further() -> None:
    chosen, verdict, asked = run_gate({4: 0.002, 2: 0.0009, 7: 0.0}, [4, 2, 7], 3)
    assert (chosen, verdict["passed"], verdict["tried"]) == (2, True, [4, 2])
    assert verdict["refused"] == [{"index": 4, "delta_ne_upper": 0.002}]
    assert verdict["delta_ne_upper"] == 0.0009
    assert (verdict["budget"], verdict["rows"], verdict["overlap"]) == (0.001, 5000, 0.8)
    assert "rows_to_resolve" not in verdict
    assert [i for i, _ in asked] == [4, 2]


@pytest.mark.parametrize(("points", "tries", "confidence"), [(3, 3, 1 - 0.05 / 3), (5, 2, 0.975), (1, 3, 0.95)])
def test_gate_asks_more_of_each_the_more_may_be_tried(points: int, tries: int, confidence: float) -> None:
    """Bonferroni, over those that may come, not those that did."""
    _, verdict, asked = run_gate(dict.fromkeys(range(points), 0.0), list(range(points)), tries)
    assert asked == [(0, pytest.approx(confidence))]
    assert verdict["confidence"] == pytest.approx(confidence)


def test_gate_that_refuses_all_gives_the_closest_and_the_rows_it_would_take() -> None:
    uppers = {0: 0.004, 1: 0.0012, 2: 0.003, 3: 0.0}
    chosen, verdict, asked = run_gate(uppers, [0, 1, 2, 3], 3)
    assert (chosen, verdict["passed"], verdict["tried"]) == (1, False, [0, 1, 2])
    assert [r["index"] for r in verdict["refused"]] == [0, 1, 2]
    assert verdict["delta_ne_upper"] == 0.0012
    assert verdict["rows_to_resolve"] == rows_to_resolve(Quality(0.0008, 0.0012, 0.0, -0.1), 5000, 0.001) == 20_000
    assert len(asked) == 3


def test_gate_never_lets_a_bound_that_is_not_a_number_pass() -> None:
    chosen, verdict, _ = run_gate({0: float("nan"), 1: 0.002}, [0, 1], 2)
    assert not verdict["passed"]
    assert chosen == 1


def test_gate_at_its_confidence_lets_few_bad_plans_pass() -> None:
    """Three plans that lose just too much: one of them passes in about one of twenty searches."""
    rng = np.random.default_rng(0)

    def measure(_index: int, confidence: float) -> dict[str, Any]:
        estimate = rng.normal(0.0010001, 0.0003)
        return {**quality(estimate + 0.0003 * NormalDist().inv_cdf(confidence)), "delta_ne": estimate}

    passed = sum(gate([0, 1, 2], 3, 0.001, 1000, measure)[1]["passed"] for _ in range(400))
    assert 5 < passed < 35


def test_why_is_one_sentence_that_names_the_trial_its_bytes_and_the_bound() -> None:
    front = [described(trial(7, 1234567, 0.0), {"delta_ne_upper": 0.0})]
    good, bad = ({**quality(u), "passed": u < 0.001, "refused": []} for u in (0.0005, 0.0021))
    assert why(front, 0, good, 0.001) == (
        "Trial 7 is the smallest artifact (1,234,577 bytes) whose bound of delta NE holds 0.10% on the selection rows "
        "and, with +0.05%, on the gate's."
    )
    again = {**good, "refused": [{"index": 1, "delta_ne_upper": 0.002}] * 2}
    assert why(front, 0, again, 0.001).endswith("on the gate's after 2 smaller ones were refused.")
    assert why(front, 0, bad, 0.001).startswith(
        "No plan was shown to hold delta NE of 0.10%: trial 7 (1,234,577 bytes)"
    )
