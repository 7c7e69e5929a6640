"""trainer/metrics.py against scikit-learn and the formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from trainer.metrics import (
    auc,
    calibration,
    grouped_auc,
    mean_ne,
    normalized_entropy,
    ranking_metrics,
    row_losses,
    sigmoid,
    task_metrics,
)


def some_rows(seed: int, rows: int = 400, decimals: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Labels and logits that agree somewhat; few decimals make many ties."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=rows)
    labels = (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    return labels, logits if decimals is None else np.round(logits, decimals)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_auc_equals_sklearn(seed, decimals):
    labels, scores = some_rows(seed, decimals=decimals)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auc_of_equal_scores_is_half():
    assert auc(np.array([0.0, 1.0, 1.0]), np.ones(3)) == 0.5


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_auc_of_one_class_is_nan(label):
    assert np.isnan(auc(np.full(4, label), np.arange(4.0)))


def test_log_loss_equals_sklearn():
    labels, logits = some_rows(0)
    assert row_losses(labels, logits).mean() == pytest.approx(log_loss(labels, 1 / (1 + np.exp(-logits))), rel=1e-12)


def test_normalized_entropy_is_log_loss_over_entropy_of_the_rate():
    labels, logits = some_rows(1)
    rate = labels.astype(np.float64).mean()
    base = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    expected = log_loss(labels, 1 / (1 + np.exp(-logits))) / base
    assert normalized_entropy(labels, logits) == pytest.approx(expected, rel=1e-6)


def test_normalized_entropy_of_the_base_rate_is_one():
    labels = np.array([1.0, 0.0, 0.0, 0.0])
    assert normalized_entropy(labels, np.full(4, np.log(1 / 3))) == pytest.approx(1.0, rel=1e-12)


def test_calibration_is_predicted_over_observed():
    labels, logits = some_rows(2)
    assert calibration(labels, logits) == pytest.approx((1 / (1 + np.exp(-logits))).mean() / labels.mean(), rel=1e-6)


def test_extreme_logits_do_not_overflow():
    labels, logits = np.array([1.0, 0.0, 0.0, 1.0]), np.array([1e4, -1e4, 1e4, -1e4])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        np.testing.assert_allclose(row_losses(labels, logits), [0, 0, 1e4, 1e4])
        np.testing.assert_array_equal(sigmoid(logits), [1, 0, 1, 0])
        assert all(np.isfinite(v) for v in ranking_metrics(labels, logits).values())


def test_grouped_auc_weighs_groups_by_their_rows():
    labels, scores = some_rows(3, rows=300, decimals=1)
    groups = np.random.default_rng(0).integers(0, 30, 300).astype(np.uint64)
    total = weight = 0.0
    for group in np.unique(groups):
        mine = groups == group
        if 0 < labels[mine].sum() < mine.sum():
            total += roc_auc_score(labels[mine], scores[mine]) * mine.sum()
            weight += mine.sum()
    assert grouped_auc(labels, scores, groups) == pytest.approx(total / weight, abs=1e-12)


def test_grouped_auc_leaves_out_groups_of_one_class():
    labels, scores = np.array([1.0, 0.0, 1.0, 1.0]), np.array([0.9, 0.1, 0.0, 0.5])
    assert grouped_auc(labels, scores, np.array([1, 1, 2, 2])) == 1.0
    assert np.isnan(grouped_auc(labels[2:], scores[2:], np.array([2, 2])))


def test_task_metrics_are_flat_for_one_task_and_named_for_several():
    labels, logits = some_rows(4)
    one = task_metrics(labels[:, None], logits[:, None], ["click"])
    both = task_metrics(np.stack([labels, 1 - labels], axis=1), np.stack([logits, logits], axis=1), ["click", "skip"])
    assert one == ranking_metrics(labels, logits)
    assert both["click"] == one
    assert both["skip"]["auc"] == pytest.approx(1 - one["auc"])
    assert mean_ne(one) == one["ne"]
    assert mean_ne(both) == pytest.approx((both["click"]["ne"] + both["skip"]["ne"]) / 2)
