"""What a trial is judged by: delta NE with a paired-bootstrap bound, bytes, feasibility, the Pareto front.

Delta NE is relative: NE of the compressed model / NE of the fp32 model - 1, so .001 is a tenth of a percent. The base
rate's entropy cancels, so it is a ratio of mean log losses.

Legend: N rows, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.metrics import auc, row_losses

RESAMPLES = 400
CONFIDENCE = 0.95
BOOTSTRAP_CHUNK = 20_000


@dataclass(frozen=True)
class Quality:
    """Loss of quality against the fp32 model on the same rows; the worst task's where there are several."""

    delta_ne: float
    delta_ne_upper: float
    delta_auc: float


def bootstrap_ratio_upper(changed_N: np.ndarray, base_N: np.ndarray, seed: int = 0) -> float:
    """The upper 95% bound (one-sided) of mean(changed) / mean(base) - 1 over paired Poisson resamples of rows."""
    rng = np.random.default_rng(seed)
    sums = np.zeros((2, RESAMPLES))
    for first in range(0, len(base_N), BOOTSTRAP_CHUNK):
        chunk = slice(first, first + BOOTSTRAP_CHUNK)
        weights = rng.poisson(1.0, size=(RESAMPLES, len(base_N[chunk]))).astype(np.float32)
        sums += (weights @ np.stack([changed_N[chunk], base_N[chunk]], axis=1)).T
    return float(np.quantile(sums[0] / sums[1] - 1.0, CONFIDENCE))


def compare(labels: np.ndarray, logits: np.ndarray, reference: np.ndarray, seed: int = 0) -> Quality:
    """Quality of (N, T) log-odds against the fp32 model's on the same labels (N, T)."""
    worst: Quality | None = None
    for task in range(labels.shape[1]):
        y, new, old = labels[:, task], logits[:, task], reference[:, task]
        changed, base = row_losses(y, new), row_losses(y, old)
        quality = Quality(
            float(changed.mean() / base.mean() - 1.0),
            bootstrap_ratio_upper(changed, base, seed),
            auc(y, new) - auc(y, old),
        )
        if worst is None or quality.delta_ne_upper > worst.delta_ne_upper:
            worst = quality
    assert worst is not None, "a ranker has a task"
    return worst


def rows_to_resolve(quality: Quality, rows: int, budget: float) -> int:
    """About how many rows would bring the bound within the budget, if delta NE stays what it is; 0 when none would."""
    room = budget - quality.delta_ne
    width = quality.delta_ne_upper - quality.delta_ne
    return int(np.ceil(rows * (width / room) ** 2)) if room > 0 else 0


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (bytes, loss) that no other one beats in both, by rising bytes."""
    front: list[int] = []
    best = np.inf
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < best:
            front.append(index)
            best = points[index][1]
    return front
