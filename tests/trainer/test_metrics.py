"""trainer/metrics.py against scikit-learn and the formulas written out."""

from __future__ import annotations

import json
import math
import time
import warnings

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.metrics import accuracy_score, f1_score, log_loss, ndcg_score, precision_score, recall_score, roc_auc_score

from trainer.config import MetricsConfig
from trainer.metrics import (
    auc,
    calibration,
    grouped_auc,
    grouped_ndcg,
    grouped_recall,
    mean_ne,
    normalized_entropy,
    ranking_metrics,
    row_losses,
    sigmoid,
    task_metrics,
    threshold_metrics,
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


# -- within groups, against slow twins ---------------------------------------------------------------------------------


def some_groups(
    seed: int, rows: int = 600, groups: int = 60, decimals: int | None = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, logits and group ids; with no decimals nearly every group holds ties."""
    labels, logits = some_rows(seed, rows, decimals)
    return labels, logits, np.uint64(2**63) + np.random.default_rng(seed).integers(0, groups, rows, dtype=np.uint64)


def expected_hits(labels: np.ndarray, scores: np.ndarray, k: int, orders: int, seed: int = 0) -> np.ndarray:
    """Slow twin of ties: positives in the first k places (orders,) over random orders of the rows."""
    rng = np.random.default_rng(seed)
    hits = []
    for _ in range(orders):
        shuffle = rng.permutation(len(labels))
        top = shuffle[np.argsort(-scores[shuffle], kind="stable")][:k]
        hits.append(labels[top].sum())
    return np.asarray(hits)


@pytest.mark.parametrize("k", [1, 3, 10, 1000])
@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_grouped_ndcg_is_the_mean_of_sklearns(k: int, decimals: int | None) -> None:
    labels, scores, groups = some_groups(5, decimals=decimals)
    values = []
    for group in np.unique(groups):
        mine = groups == group
        if labels[mine].any() and mine.sum() > 1:
            values.append(ndcg_score(labels[None, mine], scores[None, mine], k=k))
    assert len(values) > 50
    assert grouped_ndcg(labels, scores, groups, k) == pytest.approx(np.mean(values), abs=1e-12)


def test_grouped_recall_without_ties_is_the_share_of_positives_in_the_first_k() -> None:
    labels, scores, groups = some_groups(6, decimals=None)
    values = []
    for group in np.unique(groups):
        mine = groups == group
        if labels[mine].any():
            values.append(float(labels[mine][np.argsort(-scores[mine])[:4]].sum()) / float(labels[mine].sum()))
    assert grouped_recall(labels, scores, groups, 4) == pytest.approx(np.mean(values), abs=1e-12)


def test_recall_of_ties_is_their_expectation() -> None:
    labels, scores = np.array([1.0, 0, 1, 0, 0, 1, 0]), np.array([2.0, 1, 1, 1, 1, 0, 0])
    hits = expected_hits(labels, scores, 3, orders=20_000)
    found = grouped_recall(labels, scores, np.zeros(7, dtype=np.uint64), 3)
    assert found == pytest.approx((1 + 2 / 4) / 3)
    assert found == pytest.approx(hits.mean() / 3, abs=0.01)


@pytest.mark.parametrize("first", [True, False])
def test_constant_scores_rank_like_chance_wherever_the_positives_stand(first: bool) -> None:
    labels = np.array([1.0] * 2 + [0.0] * 8)[:: 1 if first else -1]
    scores, groups = np.zeros(10), np.zeros(10, dtype=np.uint64)
    assert grouped_ndcg(labels, scores, groups, 1) == pytest.approx(0.2)
    assert grouped_recall(labels, scores, groups, 5) == pytest.approx(0.5)
    assert grouped_auc(labels, scores, groups) == 0.5


def test_ndcg_and_recall_leave_out_groups_without_a_positive() -> None:
    labels, scores, groups = np.array([1.0, 0, 0, 0]), np.array([0.1, 0.9, 0.5, 0.4]), np.array([1, 1, 2, 2])
    assert grouped_ndcg(labels, scores, groups, 2) == pytest.approx(1 / math.log2(3))
    assert grouped_recall(labels, scores, groups, 1) == 0.0
    assert math.isnan(grouped_ndcg(labels[2:], scores[2:], groups[2:], 2))
    assert math.isnan(grouped_recall(labels[2:], scores[2:], groups[2:], 2))


@pytest.mark.parametrize("seed", range(5))
def test_no_metric_depends_on_the_order_of_the_rows(seed: int) -> None:
    labels, logits, groups = some_groups(7, rows=5000, decimals=2)
    logits = logits.astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(labels))
    config = MetricsConfig(k=(1, 5))
    assert ranking_metrics(labels[order], logits[order], groups[order], config) == ranking_metrics(
        labels, logits, groups, config
    )


def test_a_million_rows_in_many_groups_take_seconds() -> None:
    labels, logits, groups = some_groups(8, rows=1_000_000, groups=100_000, decimals=None)
    started = time.perf_counter()
    ranking_metrics(labels, logits, groups)
    assert time.perf_counter() - started < 8  # .8 s on an idle core


# -- at a threshold ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_threshold_metrics_equal_sklearn(threshold: float) -> None:
    labels, logits = some_rows(9)
    yes = 1 / (1 + np.exp(-logits)) >= threshold
    told = threshold_metrics(labels, logits, threshold)
    assert told == {
        "precision": pytest.approx(precision_score(labels, yes)),
        "recall": pytest.approx(recall_score(labels, yes)),
        "f1": pytest.approx(f1_score(labels, yes)),
        "accuracy": pytest.approx(accuracy_score(labels, yes)),
    }


def test_a_probability_at_the_threshold_is_a_yes() -> None:
    assert threshold_metrics(np.array([1.0]), np.array([0.0]), 0.5)["recall"] == 1.0


def test_what_a_threshold_leaves_undefined_is_nan() -> None:
    told = threshold_metrics(np.array([0.0, 0.0]), np.array([-1.0, -2.0]), 0.5)
    assert told["accuracy"] == 1.0
    assert all(math.isnan(told[name]) for name in ("precision", "recall", "f1"))


# -- together ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "logits"),
    [([], []), ([1.0, 1.0], [0.5, 1.0]), ([0.0, 0.0], [0.5, 1.0]), ([0.0, 1.0], [float("nan"), 1.0])],
    ids=["no rows", "positives", "negatives", "nan"],
)
def test_undefined_metrics_are_null_in_json_and_warn_of_nothing(labels: list[float], logits: list[float]) -> None:
    groups = np.zeros(len(labels), dtype=np.uint64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = task_metrics(np.array(labels)[:, None], np.array(logits)[:, None], ["click"], groups)
    assert told["auc"] is None
    assert told["ne"] is None
    assert told["gauc"] is None
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert mean_ne(told) == math.inf


def test_grouped_metrics_are_there_only_with_groups() -> None:
    labels, logits, groups = some_groups(10)
    alone = {"auc", "ne", "log_loss", "calibration", "precision", "recall", "f1", "accuracy"}
    assert set(ranking_metrics(labels, logits)) == alone
    told = ranking_metrics(labels, logits, groups, MetricsConfig(k=(2, 5)))
    assert set(told) == alone | {"gauc", "ndcg@2", "recall@2", "ndcg@5", "recall@5"}
    assert told["gauc"] == grouped_auc(labels, logits, groups)
    assert told["ndcg@5"] == grouped_ndcg(labels, logits, groups, 5)
    assert told["recall@2"] == grouped_recall(labels, logits, groups, 2)


@pytest.mark.parametrize("values", [{"k": [0]}, {"k": [-1]}, {"threshold": 0}, {"threshold": 1.0}, {"at": 3}])
def test_metrics_config_refuses(values: dict) -> None:
    with pytest.raises(ValidationError):
        MetricsConfig.model_validate(values)


def test_task_metrics_are_flat_for_one_task_and_named_for_several():
    labels, logits = some_rows(4)
    one = task_metrics(labels[:, None], logits[:, None], ["click"])
    both = task_metrics(np.stack([labels, 1 - labels], axis=1), np.stack([logits, logits], axis=1), ["click", "skip"])
    assert one == ranking_metrics(labels, logits)
    assert both["click"] == one
    assert both["skip"]["auc"] == pytest.approx(1 - one["auc"])
    assert mean_ne(one) == one["ne"]
    assert mean_ne(both) == pytest.approx((both["click"]["ne"] + both["skip"]["ne"]) / 2)
