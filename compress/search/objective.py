"""What a trial is judged by: delta NE and delta AUC with paired bounds, bytes, feasibility, the Pareto front.

Delta NE is relative: NE of the compressed model / NE of the fp32 model - 1, so .001 is a tenth of a percent. The base
rate's entropy cancels, so it is a ratio of mean log losses.

Legend: N rows, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.metrics import auc, row_losses

RESAMPLES = 1_000
CONFIDENCE = 0.95
ONE_SIDED = 1.6449  # standard errors of a normal law below which 95% lie
BOOTSTRAP_BLOCKS = 4_096


@dataclass(frozen=True)
class Quality:
    """Loss of quality against the fp32 model on the same rows; the worst task's where there are several.

    Bounds are one-sided at 95%: of delta NE from above, of delta AUC from below.
    """

    delta_ne: float
    delta_ne_upper: float
    delta_auc: float
    delta_auc_lower: float


def bootstrap_ratio_upper(changed_N: np.ndarray, base_N: np.ndarray, seed: int = 0) -> float:
    """The upper 95% bound (one-sided) of mean(changed) / mean(base) - 1 over paired Poisson resamples.

    Rows are resampled in BOOTSTRAP_BLOCKS blocks of every so-manieth row: as many draws whatever the number of rows,
    and with so many blocks the same law.
    """
    rng = np.random.default_rng(seed)
    blocks = np.arange(len(base_N)) % BOOTSTRAP_BLOCKS
    pairs = np.stack([np.bincount(blocks, values) for values in (changed_N, base_N)], axis=1)
    sums = rng.poisson(1.0, size=(RESAMPLES, len(pairs))) @ pairs
    return float(np.quantile(sums[:, 0] / sums[:, 1] - 1.0, CONFIDENCE))


def delta_ne(labels: np.ndarray, logits: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Delta NE of (N, T) log-odds against the fp32 model's, and its standard error; the worst task's.

    The error of a ratio of paired means, to first order: quick, where a bound is not what is asked for.
    """
    found = []
    for task in range(labels.shape[1]):
        changed, base = (row_losses(labels[:, task], scores[:, task]) for scores in (logits, reference))
        ratio = float(changed.mean() / base.mean())
        error = float((changed - ratio * base).std() / (base.mean() * np.sqrt(len(base))))
        found.append((ratio - 1.0, error))
    return max(found)


def top_overlap(logits: np.ndarray, reference: np.ndarray, k: int = 10, slate: int = 100) -> float:
    """The share of the fp32 model's k best that is among this one's k best, of slates of rows as they come.

    Shapes: (N, T) log-odds; the worst task's. Rows beyond the last whole slate are left out; all rows where there is
    none.
    """
    rows = len(logits) // slate * slate
    if not rows:
        rows = slate = len(logits)
    k = min(k, slate)
    shares = []
    for task in range(logits.shape[1]):
        best = [
            np.argsort(-scores[:rows, task].reshape(-1, slate), axis=1, kind="stable")[:, :k]
            for scores in (logits, reference)
        ]
        shares.append(float((best[0][:, :, None] == best[1][:, None, :]).any(2).mean()))
    return min(shares)


def midranks(values_N: np.ndarray) -> np.ndarray:
    """Ranks (N,) from 1, the mean rank where values tie."""
    _, place_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place_N]


def placements(labels_N: np.ndarray, scores_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive the share of negatives it scores above, for each negative that of positives above it.

    Ties count half; the mean of either is the AUC. Shapes: labels and scores (N,) -> (positives,), (negatives,).
    Source: Sun and Xu, Fast implementation of DeLong's algorithm, 2014 (midranks in place of all pairs).
    """
    positive_N = labels_N > 0.5
    positives, negatives = scores_N[positive_N], scores_N[~positive_N]
    ranks_N = midranks(np.concatenate([positives, negatives]))
    count = len(positives)
    below = (ranks_N[:count] - midranks(positives)) / max(len(negatives), 1)
    above = 1.0 - (ranks_N[count:] - midranks(negatives)) / max(count, 1)
    return below, above


def delta_auc_error(labels_N: np.ndarray, logits_N: np.ndarray, reference_N: np.ndarray) -> float:
    """Standard error of AUC(logits) - AUC(reference) on the same rows (N,); NaN with fewer than two of either class.

    Source: DeLong, DeLong and Clarke-Pearson, 1988: the variance of two correlated AUCs.
    """
    new, old = placements(labels_N, logits_N), placements(labels_N, reference_N)
    changes = [a - b for a, b in zip(new, old, strict=True)]
    if min(len(c) for c in changes) < 2:
        return math.nan
    return float(np.sqrt(sum(c.var(ddof=1) / len(c) for c in changes)))


def by_task(
    labels: np.ndarray,
    logits: np.ndarray,
    reference: np.ndarray,
    seed: int = 0,
) -> list[Quality]:
    """Quality of each task of (N, T) log-odds against the fp32 model's on the same labels (N, T)."""
    found = []
    for task in range(labels.shape[1]):
        y, new, old = labels[:, task], logits[:, task], reference[:, task]
        changed, base = row_losses(y, new), row_losses(y, old)
        change = auc(y, new) - auc(y, old)
        found.append(
            Quality(
                float(changed.mean() / base.mean() - 1.0),
                bootstrap_ratio_upper(changed, base, seed),
                change,
                change - ONE_SIDED * delta_auc_error(y, new, old),
            )
        )
    return found


def worst(qualities: Sequence[Quality]) -> Quality:
    """The one whose bound of delta NE is highest."""
    return max(qualities, key=lambda q: q.delta_ne_upper)


def compare(labels: np.ndarray, logits: np.ndarray, reference: np.ndarray, seed: int = 0) -> Quality:
    """Quality of (N, T) log-odds against the fp32 model's on the same labels (N, T): the worst task's."""
    return worst(by_task(labels, logits, reference, seed))


def rows_to_resolve(quality: Quality, rows: int, budget: float) -> int:
    """About how many rows would bring the bound within the budget, if delta NE stays what it is; 0 when none would."""
    room = budget - quality.delta_ne
    width = quality.delta_ne_upper - quality.delta_ne
    return int(np.ceil(rows * (width / room) ** 2)) if room > 0 else 0
