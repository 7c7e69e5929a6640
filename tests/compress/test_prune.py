"""compress/methods/prune.py: scores, orders, cuts, bands of centroids and columns.

Legend: N rows, D embedding dim, r columns kept.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from compress.errors import PlanError
from compress.methods.prune import (
    EDGES,
    bucket_edges,
    cut_for_coverage,
    cut_for_share,
    keep_columns,
    order_by_score,
    row_scores,
    settle_cut,
)


def frequency_order(counts: np.ndarray) -> np.ndarray:
    """Ranked by how often rows are looked up."""
    return order_by_score(counts.astype(np.float32), counts)


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


# -- scores ----------------------------------------------------------------------------------------------------------


def some_rows() -> tuple[np.ndarray, np.ndarray]:
    """Rows (40, 6) float32 and counts (40,)."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 6)).astype(np.float32), rng.integers(0, 9, 40)


def test_row_scores_by_frequency_and_norm() -> None:
    rows, counts = some_rows()
    norms = np.sqrt((rows.astype(np.float64) ** 2).sum(1))
    for score, expected in (("frequency", counts), ("norm", norms), ("frequency_norm", counts * norms)):
        found = row_scores(score, rows, counts)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_row_scores_by_fisher_are_the_predicted_loss_of_reading_the_centroid() -> None:
    rows, counts = some_rows()
    centroid = rows.mean(0)
    root = np.random.default_rng(1).normal(size=(6, 6))
    full = root @ root.T
    expected = [n * (w - centroid) @ full @ (w - centroid) for w, n in zip(rows, counts, strict=True)]
    np.testing.assert_allclose(row_scores("fisher", rows, counts, centroid, full), expected, rtol=1e-3)
    diagonal = np.diag(full)
    by_diagonal = row_scores("fisher", rows, counts, centroid, diagonal)
    np.testing.assert_allclose(by_diagonal, row_scores("fisher", rows, counts, centroid, np.diag(diagonal)), rtol=1e-3)
    by_trace = row_scores("fisher", rows, counts, centroid, 2.5)
    np.testing.assert_allclose(by_trace, row_scores("fisher", rows, counts, centroid, 2.5 * np.eye(6)), rtol=1e-3)


def test_row_scores_refuse_what_they_do_not_know() -> None:
    rows, counts = some_rows()
    with pytest.raises(PlanError, match="score 'luck': rows are ranked by frequency, norm"):
        row_scores("luck", rows, counts)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="score fisher: needs the centroid"):
        row_scores("fisher", rows, counts, fisher=1.0)
    with pytest.raises(PlanError, match="score fisher: needs the centroid"):
        row_scores("fisher", rows, counts, centroid_D=rows[0])


def test_order_by_score_breaks_ties_by_count_then_row() -> None:
    scores = np.array([0, 0, 1, 5, 1, 1, 5], dtype=np.float32)
    counts = np.array([0, 0, 3, 1, 4, 3, 1])
    assert order_by_score(scores, counts).tolist() == [0, 1, 3, 6, 4, 2, 5]


def test_order_by_score_refuses_nan() -> None:
    with pytest.raises(PlanError, match="score of row 3 is NaN"):
        order_by_score(np.array([0, 0, 1, np.nan]), np.zeros(4))


# -- several centroids -----------------------------------------------------------------------------------------------


# -- columns ---------------------------------------------------------------------------------------------------------


def column_loss(rows_ND: torch.Tensor, kept: list[int]) -> float:
    """Energy that least squares cannot rebuild from some columns, by torch.linalg.lstsq."""
    return float((rows_ND - rows_ND[:, kept] @ torch.linalg.lstsq(rows_ND[:, kept], rows_ND).solution).square().sum())


def test_keep_columns_rebuilds_as_least_squares_does_and_nearly_as_the_best_subset() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn((8, 8), generator=generator, dtype=torch.float64) * 0.6 ** torch.arange(8)
    rows_ND = torch.randn((400, 8), generator=generator, dtype=torch.float64) @ mix.T
    for count in (1, 3, 5):
        kept, rebuild = keep_columns(rows_ND.T @ rows_ND, count)
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert rebuild.shape == (count, 8)
        assert torch.equal(rebuild[:, kept], torch.eye(count))
        lost = float((rows_ND - rows_ND[:, kept] @ rebuild.double()).square().sum())
        assert lost == pytest.approx(column_loss(rows_ND, kept.tolist()), rel=1e-4)
        losses = [column_loss(rows_ND, list(c)) for c in itertools.combinations(range(8), count)]
        assert lost <= 1.3 * min(losses)
        assert lost < 0.9 * float(np.median(losses))


def test_keep_columns_rebuilds_columns_that_copy_others() -> None:
    half = torch.randn((50, 3), generator=torch.Generator().manual_seed(1))
    rows_ND = torch.cat([half, 2 * half], dim=1)
    kept, rebuild = keep_columns(rows_ND.T @ rows_ND, 3)
    assert torch.allclose(rows_ND[:, kept] @ rebuild, rows_ND, atol=1e-4)
    for count in (4, 6):  # more than there are directions
        kept, rebuild = keep_columns(rows_ND.T @ rows_ND, count)
        assert torch.allclose(rows_ND[:, kept] @ rebuild, rows_ND, atol=1e-3)


def test_keep_columns_of_nothing_and_refusals() -> None:
    kept, rebuild = keep_columns(torch.zeros(4, 4), 2)
    assert len(kept) == 2
    assert torch.isfinite(rebuild).all()
    for count in (0, 5):
        with pytest.raises(PlanError, match=f"{count} columns: give a number from 1 to 4"):
            keep_columns(torch.eye(4), count)
