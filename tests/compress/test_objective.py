"""compress/search/objective.py: the bound covers, the worst task decides, the front is a front."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from compress.search import objective
from compress.search.objective import (
    CONFIDENCE,
    Quality,
    bootstrap_ratio_upper,
    by_task,
    compare,
    delta_auc_error,
    delta_ne,
    midranks,
    placements,
    rows_to_resolve,
    top_overlap,
    worst,
)
from trainer.metrics import auc, row_losses


def sample_task(rows: int, seed: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (N, 1), the log-odds of a model and those of a noisier one."""
    rng = np.random.default_rng(seed)
    reference = rng.normal(0, 1.5, (rows, 1))
    labels = (rng.random((rows, 1)) < 1 / (1 + np.exp(-reference))).astype(np.float32)
    return labels, reference + noise * rng.normal(size=(rows, 1)), reference


def test_bootstrap_bound_covers_the_true_ratio_at_its_rate() -> None:
    """Paired losses of known means: a one-sided 95% bound lies above the true ratio in about 95% of samples."""
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(1000 + seed)
        base = rng.gamma(2.0, 0.3, 400)
        changed = base * 1.01 + rng.normal(0.0, 0.05, 400)
        covered += bootstrap_ratio_upper(changed, base, seed) >= 0.01
    assert 0.88 * 200 <= covered <= 0.99 * 200


def test_bootstrap_bound_is_above_the_estimate_and_tightens_with_rows() -> None:
    rng = np.random.default_rng(0)
    base = rng.gamma(2.0, 0.3, 8000)
    changed = base * 1.01 + rng.normal(0.0, 0.05, 8000)
    widths = []
    for rows in (500, 8000):
        estimate = changed[:rows].mean() / base[:rows].mean() - 1
        widths.append(bootstrap_ratio_upper(changed[:rows], base[:rows]) - estimate)
    assert 0 < widths[1] < widths[0] / 2.5


def test_bootstrap_pairs_rows() -> None:
    """Losses that differ by a constant factor have no spread at all, however noisy each is."""
    base = np.random.default_rng(0).gamma(0.5, 2.0, 300)
    assert bootstrap_ratio_upper(base * 1.02, base) == pytest.approx(0.02, abs=1e-6)
    assert bootstrap_ratio_upper(base, base) == pytest.approx(0.0, abs=1e-6)


def test_bootstrap_is_repeatable_and_depends_on_its_seed() -> None:
    rng = np.random.default_rng(0)
    base, changed = rng.gamma(2.0, 0.3, 500), rng.gamma(2.0, 0.3, 500)
    assert bootstrap_ratio_upper(changed, base, 3) == bootstrap_ratio_upper(changed, base, 3)
    assert bootstrap_ratio_upper(changed, base, 3) != bootstrap_ratio_upper(changed, base, 4)


def test_bootstrap_in_blocks_uses_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    base = rng.gamma(2.0, 0.3, 1050)
    changed = base.copy()
    changed[1000:] *= 3.0  # the last rows, which do not fill all blocks
    monkeypatch.setattr(objective, "BOOTSTRAP_BLOCKS", 100)
    estimate = changed.mean() / base.mean() - 1
    assert estimate < bootstrap_ratio_upper(changed, base) < 1.6 * estimate


def skewed_losses(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Paired log losses of a model and a noisier one: heavy tails, correlated."""
    labels, changed, reference = sample_task(rows, seed, 0.3)
    return row_losses(labels[:, 0], changed[:, 0]), row_losses(labels[:, 0], reference[:, 0])


def bound_by_rows(changed: np.ndarray, base: np.ndarray, confidence: float) -> float:
    """The bound by resampling single rows with replacement."""
    rng = np.random.default_rng(99)
    index = rng.integers(0, len(base), (2000, len(base)))
    return float(np.quantile(changed[index].mean(1) / base[index].mean(1) - 1, confidence))


def test_bootstrap_in_blocks_has_the_law_of_single_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And both that of a normal: the width over the estimate is the same within a twelfth, averaged over samples."""
    monkeypatch.setattr(objective, "BOOTSTRAP_BLOCKS", 500)
    blocks, rows, normal = [], [], []
    for seed in range(4):
        changed, base = skewed_losses(4000, seed)
        ratio = changed.mean() / base.mean()
        error = (changed - ratio * base).std() / (base.mean() * np.sqrt(len(base)))
        blocks.append(bootstrap_ratio_upper(changed, base, seed) - ratio + 1)
        rows.append(bound_by_rows(changed, base, CONFIDENCE) - ratio + 1)
        normal.append(NormalDist().inv_cdf(CONFIDENCE) * error)
    assert np.mean(blocks) == pytest.approx(np.mean(rows), rel=1 / 12)
    assert np.mean(blocks) == pytest.approx(np.mean(normal), rel=1 / 12)


def test_delta_ne_error_is_the_spread_of_the_bootstrap() -> None:
    labels, changed, reference = sample_task(3000, 3, 0.4)
    estimate, error = delta_ne(labels, changed, reference)
    new, old = (row_losses(labels[:, 0], x[:, 0]) for x in (changed, reference))
    index = np.random.default_rng(0).integers(0, 3000, (2000, 3000))
    assert estimate == pytest.approx(new.mean() / old.mean() - 1)
    assert error == pytest.approx((new[index].mean(1) / old[index].mean(1)).std(), rel=0.06)
    assert delta_ne(labels, reference, reference) == (0.0, 0.0)


def test_delta_ne_is_the_worst_tasks() -> None:
    tasks = [sample_task(800, seed, noise) for seed, noise in ((0, 0.1), (1, 0.8))]
    labels, changed, reference = (np.concatenate([t[i] for t in tasks], axis=1) for i in range(3))
    assert delta_ne(labels, changed, reference) == max(delta_ne(*t) for t in tasks) == delta_ne(*tasks[1])


def test_quality_by_task_is_each_alone_and_the_worst_has_the_highest_bound() -> None:
    tasks = [sample_task(800, seed, noise) for seed, noise in ((0, 0.1), (1, 0.8), (2, 0.2))]
    labels, changed, reference = (np.concatenate([t[i] for t in tasks], axis=1) for i in range(3))
    found = by_task(labels, changed, reference, 5)
    assert found == [by_task(*t, 5)[0] for t in tasks]
    assert worst(found) == found[1]


# -- what is ranked first ----------------------------------------------------------------------------------------------


def column(*values: float) -> np.ndarray:
    return np.array(values)[:, None]


def test_overlap_counts_who_is_among_the_best_of_each_slate() -> None:
    """Two slates of four, two best of each: {1, 3} against {3, 0}, {0, 1} against {1, 0}; one row is left over."""
    reference = column(0.1, 0.9, 0.2, 0.8, 5.0, 4.0, 1.0, 0.0, 99.0)
    logits = column(0.7, 0.1, 0.2, 0.8, 4.0, 5.0, 1.0, 0.0, -99.0)
    assert top_overlap(logits, reference, k=2, slate=4) == 0.75
    assert top_overlap(reference, reference, k=2, slate=4) == 1.0
    assert top_overlap(-reference[:8], reference[:8], k=2, slate=4) == 0.0


def test_overlap_takes_the_worst_task_and_the_earlier_of_ties() -> None:
    reference = np.array([[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]])
    logits = np.array([[3.0, 0.0], [2.0, 2.0], [1.0, 3.0]])
    assert top_overlap(logits, reference, k=1, slate=3) == 0.0
    assert top_overlap(logits[:, :1], reference[:, :1], k=1, slate=3) == 1.0
    assert top_overlap(column(1.0, 1.0, 1.0), column(3.0, 2.0, 2.0), k=2, slate=3) == 1.0


def test_overlap_of_few_rows_is_one_slate() -> None:
    assert top_overlap(column(3.0, 2.0, 1.0), column(3.0, 1.0, 2.0), k=2, slate=100) == 0.5
    assert top_overlap(column(3.0, 2.0), column(1.0, 2.0)) == 1.0  # all of them are among the best ten


def test_compare_of_equal_scores_is_no_loss() -> None:
    labels, _, reference = sample_task(500, 0, 0.0)
    quality = compare(labels, reference, reference)
    assert quality.delta_ne == 0.0
    assert quality.delta_auc == 0.0
    assert quality.delta_ne_upper == pytest.approx(0.0, abs=1e-6)


def test_compare_is_the_ratio_of_mean_losses() -> None:
    labels, changed, reference = sample_task(2000, 1, 0.5)
    quality = compare(labels, changed, reference)
    y = labels[:, 0]
    ratio = row_losses(y, changed[:, 0]).mean() / row_losses(y, reference[:, 0]).mean() - 1
    assert quality.delta_ne == pytest.approx(ratio, rel=1e-12)
    assert quality.delta_auc == pytest.approx(auc(y, changed[:, 0]) - auc(y, reference[:, 0]), rel=1e-12)
    assert quality.delta_ne_upper > quality.delta_ne > 0 > quality.delta_auc


@pytest.mark.parametrize("noisiest", [0, 1, 2])
def test_compare_takes_the_worst_task(noisiest: int) -> None:
    tasks = [sample_task(800, seed, 0.8 if seed == noisiest else 0.2) for seed in range(3)]
    labels, changed, reference = (np.concatenate([t[i] for t in tasks], axis=1) for i in range(3))
    alone = [compare(*t) for t in tasks]
    assert compare(labels, changed, reference) == alone[noisiest]
    assert alone[noisiest].delta_ne_upper == max(q.delta_ne_upper for q in alone)


@pytest.mark.parametrize(
    ("delta", "upper", "budget", "expected"),
    [
        (0.0005, 0.0015, 0.001, 4000),  # twice the width that fits: four times the rows
        (0.0, 0.003, 0.001, 9000),
        (0.0, 0.0005, 0.001, 250),
        (0.001, 0.002, 0.001, 0),
        (0.002, 0.003, 0.001, 0),
    ],
)
def test_rows_to_resolve_follow_the_square_of_the_width(
    delta: float, upper: float, budget: float, expected: int
) -> None:
    assert rows_to_resolve(Quality(delta, upper, 0.0, 0.0), 1000, budget) == pytest.approx(expected, abs=1)


def test_midranks_share_the_places_of_ties() -> None:
    assert midranks(np.array([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4.0, 1.0, 4.0, 2.0, 4.0]


def test_placements_are_those_of_all_pairs_and_average_to_the_auc() -> None:
    rng = np.random.default_rng(3)
    labels, scores = (rng.random(300) < 0.3).astype(np.float32), np.round(rng.normal(size=300), 1)
    above, below = placements(labels, scores)
    pairs = np.sign(scores[labels == 1][:, None] - scores[labels == 0][None]) / 2 + 0.5
    np.testing.assert_allclose(above, pairs.mean(1), atol=1e-12)
    np.testing.assert_allclose(below, pairs.mean(0), atol=1e-12)
    assert above.mean() == pytest.approx(auc(labels, scores)) == pytest.approx(below.mean())


def test_delta_auc_error_is_the_spread_over_samples() -> None:
    """DeLong's standard error against the standard deviation of delta AUC over fresh samples of the same law."""
    deltas, errors = [], []
    for seed in range(150):
        labels, noisy, reference = (x[:, 0] for x in sample_task(1500, 500 + seed, 0.5))
        deltas.append(auc(labels, noisy) - auc(labels, reference))
        errors.append(delta_auc_error(labels, noisy, reference))
    assert np.mean(errors) == pytest.approx(np.std(deltas), rel=0.15)


def test_delta_auc_error_pairs_rows() -> None:
    """A model that ranks alike has no spread, whatever the AUC's own is; two models without relation have more."""
    labels, noisy, reference = (x[:, 0] for x in sample_task(800, 0, 0.5))
    assert delta_auc_error(labels, 3 * reference - 1, reference) == pytest.approx(0.0, abs=1e-12)
    assert delta_auc_error(labels, noisy, reference) < delta_auc_error(labels, noisy[::-1], reference)


def test_compare_bounds_delta_auc_from_below() -> None:
    labels, noisy, reference = sample_task(2000, 1, 0.5)
    found = compare(labels, noisy, reference)
    error = delta_auc_error(labels[:, 0], noisy[:, 0], reference[:, 0])
    assert found.delta_auc_lower == pytest.approx(found.delta_auc - 1.645 * error, rel=1e-3)
    assert found.delta_auc_lower < found.delta_auc < 0
