"""Ranking quality: pure functions of labels and scores, in float64.

Legend: N rows. Labels are 0 or 1, logits are log-odds.
"""

from __future__ import annotations

import numpy as np


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of log-odds, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))


def row_losses(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Log loss of each row (N,), in nats, computed from log-odds."""
    z = logits.astype(np.float64)
    return np.logaddexp(0.0, z) - labels * z


def entropy(rate: float) -> float:
    """Entropy in nats of a Bernoulli variable: the log loss of always answering the base rate."""
    return float(-(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def normalized_entropy(labels: np.ndarray, logits: np.ndarray) -> float:
    """NE: log loss over the entropy of the base rate; below 1 is better than the base rate.

    Source: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, 2014.
    """
    return float(row_losses(labels, logits).mean() / entropy(float(labels.mean())))


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve; tied scores count half. NaN when one class is absent."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2.0
    return float((ranks[inverse][labels > 0.5].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def grouped_auc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> float:
    """GAUC: AUC within each group that holds both classes, weighted by the group's rows. NaN when none does."""
    order = np.argsort(groups, kind="stable")
    edges = np.flatnonzero(np.diff(groups[order])) + 1
    total, weight = 0.0, 0
    for index in np.split(order, edges):
        value = auc(labels[index], scores[index])
        if not np.isnan(value):
            total += value * len(index)
            weight += len(index)
    return total / weight if weight else float("nan")


def calibration(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean predicted rate over the observed rate; 1 is calibrated."""
    return float(sigmoid(logits).mean() / labels.mean())


def ranking_metrics(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """AUC, NE, log loss and calibration of one task."""
    return {
        "auc": auc(labels, logits),
        "ne": normalized_entropy(labels, logits),
        "log_loss": float(row_losses(labels, logits).mean()),
        "calibration": calibration(labels, logits),
    }


def task_metrics(labels: np.ndarray, logits: np.ndarray, tasks: list[str]) -> dict:
    """Metrics of (N, T) labels and logits: flat for one task, by task name for several."""
    if len(tasks) == 1:
        return ranking_metrics(labels[:, 0], logits[:, 0])
    return {name: ranking_metrics(labels[:, t], logits[:, t]) for t, name in enumerate(tasks)}


def mean_ne(metrics: dict) -> float:
    """The NE that early stopping watches: of the task, or the mean over tasks."""
    return metrics["ne"] if "ne" in metrics else float(np.mean([m["ne"] for m in metrics.values()]))
