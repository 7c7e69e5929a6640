"""compress/methods/codebook.py: nearest centroids against brute force, fits against Lloyd's algorithm written out.

Legend: N rows, D embedding dim, C centroids.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import compress.methods.codebook
from compress.methods.codebook import fit_codebook, metric_root, nearest


def some_rows(rows: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows (N, D) about a few centres, and how often each is looked up (N,) float64."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(6, dim)) * 2
    values = centres[rng.integers(0, 6, rows)] + rng.normal(size=(rows, dim)) * 0.7
    weight = np.floor(20.0 ** rng.random(rows))  # as in the tail of a table: from 1 to 19 lookups
    return torch.from_numpy(values).float(), torch.from_numpy(weight)


def some_metric(dim: int, seed: int = 0) -> np.ndarray:
    """A positive definite matrix (D, D) that minds some directions far more than others."""
    root = np.random.default_rng(seed).normal(size=(dim, dim)) * np.geomspace(3, 0.03, dim)
    return root @ root.T


def distances(rows_ND: Tensor, centroids_CD: Tensor, metric_DD: np.ndarray | None) -> np.ndarray:
    """(x - c)' F (x - c), one by one: (N, C)."""
    metric = np.eye(rows_ND.shape[1]) if metric_DD is None else metric_DD
    off = rows_ND.double().numpy()[:, None] - centroids_CD.double().numpy()[None]
    return np.array([[e @ metric @ e for e in row] for row in off])


def distortion(rows_ND: Tensor, weight_N: Tensor, centroids_CD: Tensor, metric_DD: np.ndarray | None) -> float:
    """Weighted mean squared distance of each row to its nearest centroid."""
    return float(np.average(distances(rows_ND, centroids_CD, metric_DD).min(1), weights=weight_N.numpy()))


def lloyd(rows: np.ndarray, weight: np.ndarray, metric: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Lloyd's algorithm from rows drawn by weight, centre by centre, until nothing moves."""
    rng = np.random.default_rng(seed)
    centres = rows[rng.choice(len(rows), count, replace=False, p=weight / weight.sum())]
    while True:
        off = rows[:, None] - centres[None]
        group = np.einsum("ncd,de,nce->nc", off, metric, off).argmin(1)
        moved = centres.copy()
        for c in range(count):
            if (group == c).any():
                moved[c] = np.average(rows[group == c], axis=0, weights=weight[group == c])
        if np.array_equal(moved, centres):
            return centres
        centres = moved


@pytest.mark.parametrize("dim", [4, 12])
def test_metric_root_squares_to_the_metric(dim: int) -> None:
    metric = some_metric(dim)
    root = metric_root(metric, dim).double().numpy()
    np.testing.assert_allclose(root @ root.T, metric, rtol=1e-4, atol=1e-5 * np.abs(metric).max())
    assert torch.equal(metric_root(None, dim), torch.eye(dim))


def test_metric_root_of_a_metric_with_rounding_below_zero_is_finite() -> None:
    metric = np.outer([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) - 1e-9 * np.eye(3)
    root = metric_root(metric, 3)
    assert bool(torch.isfinite(root).all())
    np.testing.assert_allclose((root @ root.T).numpy(), metric, atol=1e-5)


@pytest.mark.parametrize("metric", [None, some_metric(8)], ids=["plain", "metric"])
@pytest.mark.parametrize("count", [1, 2, 7, 256])
def test_nearest_is_what_brute_force_finds(metric: np.ndarray | None, count: int) -> None:
    rows, _ = some_rows(300, 8)
    centroids, _ = some_rows(count, 8, seed=1)
    found = nearest(rows, centroids, metric_root(metric, 8))
    assert found.dtype == np.uint8
    far = distances(rows, centroids, metric)
    assert (far[np.arange(300), found] <= far.min(1) * (1 + 1e-4) + 1e-5).all()
    assert (found == far.argmin(1)).mean() > 0.99


def test_nearest_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = some_rows(300, 8)
    centroids, _ = some_rows(9, 8, seed=1)
    whole = nearest(rows, centroids, torch.eye(8))
    monkeypatch.setattr(compress.methods.codebook, "CHUNK_ROWS", 7)
    assert np.array_equal(nearest(rows, centroids, torch.eye(8)), whole)
    assert len(nearest(rows[:0], centroids, torch.eye(8))) == 0


def test_nearest_depends_on_the_row_alone() -> None:
    """What makes trials exact: a row among others, or alone, reads the same centroid."""
    rows, _ = some_rows(200, 16)
    centroids, root = some_rows(64, 16, seed=1)[0], metric_root(some_metric(16), 16)
    whole = nearest(rows, centroids, root)
    assert [int(nearest(rows[i : i + 1], centroids, root)[0]) for i in range(200)] == whole.tolist()


@pytest.mark.parametrize("metric", [None, some_metric(8)], ids=["plain", "metric"])
@pytest.mark.parametrize("count", [2, 4, 16])
def test_codebook_distorts_about_as_little_as_lloyd_from_chance(metric: np.ndarray | None, count: int) -> None:
    rows, weight = some_rows(400, 8)
    plain = np.eye(8) if metric is None else metric
    starts = [lloyd(rows.double().numpy(), weight.numpy(), plain, count, seed) for seed in range(5)]
    usual = np.median([distortion(rows, weight, torch.from_numpy(s), metric) for s in starts])
    found = fit_codebook(rows, weight, count, metric_root(metric, 8))
    assert found.shape == (count, 8)
    assert found.dtype == torch.float32
    assert distortion(rows, weight, found, metric) < 1.1 * usual


def test_codebook_of_one_is_the_mean_by_lookups() -> None:
    rows, weight = some_rows(100, 8)
    expected = np.average(rows.double().numpy(), axis=0, weights=weight.numpy())
    np.testing.assert_allclose(fit_codebook(rows, weight, 1, torch.eye(8))[0], expected, rtol=1e-5, atol=1e-6)


def test_codebook_falls_with_more_centroids_and_minds_its_metric() -> None:
    rows, weight = some_rows(400, 8)
    metric = some_metric(8)
    seen, plain = metric_root(metric, 8), torch.eye(8)
    losses = [distortion(rows, weight, fit_codebook(rows, weight, c, seen), metric) for c in (1, 2, 4, 16, 64)]
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < 0.9 * distortion(rows, weight, fit_codebook(rows, weight, 16, plain), metric)


def test_codebook_minds_how_often_rows_are_looked_up() -> None:
    rows, weight = some_rows(400, 8)
    heavy = distortion(rows, weight, fit_codebook(rows, weight, 8, torch.eye(8)), None)
    flat = distortion(rows, weight, fit_codebook(rows, torch.ones(400).double(), 8, torch.eye(8)), None)
    assert heavy < 0.97 * flat


def test_codebook_is_the_same_each_time() -> None:
    rows, weight = some_rows(400, 8)
    assert torch.equal(fit_codebook(rows, weight, 16, torch.eye(8)), fit_codebook(rows, weight, 16, torch.eye(8)))


@pytest.mark.parametrize("kind", ["all alike", "never looked up", "fewer than centroids"])
def test_codebook_of_few_different_rows_is_finite(kind: str) -> None:
    rows, weight = some_rows(40, 8)
    if kind == "all alike":
        rows = rows[:1].expand(40, 8).clone()
    elif kind == "never looked up":
        weight = torch.zeros(40, dtype=torch.float64)
    else:
        rows, weight = rows[:5], weight[:5]
    found = fit_codebook(rows, weight, 16, torch.eye(8))
    assert bool(torch.isfinite(found).all())
    if kind == "all alike":
        torch.testing.assert_close(found, rows[:16])
