"""compress/methods/prune.py: orders and cuts, pure functions of counts."""

from __future__ import annotations

import numpy as np
import pytest

from compress.methods.prune import (
    EDGES,
    bucket_edges,
    cut_for_coverage,
    cut_for_share,
    frequency_order,
    settle_cut,
)


def test_frequency_order_keeps_reserved_rows_first() -> None:
    counts = np.array([0, 0, 5, 9, 1, 9, 0])
    assert frequency_order(counts).tolist() == [0, 1, 3, 5, 2, 4, 6]


def test_frequency_order_keeps_reserved_rows_first_when_they_are_the_busiest() -> None:
    assert frequency_order(np.array([3, 100, 50, 60])).tolist() == [0, 1, 3, 2]


@pytest.mark.parametrize("rows", [2, 3, 1000])
def test_frequency_order_is_a_permutation_by_falling_count(rows: int) -> None:
    counts = np.random.default_rng(0).integers(0, 30, rows)
    order = frequency_order(counts)
    assert np.array_equal(np.sort(order), np.arange(rows))
    assert (np.diff(counts[order[2:]]) <= 0).all()


@pytest.mark.parametrize("rows", [2, 3, 4, 10, 97, 98, 1000, 10**6, 10**9])
def test_bucket_edges_go_from_the_reserved_rows_to_all(rows: int) -> None:
    edges = bucket_edges(rows)
    assert edges[0] == 2
    assert edges[-1] == rows
    assert (np.diff(edges) > 0).all()
    assert len(edges) <= EDGES + 1
    assert edges.dtype == np.int64


def test_bucket_edges_are_fine_at_the_head_and_spread_over_the_tail() -> None:
    edges = bucket_edges(1_000_000)
    assert len(edges) > 80
    assert (edges < 1000).sum() > 15
    assert np.diff(edges).max() <= 1_000_000 / (EDGES // 2 - 2)


@pytest.mark.parametrize("share", [1e-9, 0.01, 0.1, 0.333, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("rows", [2, 3, 30, 500, 123_457])
def test_cut_for_share_is_the_first_edge_that_keeps_enough(rows: int, share: float) -> None:
    edges = bucket_edges(rows)
    cut = cut_for_share(edges, share, rows)
    assert cut in edges
    assert cut >= share * rows
    lower = edges[edges < cut]
    assert len(lower) == 0 or lower[-1] < np.ceil(share * rows)


@pytest.mark.parametrize("coverage", [1e-6, 0.2, 0.5, 0.9, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("rows", [2, 3, 30, 500, 20_000])
def test_cut_for_coverage_is_the_first_edge_that_keeps_enough(rows: int, coverage: float) -> None:
    counts = np.random.default_rng(rows).zipf(1.5, rows).clip(max=10_000)
    counts[2:][counts[2:] == 1] = 0  # many rows are never looked up
    ordered = counts[frequency_order(counts)]
    edges = bucket_edges(rows)
    before = np.concatenate([[0], np.cumsum(ordered)])
    cut = cut_for_coverage(edges, before[edges], coverage)
    assert cut in edges
    assert before[cut] >= coverage * before[-1]
    lower = edges[edges < cut]
    assert len(lower) == 0 or before[lower[-1]] < coverage * before[-1]


def test_cut_for_coverage_of_all_lookups_drops_rows_without_any() -> None:
    edges = np.array([2, 5, 8, 10])
    assert cut_for_coverage(edges, np.array([1, 7, 9, 9]), 1.0) == 8


def test_cut_for_coverage_of_a_table_without_lookups_keeps_all() -> None:
    assert cut_for_coverage(np.array([2, 5, 10]), np.array([0, 0, 0]), 0.5) == 10


def test_cut_for_coverage_of_all_keeps_all_of_four_billion_lookups() -> None:
    total = 4_000_000_000
    assert cut_for_coverage(np.array([2, 5, 10]), np.array([10, total - 3, total]), 1.0) == 10


@pytest.mark.parametrize(
    ("cut", "rows", "expected"), [(2, 4, 2), (3, 4, 4), (4, 4, 4), (2, 3, 3), (2, 2, 2), (8, 10, 8)]
)
def test_settle_cut_counts_the_centroid(cut: int, rows: int, expected: int) -> None:
    assert settle_cut(cut, rows) == expected
