"""compress/search/allocate.py against brute force: budgets are met, tiers fall with rank, optima are found.

Legend: E buckets in order of rank, B options in order of rising bits.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from compress.errors import PlanError
from compress.search import allocate as module
from compress.search.allocate import Allocation, Menus, Options, allocate, floor_bytes, knapsack


def random_table(rng: np.random.Generator, buckets: int, options: int, fixed: bool, name: str = "t") -> Options:
    """Bytes rise and losses fall with bits; early buckets matter most."""
    rows = rng.integers(1, 20, buckets)[:, None]
    bytes_EB = rows * np.concatenate([[0], np.cumsum(rng.integers(1, 5, options - 1))])
    loss_EB = rng.exponential(1.0, (buckets, 1)) * np.sort(rng.random((buckets, options)))[:, ::-1]
    loss_EB = loss_EB / np.arange(1, buckets + 1)[:, None]
    return Options(name, bytes_EB, loss_EB, rng.integers(0, 25, options) if fixed else None)


def cost_of(table: Options, choice: np.ndarray) -> tuple[int, float]:
    """Bytes and loss of one table's choice, counted plainly."""
    fixed = 0 if table.fixed_B is None else sum(int(table.fixed_B[b]) for b in set(choice.tolist()))
    own = sum(int(table.bytes_EB[e, b]) for e, b in enumerate(choice))
    return own + fixed, sum(float(table.loss_EB[e, b]) for e, b in enumerate(choice))


def every_plan(tables: list[Options]) -> list[tuple[int, float]]:
    """Bytes and loss of every plan whose options fall with rank."""
    per_table = []
    for table in tables:
        buckets, options = table.bytes_EB.shape
        falling = [c for c in itertools.product(range(options), repeat=buckets) if list(c) == sorted(c, reverse=True)]
        per_table.append([cost_of(table, np.array(c)) for c in falling])
    return [(sum(b for b, _ in plan), sum(v for _, v in plan)) for plan in itertools.product(*per_table)]


def check_counts(tables: list[Options], found: Allocation, budget: int) -> None:
    """An allocation is well formed, says what it costs, and keeps the budget."""
    for index, table in enumerate(tables):
        choice = found.choices[index]
        assert choice.shape == (len(table.bytes_EB),)
        assert (np.diff(choice) <= 0).all()
        assert found.bytes[index] == cost_of(table, choice)[0]
        assert found.loss[index] == pytest.approx(cost_of(table, choice)[1])
    assert found.bytes.sum() <= budget


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_allocate_lies_between_the_hull_and_the_best_of_all_plans(seed: int, fixed: bool) -> None:
    rng = np.random.default_rng(seed)
    tables = [random_table(rng, int(rng.integers(1, 5)), int(rng.integers(2, 5)), fixed) for _ in range(2)]
    plans = every_plan(tables)
    floor, most = min(b for b, _ in plans), max(b for b, _ in plans)
    assert floor_bytes(tables).sum() == floor
    for budget in np.linspace(floor, most + 1, 15).astype(int):
        found = allocate(tables, int(budget))
        check_counts(tables, found, int(budget))
        best = min(loss for size, loss in plans if size <= budget)
        assert found.loss.sum() >= best - 1e-9
        # under its multiplier no plan is better than the one before the fill, and the fill only gains
        penalised = [loss + found.multiplier * size for size, loss in plans]
        hull = [plan for plan, value in zip(plans, penalised, strict=True) if value <= min(penalised) + 1e-9]
        assert found.loss.sum() <= max(loss for size, loss in hull if size <= budget) + 1e-9


def test_allocate_is_the_optimum_at_every_size_on_the_hull() -> None:
    rng = np.random.default_rng(5)
    tables = [random_table(rng, 3, 4, True), random_table(rng, 4, 3, False)]
    plans = every_plan(tables)
    on_hull = 0
    for size, loss in plans:
        left = [(loss2 - loss) / (size - size2) for size2, loss2 in plans if size2 < size]
        right = [(loss - loss2) / (size2 - size) for size2, loss2 in plans if size2 > size]
        if all(loss <= v for s, v in plans if s == size) and min(left, default=np.inf) > max(max(right, default=0), 0):
            on_hull += 1
            assert allocate(tables, size).loss.sum() == pytest.approx(loss)
    assert on_hull > 4


def test_allocate_falls_with_the_budget_and_reaches_both_ends() -> None:
    rng = np.random.default_rng(1)
    tables = [random_table(rng, 96, 5, True, f"t{i}") for i in range(8)]
    floor = int(floor_bytes(tables).sum())
    most = sum(int(t.bytes_EB.max(1).sum()) for t in tables) + 500
    budgets = np.linspace(floor, most, 12).astype(int)
    losses = []
    for budget in budgets:
        found = allocate(tables, int(budget))
        check_counts(tables, found, int(budget))
        losses.append(found.loss.sum())
    assert (np.diff(losses) <= 1e-12).all()
    assert losses[-1] == pytest.approx(sum(t.loss_EB.min(1).sum() for t in tables))
    assert allocate(tables, int(most)).multiplier == 0


def test_allocate_spends_nearly_all_of_a_binding_budget() -> None:
    rng = np.random.default_rng(2)
    tables = [random_table(rng, 96, 5, False, f"t{i}") for i in range(8)]
    most = sum(int(t.bytes_EB.max(1).sum()) for t in tables)
    assert allocate(tables, most // 3).bytes.sum() > 0.999 * (most // 3)


def test_allocate_leaves_rows_that_nobody_reads_on_the_centroid() -> None:
    loss = np.array([[4.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    table = Options("t", np.array([[0, 10, 20], [0, 100, 200]]), loss)
    assert allocate([table], 10**6).choices[0].tolist() == [2, 0]


def test_allocate_gives_a_column_of_numbers_only_where_a_dim_packs() -> None:
    loss = np.array([[9.0, np.inf, 2.0, 0.0]] * 3)
    table = Options("t", np.array([[0, 4, 8, 16]] * 3), loss)
    for budget in range(60):
        assert 1 not in allocate([table], budget).choices[0]


def test_allocate_pays_for_a_tier_only_where_it_is_worth_it() -> None:
    loss = np.array([[5.0, 1.0], [0.2, 0.0]])
    dear = Options("t", np.array([[0, 10], [0, 10]]), loss, np.array([0, 1000]))
    assert allocate([dear], 1009).choices[0].tolist() == [0, 0]
    assert allocate([dear], 1010).choices[0].tolist() == [1, 0]
    assert allocate([dear], 1020).choices[0].tolist() == [1, 1]


def test_allocate_of_no_table_and_tables_of_different_shapes() -> None:
    assert allocate([], 0).choices == []
    rng = np.random.default_rng(3)
    tables = [random_table(rng, 1, 2, True), random_table(rng, 7, 5, True), random_table(rng, 3, 3, False)]
    check_counts(tables, allocate(tables, 300), 300)


@pytest.mark.parametrize("solve", [allocate, knapsack])
def test_a_budget_below_the_floor_is_refused_with_what_holds_it_up(solve: object) -> None:
    tables = [Options(f"t{i}", np.array([[1000 * i, 5000 * i]]), np.array([[1.0, 0.0]])) for i in range(1, 6)]
    with pytest.raises(PlanError, match="need 15,000 at least, of which t5 5,000, t4 4,000, t3 3,000"):
        solve(tables, 14_999)
    assert solve(tables, 15_000)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (Options("t", np.zeros((2, 3)), np.zeros((2, 2))), "table t: bytes of shape"),
        (Options("t", np.zeros((0, 3)), np.zeros((0, 3))), "table t: bytes of shape"),
        (Options("t", np.zeros((1, 2)), np.array([[0.0, np.nan]])), "table t: a loss is NaN"),
        (Options("t", np.array([[0, -1]]), np.zeros((1, 2))), "negative"),
        (Options("t", np.zeros((1, 2)), np.zeros((1, 2)), np.zeros(3)), "fixed bytes"),
        (Options("t", np.zeros((1, 2)), np.full((1, 2), np.inf)), "no options that fall"),
        (Options("t", np.zeros((2, 2)), np.array([[0.0, np.inf], [np.inf, 0.0]])), "no options that fall"),
    ],
)
def test_allocate_refuses_options_that_do_not_fit(table: Options, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        allocate([table], 100)


# -- several menus a table --------------------------------------------------------------------------------------------


def random_menus(seed: int, tables: int = 2, buckets: int = 3, options: int = 3) -> list[list[Options]]:
    """Tables of two menus each, whose first has the fewest bytes: cheaper there, less loss in the other."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(tables):
        small = random_table(rng, buckets, options, True, f"t{index}")
        assert small.fixed_B is not None
        better = replace(
            small,
            bytes_EB=small.bytes_EB + rng.integers(0, 4, small.bytes_EB.shape),
            loss_EB=small.loss_EB * rng.uniform(0.4, 1.05, small.loss_EB.shape),
            fixed_B=small.fixed_B + rng.integers(0, 6, options),
        )
        found.append([small, better])
    return found


def every_pick(menus: list[list[Options]]) -> list[tuple[int, float]]:
    """Bytes and loss of every plan of every way to pick a menu."""
    return [plan for tables in itertools.product(*menus) for plan in every_plan(list(tables))]


@pytest.mark.parametrize("seed", range(6))
def test_menus_are_the_optimum_at_every_size_on_the_hull(seed: int) -> None:
    menus = random_menus(seed)
    plans = every_pick(menus)
    both = Menus(menus)
    on_hull = 0
    for size, loss in set(plans):
        left = [(loss2 - loss) / (size - size2) for size2, loss2 in plans if size2 < size]
        right = [(loss - loss2) / (size2 - size) for size2, loss2 in plans if size2 > size]
        if all(loss <= v for s, v in plans if s == size) and min(left, default=np.inf) > max(max(right, default=0), 0):
            on_hull += 1
            assert both.allocate(size)[1].loss.sum() == pytest.approx(loss)
    assert on_hull > 4


@pytest.mark.parametrize("seed", range(6))
def test_menus_lie_between_the_hull_and_the_best_of_all_plans(seed: int) -> None:
    menus = random_menus(seed)
    plans = every_pick(menus)
    both = Menus(menus)
    for budget in np.linspace(min(b for b, _ in plans), max(b for b, _ in plans), 9).astype(int):
        picks, found = both.allocate(int(budget))
        check_counts([several[p] for several, p in zip(menus, picks, strict=True)], found, int(budget))
        assert found.loss.sum() >= min(loss for size, loss in plans if size <= budget) - 1e-9
        penalised = [loss + found.multiplier * size for size, loss in plans]
        hull = [plan for plan, value in zip(plans, penalised, strict=True) if value <= min(penalised) + 1e-9]
        assert found.loss.sum() <= max(loss for size, loss in hull if size <= budget) + 1e-9


def test_menus_asked_again_in_any_order_answer_as_fresh_ones() -> None:
    """What is remembered changes nothing but the work: near the same multiplier, so within the last move."""
    menus = random_menus(3, tables=6, buckets=24, options=5)
    floor = int(floor_bytes([several[0] for several in menus]).sum())
    most = sum(int(o.bytes_EB.max(1).sum()) for several in menus for o in several[:1])
    budgets = np.linspace(floor, most, 9).astype(int).tolist()
    fresh = {b: Menus(menus).allocate(b)[1] for b in budgets}
    for order in (budgets, budgets[::-1], [budgets[i] for i in (4, 0, 8, 4, 2, 6)]):
        kept = Menus(menus)
        for budget in order:
            found = kept.allocate(budget)[1]
            assert found.bytes.sum() <= budget
            assert found.cost == pytest.approx(fresh[budget].cost, rel=5e-3)
            again = kept.allocate(budget)[1]
            assert again.cost == pytest.approx(found.cost, rel=5e-3)


def test_menus_of_more_bytes_cost_no_more_and_no_more_than_one_menu_alone() -> None:
    menus = random_menus(5, tables=8, buckets=48, options=5)
    floor = int(floor_bytes([several[0] for several in menus]).sum())
    most = sum(int(several[1].bytes_EB.max(1).sum()) for several in menus) + 200
    both, costs = Menus(menus), []
    for budget in np.linspace(floor, most, 10).astype(int):
        costs.append(both.allocate(int(budget))[1].cost)
        alone = allocate([several[0] for several in menus], int(budget)).cost
        assert costs[-1] <= alone * (1 + 5e-3)
    assert (np.diff(costs) <= 5e-3 * np.array(costs[:-1])).all()
    assert both.allocate(most * 2)[1].multiplier == 0


def test_menus_of_no_table_and_a_budget_below_the_floor() -> None:
    picks, found = Menus([]).allocate(0)
    assert (picks, found.choices) == ([], [])
    menus = random_menus(0)
    floor = int(floor_bytes([several[0] for several in menus]).sum())
    with pytest.raises(PlanError, match=f"budget {floor - 1:,} bytes: the tables need {floor:,} at least"):
        Menus(menus).allocate(floor - 1)
    assert Menus(menus).allocate(floor)[1].bytes.sum() == floor


# -- one option a table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(25))
def test_knapsack_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = []
    for index in range(5):
        options = int(rng.integers(1, 6))
        loss = rng.exponential(1.0, (1, options)) - 0.1
        loss[0, 1:][rng.random(options - 1) < 0.1] = np.inf
        tables.append(Options(f"t{index}", rng.integers(0, 50, (1, options)), loss, rng.integers(0, 5, options)))
    plans = every_plan(tables)
    plans = [p for p in plans if np.isfinite(p[1])]
    for budget in np.linspace(min(b for b, _ in plans), max(b for b, _ in plans), 7).astype(int):
        found = knapsack(tables, int(budget))
        assert found.exact
        assert found.loss == pytest.approx(min(loss for size, loss in plans if size <= budget))
        assert found.bytes <= budget
        counted = [cost_of(t, np.array([c])) for t, c in zip(tables, found.choices, strict=True)]
        assert (sum(b for b, _ in counted), pytest.approx(sum(v for _, v in counted))) == (found.bytes, found.loss)


def test_knapsack_beats_the_hull_where_tables_are_large() -> None:
    tables = [Options(f"t{i}", np.array([[0, 60]]), np.array([[10.0, 0.0]])) for i in range(2)]
    tables.append(Options("odd", np.array([[0, 100]]), np.array([[17.0, 0.0]])))
    assert knapsack(tables, 100).loss == 10.0 + 10.0  # the two at 60 are denser, and only one of them would fit
    assert knapsack(tables, 120).loss == 17.0


def test_knapsack_of_a_thousand_tables_is_exact() -> None:
    rng = np.random.default_rng(4)
    tables = [random_table(rng, 1, 5, False, f"t{i}") for i in range(1000)]
    budget = sum(int(t.bytes_EB.max()) for t in tables) // 3
    found = knapsack(tables, budget)
    assert found.exact
    assert found.loss <= allocate(tables, budget).loss.sum()


def test_knapsack_says_when_it_had_to_thin_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    tables = [Options(f"t{i}", rng.integers(0, 10**6, (1, 4)), rng.random((1, 4))) for i in range(12)]
    budget = sum(int(t.bytes_EB.min()) for t in tables) + 10**6
    exact = knapsack(tables, budget)
    monkeypatch.setattr(module, "MAX_STATES", 3)
    thinned = knapsack(tables, budget)
    assert exact.exact
    assert not thinned.exact
    assert thinned.bytes <= budget
    assert exact.loss <= thinned.loss <= allocate(tables, budget).loss.sum()


def test_knapsack_refuses_tables_of_several_buckets() -> None:
    with pytest.raises(PlanError, match="2 buckets, the knapsack takes one: use allocate"):
        knapsack([Options("t", np.zeros((2, 2)), np.zeros((2, 2)))], 10)
