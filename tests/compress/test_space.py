"""compress/search/space.py: which plans a search tries."""

from __future__ import annotations

import random

import pytest

from compress.config import CompressionPlan, SearchConfig, TablePlan
from compress.methods.codec import row_bytes
from compress.search.space import distinct, mixed_plan, packable, plans, uniform_plan
from trainer.data.transform import TableInfo

TABLES = {
    name: TableInfo(name, "vocabulary", 100, dim, (name,)) for name, dim in {"a": 16, "b": 4, "c": 12, "d": 64}.items()
}
ONE = {"a": TABLES["a"]}
SEARCH = SearchConfig(bits=(8, 4, 2), coverage=(1.0, 0.9))


def effect(plan: CompressionPlan, tables: dict[str, TableInfo]) -> tuple[TablePlan, ...]:
    """What a plan does to each table."""
    return tuple(plan.of(name) for name in tables)


@pytest.mark.parametrize(
    ("dim", "bits", "expected"),
    [(16, 2, 2), (12, 2, 4), (4, 2, 4), (8, 2, 2), (4, 8, 8), (6, 4, 8), (6, 2, 8), (5, 2, 16), (5, 8, 16)]
    + [(5, 16, 16), (4, 32, 32), (5, 32, 32)],
)
def test_packable_is_the_fewest_bits_that_fit(dim: int, bits: int, expected: int) -> None:
    assert packable(dim, bits) == expected  # type: ignore[arg-type]
    row_bytes(dim, expected)


def test_uniform_plan_packs_every_table() -> None:
    plan = uniform_plan(TABLES, 2, 0.95)
    assert [p.bits for p in effect(plan, TABLES)] == [2, 4, 4, 2]
    assert {p.coverage for p in effect(plan, TABLES)} == {0.95}
    assert plan.default == TablePlan(bits=2, coverage=0.95)


def test_mixed_plan_packs_every_table_within_the_grid() -> None:
    rng = random.Random(0)
    for _ in range(50):
        plan = mixed_plan(TABLES, SEARCH, rng)
        assert set(plan.tables) == set(TABLES)
        for name, table in TABLES.items():
            row_bytes(table.embedding_dim, plan.of(name).bits)
            assert plan.of(name).coverage in SEARCH.coverage
            assert plan.of(name).bits in (2, 4, 8)


@pytest.mark.parametrize("trials", [1, 2, 3, 6, 7, 20, 60])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_plans_are_as_many_as_asked_distinct_and_careful_first(trials: int, seed: int) -> None:
    search = SEARCH.model_copy(update={"trials": trials, "seed": seed})
    tried = plans(TABLES, search)
    assert len(tried) == trials
    assert len({effect(p, TABLES) for p in tried}) == trials
    assert effect(tried[0], TABLES) == (TablePlan(bits=8, coverage=1.0),) * 4


def test_plans_with_room_hold_the_whole_grid_then_mixed_ones() -> None:
    tried = plans(TABLES, SEARCH.model_copy(update={"trials": 20}))
    grid = [uniform_plan(TABLES, b, c) for b in SEARCH.bits for c in SEARCH.coverage]
    assert all(p in tried[:6] for p in grid)
    assert all(set(p.tables) == set(TABLES) for p in tried[6:])
    assert len({effect(p, TABLES) for p in tried[6:]}) == 14
    assert any(len(set(effect(p, TABLES))) > 1 for p in tried[6:])


def test_plans_with_less_room_spread_over_the_grid() -> None:
    seen = set()
    for seed in range(12):
        tried = plans(TABLES, SEARCH.model_copy(update={"trials": 3, "seed": seed}))
        seen |= {p.default.bits for p in tried[1:]}
    assert seen == {2, 4, 8}


def test_plans_depend_on_nothing_but_the_seed() -> None:
    search = SEARCH.model_copy(update={"trials": 15})
    assert plans(TABLES, search) == plans(TABLES, search)
    assert plans(TABLES, search) != plans(TABLES, search.model_copy(update={"seed": 5}))


def test_plans_careful_comes_first_whatever_the_order_of_the_grid() -> None:
    search = SearchConfig(bits=(2, 16, 4), coverage=(0.5, 0.99, 0.9), trials=4)
    assert plans(TABLES, search)[0] == uniform_plan(TABLES, 16, 0.99)


@pytest.mark.parametrize(
    "tables",
    [pytest.param(ONE, id="mixed plans of one table"), pytest.param({"b": TABLES["b"]}, id="2 bits raised to 4")],
)
def test_plans_do_different_things(tables: dict[str, TableInfo]) -> None:
    tried = plans(tables, SEARCH.model_copy(update={"trials": 10}))
    assert len({effect(p, tables) for p in tried}) == len(tried)


def test_distinct_keeps_order() -> None:
    a, b = uniform_plan(TABLES, 8, 1.0), uniform_plan(TABLES, 4, 1.0)
    assert distinct(TABLES, [b, a, b, a, a]) == [b, a]


def test_distinct_keeps_the_first_of_two_spellings() -> None:
    plan = uniform_plan(TABLES, 2, 0.9)
    spelled = CompressionPlan(tables={name: plan.of(name) for name in TABLES})
    assert spelled != plan
    assert distinct(TABLES, [plan, spelled]) == [plan]
    assert distinct(TABLES, [spelled, plan]) == [spelled]
