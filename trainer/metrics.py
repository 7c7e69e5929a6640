"""Ranking quality: pure functions of labels and scores, in float64.

Nothing here depends on the order of the rows, to the last bit: counts are integers, and sums of floats are taken over
sorted values. So ranks may hand in their rows in any order (trainer/evaluation.py). Rows of equal score share their
places: each counts as its expectation over the orders of the tie, so a constant score ranks like chance.

Legend: N rows, T tasks, G groups, R runs (the rows of one group that share one score). Labels are 0 or 1, logits are
log-odds. A metric that is not defined on the rows (one class is absent, a score is NaN) is NaN from its function and
None from `ranking_metrics` and `task_metrics`, which go into JSON.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.config import MetricsConfig

DEFAULTS = MetricsConfig()


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of log-odds, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))


def row_losses(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Log loss of each row (N,), in nats, computed from log-odds."""
    z = logits.astype(np.float64)
    return np.logaddexp(0.0, z) - labels * z


def ordered_mean(values: np.ndarray) -> float:
    """The mean of (N,) floats, the same to the last bit in whatever order they come; NaN of none."""
    return float(np.sort(values).sum() / len(values)) if len(values) else math.nan


def base_rate(labels: np.ndarray) -> float:
    """Share of positives; NaN of no rows."""
    return int(np.count_nonzero(labels > 0.5)) / len(labels) if len(labels) else math.nan


def entropy(rate: float) -> float:
    """Entropy in nats of a Bernoulli variable: the log loss of always answering the base rate."""
    return float(-(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def log_loss(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean log loss in nats."""
    with np.errstate(invalid="ignore"):  # a diverged model's logits
        return ordered_mean(row_losses(labels, logits))


def normalized_entropy(labels: np.ndarray, logits: np.ndarray) -> float:
    """NE: log loss over the entropy of the base rate; below 1 is better than the base rate. NaN without both classes.

    Source: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, 2014.
    """
    rate = base_rate(labels)
    return log_loss(labels, logits) / entropy(rate) if 0 < rate < 1 else math.nan


def calibration(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean predicted rate over the observed rate; 1 is calibrated. NaN without positives."""
    rate = base_rate(labels)
    return ordered_mean(sigmoid(logits)) / rate if rate > 0 else math.nan


# -- ranking ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """Rows as ranking metrics need them: groups in order of their id, in each the runs of equal score, best first."""

    first: np.ndarray  # (R,) rank, from 0, of the run's first row within its group
    rows: np.ndarray  # (R,)
    positives: np.ndarray  # (R,)
    group: np.ndarray  # (R,) index of the run's group
    group_at: np.ndarray  # (G,) index of each group's first run
    group_rows: np.ndarray  # (G,)
    group_positives: np.ndarray  # (G,)


def score_runs(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray | None = None) -> Runs | None:
    """Sort rows by group and falling score, and count; None when there are no rows or a score is NaN.

    Shapes: all (N,); without `groups` all rows make one group.
    """
    if len(labels) == 0 or np.isnan(scores).any():
        return None
    order = np.argsort(-scores) if groups is None else np.lexsort((-scores, groups))
    scores, positive = scores[order], (labels > 0.5)[order]
    starts = np.ones(len(scores), dtype=bool)  # of groups
    starts[1:] = False if groups is None else np.diff(groups[order]) != 0
    begins = starts.copy()  # of runs
    begins[1:] |= scores[1:] != scores[:-1]
    run_at, first_row = np.flatnonzero(begins), np.flatnonzero(starts)
    group = np.cumsum(starts)[run_at] - 1
    positives = np.add.reduceat(positive, run_at, dtype=np.int64)
    group_at = np.flatnonzero(starts[run_at])
    return Runs(
        first=run_at - first_row[group],
        rows=np.diff(run_at, append=len(scores)),
        positives=positives,
        group=group,
        group_at=group_at,
        group_rows=np.diff(first_row, append=len(scores)),
        group_positives=np.add.reduceat(positives, group_at),
    )


def group_aucs(runs: Runs) -> np.ndarray:
    """AUC (G,) of each group; tied scores count half. NaN where one class is absent."""
    negatives = runs.rows - runs.positives
    group_negatives = runs.group_rows - runs.group_positives
    through = np.cumsum(negatives)
    before = (through - negatives)[runs.group_at]  # negatives of all groups before
    below = (before + group_negatives)[runs.group] - through  # negatives of the group that score less than the run
    twice = np.add.reduceat(runs.positives * (2 * below + negatives), runs.group_at)  # int64 holds N to 2e9
    pairs = runs.group_positives * group_negatives
    return np.divide(twice, 2.0 * pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def mean_auc(runs: Runs) -> float:
    """The AUC of each group that holds both classes, weighted by the group's rows. NaN when none does."""
    values = group_aucs(runs)
    defined = ~np.isnan(values)
    weights = runs.group_rows[defined]
    return float((values[defined] * weights).sum() / weights.sum()) if len(weights) else math.nan


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve; tied scores count half. NaN when one class is absent."""
    runs = score_runs(labels, scores)
    return math.nan if runs is None else float(group_aucs(runs)[0])


def grouped_auc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> float:
    """GAUC: AUC within each group that holds both classes, weighted by the group's rows. NaN when none does."""
    runs = score_runs(labels, scores, groups)
    return math.nan if runs is None else mean_auc(runs)


def mean_ndcg(runs: Runs, k: int) -> float:
    """NDCG@k: mean over groups with a positive of DCG@k over the best DCG@k the group allows. NaN when none has one.

    Gain 1 for a positive, discount 1 / log2(rank + 1); a tie's rows share the mean discount of its places, as in
    scikit-learn's ndcg_score. Source: Jarvelin and Kekalainen, 2002; ties: McSherry and Najork, 2008.
    """
    discounts = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))])  # (k + 1,) sum of the first
    shared = discounts[np.minimum(runs.first + runs.rows, k)] - discounts[np.minimum(runs.first, k)]
    gained = np.add.reduceat(runs.positives * shared / runs.rows, runs.group_at)
    has = runs.group_positives > 0
    return ordered_mean(gained[has] / discounts[np.minimum(runs.group_positives[has], k)])


def mean_recall(runs: Runs, k: int) -> float:
    """Recall@k: mean over groups with a positive of the share of its positives in the first k. NaN when none has one.

    A tie across the border counts as its expectation. Groups of k rows or fewer have recall 1.
    """
    places = np.minimum(runs.first + runs.rows, k) - np.minimum(runs.first, k)
    found = np.add.reduceat(runs.positives * places / runs.rows, runs.group_at)
    has = runs.group_positives > 0
    return ordered_mean(found[has] / runs.group_positives[has])


def grouped_ndcg(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, k: int) -> float:
    """`mean_ndcg` of labels, scores and groups, all (N,)."""
    runs = score_runs(labels, scores, groups)
    return math.nan if runs is None else mean_ndcg(runs, k)


def grouped_recall(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, k: int) -> float:
    """`mean_recall` of labels, scores and groups, all (N,)."""
    runs = score_runs(labels, scores, groups)
    return math.nan if runs is None else mean_recall(runs, k)


# -- decisions at a threshold ----------------------------------------------------------------------------------------


def threshold_metrics(labels: np.ndarray, logits: np.ndarray, threshold: float) -> dict[str, float]:
    """Precision, recall, F1 and accuracy of answering yes where the probability is `threshold` or more.

    NaN where there is nothing to divide by: precision without a yes, recall without a positive, F1 without either.
    """
    if len(labels) == 0 or np.isnan(logits).any():
        return dict.fromkeys(("precision", "recall", "f1", "accuracy"), math.nan)
    positive, yes = labels > 0.5, sigmoid(logits) >= threshold
    hits, positives, answers = (int(np.count_nonzero(x)) for x in (positive & yes, positive, yes))
    return {
        "precision": hits / answers if answers else math.nan,
        "recall": hits / positives if positives else math.nan,
        "f1": 2 * hits / (answers + positives) if answers + positives else math.nan,
        "accuracy": (len(labels) - answers - positives + 2 * hits) / len(labels),
    }


# -- all of them -----------------------------------------------------------------------------------------------------


def ranking_metrics(
    labels: np.ndarray, logits: np.ndarray, groups: np.ndarray | None = None, config: MetricsConfig = DEFAULTS
) -> dict[str, float | None]:
    """All metrics of one task by name; those within groups (gauc, ndcg@k, recall@k) only where there are groups.

    Shapes: labels, logits and groups (N,). What is not defined or not finite is None.
    """
    values = {
        "auc": auc(labels, logits),
        "ne": normalized_entropy(labels, logits),
        "log_loss": log_loss(labels, logits),
        "calibration": calibration(labels, logits),
        **threshold_metrics(labels, logits, config.threshold),
    }
    if groups is not None:
        runs = score_runs(labels, logits, groups)
        values["gauc"] = math.nan if runs is None else mean_auc(runs)
        for k in config.k:
            values[f"ndcg@{k}"] = math.nan if runs is None else mean_ndcg(runs, k)
            values[f"recall@{k}"] = math.nan if runs is None else mean_recall(runs, k)
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def task_metrics(
    labels: np.ndarray,
    logits: np.ndarray,
    tasks: Sequence[str],
    groups: np.ndarray | None = None,
    config: MetricsConfig = DEFAULTS,
) -> dict[str, Any]:
    """Metrics of (N, T) labels and logits, with groups (N,): flat for one task, by task name for several."""
    by_task = {name: ranking_metrics(labels[:, t], logits[:, t], groups, config) for t, name in enumerate(tasks)}
    return by_task[tasks[0]] if len(tasks) == 1 else by_task


def mean_ne(metrics: dict[str, Any]) -> float:
    """The NE that early stopping watches: of the task, or the mean over tasks; infinite where one is not defined."""
    values = [metrics["ne"]] if "ne" in metrics else [m["ne"] for m in metrics.values()]
    return math.inf if None in values else float(np.mean(values))
