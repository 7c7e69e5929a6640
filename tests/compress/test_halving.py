"""compress/search/halving.py against the definitions: fronts, crowding, who goes on, hypervolume."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from compress.search.halving import (
    MIN_RUNG_ROWS,
    Point,
    best_first,
    crowding,
    fronts,
    goes_on,
    hypervolume,
    rung_ends,
)


def dominates(one: np.ndarray, other: np.ndarray) -> bool:
    """As good in all, better in one."""
    return bool(all(a <= b for a, b in zip(one, other, strict=True)) and any(one < other))


def naive_fronts(values: np.ndarray) -> list[int]:
    """Peeled off one by one."""
    left, number, found = set(range(len(values))), 0, {}
    while left:
        top = {i for i in left if not any(dominates(values[j], values[i]) for j in left)}
        found |= dict.fromkeys(top, number)
        left, number = left - top, number + 1
    return [found[i] for i in range(len(values))]


def naive_crowding(values: np.ndarray, own: list[int]) -> list[float]:
    """Of points whose objectives are all different: the neighbours' distance, summed over scaled objectives."""
    total = []
    for i in range(len(values)):
        mates = [j for j in range(len(values)) if own[j] == own[i]]
        lonely = 0.0
        for o in range(values.shape[1]):
            below = [values[j, o] for j in mates if values[j, o] < values[i, o]]
            above = [values[j, o] for j in mates if values[j, o] > values[i, o]]
            if not below or not above:
                lonely = np.inf
                continue
            span = max(values[j, o] for j in mates) - min(values[j, o] for j in mates)
            lonely += (min(above) - max(below)) / span
        total.append(lonely)
    return total


@pytest.mark.parametrize("objectives", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_fronts_and_crowding_equal_their_definitions(seed: int, objectives: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.random((40, objectives))
    found = fronts(values)
    assert found.tolist() == naive_fronts(values)
    np.testing.assert_allclose(crowding(values, found), naive_crowding(values, found.tolist()))


def test_fronts_of_equal_points_are_the_same() -> None:
    values = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 3.0], [2.0, 1.0], [1.0, 2.0]])
    assert fronts(values).tolist() == naive_fronts(values) == [0, 0, 1, 0, 0]
    rng = np.random.default_rng(0)
    ties = rng.integers(0, 4, (60, 3)).astype(float)
    assert fronts(ties).tolist() == naive_fronts(ties)
    assert not np.isnan(crowding(ties, fronts(ties))).any()


def test_fronts_and_crowding_of_one_point_and_of_none() -> None:
    assert fronts(np.zeros((1, 2))).tolist() == [0]
    assert crowding(np.zeros((1, 2)), np.zeros(1, dtype=int)).tolist() == [np.inf]
    assert fronts(np.zeros((0, 2))).tolist() == []


@pytest.mark.parametrize("seed", range(4))
def test_best_first_is_nsga2s_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = [Point(tuple(rng.random(2)), max(0.0, float(rng.normal(-0.5)))) for _ in range(40)]
    holding = [i for i, p in enumerate(points) if p.violation == 0]
    values = np.array([points[i].objectives for i in holding])
    own = naive_fronts(values)
    lonely = naive_crowding(values, own)
    expected = [i for _, _, i in sorted(zip(own, [-x for x in lonely], holding, strict=True))]
    breaking = sorted(set(range(40)) - set(holding), key=lambda i: points[i].violation)
    assert best_first(points) == expected + breaking
    assert 5 < len(holding) < 35


def test_best_first_puts_what_holds_before_what_does_not_and_the_least_broken_next() -> None:
    points = [Point((0.0, 0.0), 0.3), Point((9.0, 9.0)), Point((0.0, 0.0), 0.1), Point((8.0, 9.5), -0.5)]
    assert best_first(points) == [1, 3, 2, 0]
    assert best_first([Point((1.0,), 0.2), Point((5.0,), 0.2)]) == [0, 1]
    assert best_first([]) == []


@pytest.mark.parametrize("eta", [2, 3, 4])
def test_about_one_in_eta_goes_on(eta: int) -> None:
    rng = np.random.default_rng(eta)
    before: list[Point] = []
    gone = 0
    for _ in range(300):
        mine = Point((float(rng.random()),))
        gone += goes_on(before, mine, eta)
        before.append(mine)
    assert gone / 300 == pytest.approx(1 / eta, rel=0.3)


def test_the_first_goes_on_and_so_does_the_best_ever() -> None:
    assert goes_on([], Point((5.0, 5.0), 3.0), 3)
    before = [Point((float(n), float(n))) for n in range(1, 30)]
    assert goes_on(before, Point((0.5, 0.5)), 3)
    assert not goes_on(before, Point((50.0, 50.0)), 3)


@pytest.mark.parametrize("seed", range(3))
def test_no_point_goes_on_where_one_that_dominates_it_would_not(seed: int) -> None:
    """Among the same others; equal or smaller violations, fewer fronts below."""
    rng = np.random.default_rng(seed)
    for _ in range(60):
        before = [Point(tuple(rng.random(3)), max(0.0, float(rng.normal(-1)))) for _ in range(12)]
        worse = Point(tuple(rng.random(3)), max(0.0, float(rng.normal(-1))))
        better = Point(tuple(0.3 * np.array(worse.objectives)), 0.5 * worse.violation)
        order = best_first([*before, worse, better])
        assert order.index(13) < order.index(12)
        assert not goes_on([*before, better], worse, 13) or goes_on([*before, worse], better, 13)


@pytest.mark.parametrize(
    ("rows", "shares", "expected"),
    [
        (100_000, (0.1, 0.3, 1.0), [10_000, 30_000, 100_000]),
        (100_000, (1.0,), [100_000]),
        (20_000, (0.1, 0.3, 1.0), [6_000, 20_000]),
        (5_000, (0.1, 0.3, 1.0), [5_000]),
        (MIN_RUNG_ROWS, (0.5, 1.0), [MIN_RUNG_ROWS]),
        (2 * MIN_RUNG_ROWS, (0.5, 1.0), [MIN_RUNG_ROWS, 2 * MIN_RUNG_ROWS]),
        (10_000, (0.5, 0.99999, 1.0), [5_000, 9_999, 10_000]),
    ],
)
def test_rungs_end_at_their_shares_and_are_large_enough(
    rows: int, shares: tuple[float, ...], expected: list[int]
) -> None:
    assert rung_ends(rows, shares) == expected
    assert all(a < b for a, b in itertools.pairwise(expected))


@pytest.mark.parametrize("seed", range(3))
def test_hypervolume_is_the_share_of_random_points_that_are_dominated(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.random((12, 2)) * 1.3
    thrown = rng.random((100_000, 2)) * np.array([1.0, 2.0])
    hit = (points[None] <= thrown[:, None]).all(2).any(1).mean() * 2.0
    assert hypervolume(points, (1.0, 2.0)) == pytest.approx(hit, abs=0.02)


def test_hypervolume_by_hand() -> None:
    assert hypervolume(np.array([[0.0, 0.0]]), (2.0, 3.0)) == 6.0
    assert hypervolume(np.array([[0.0, 2.0], [1.0, 1.0], [1.0, 2.0], [1.0, 1.0]]), (2.0, 3.0)) == 3.0
    assert hypervolume(np.array([[2.0, 0.0], [0.0, 3.0], [5.0, 5.0]]), (2.0, 3.0)) == 0.0
    assert hypervolume(np.zeros((0, 2)), (2.0, 3.0)) == 0.0
