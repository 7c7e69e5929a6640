"""Scores given now against scores of the validation split: PSI and the ratio of means, by task.

The ranker keeps the scores of its latest requests; they are counted when a report is made, not while a request waits.
Counts fade with a half-life, so that they tell of the latest minutes. docs/serving.md says how to read PSI.
Legend: K candidates, T tasks, B bins.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compress.score_reference import ScoreReference, count_scores, stored_references
from serve.shelf import Served

HALF_LIFE_S = 600.0
LEAST_SCORES = 1000  # by chance alone PSI is about (B - 1) / scores: .009 for ten bins
FLOOR = 1e-4  # a share that PSI takes in place of a smaller one, whose logarithm would be all there is to see


class ScoreCounter:
    """Counts one version's scores into the bins of its references."""

    def __init__(self, tasks: Sequence[str], references: Mapping[str, ScoreReference]) -> None:
        self.references = {t: references[t] for t in tasks if t in references}
        self._column = {task: index for index, task in enumerate(tasks)}
        self._edges = {t: np.array(r.edges) for t, r in self.references.items()}
        self._counts = {t: np.zeros(len(r.shares)) for t, r in self.references.items()}
        self._sums = dict.fromkeys(self.references, 0.0)
        self._faded_at: float | None = None

    def report(self, recent: deque[np.ndarray], now: float) -> dict[str, Any]:
        """Take the probabilities (K, T) of the latest requests out of `recent`, and give sums by task that merge.

        now: seconds on any clock that goes on steadily. Scores that are not finite count for nothing.
        """
        keep = 1.0 if self._faded_at is None else 0.5 ** (max(now - self._faded_at, 0.0) / HALF_LIFE_S)
        self._faded_at = now
        scores = [recent.popleft() for _ in range(len(recent))]  # others only append
        for task in self.references:
            self._counts[task] *= keep
            self._sums[task] *= keep
            if scores:
                column = np.concatenate([s[:, self._column[task]] for s in scores])
                column = column[np.isfinite(column)]
                self._counts[task] += count_scores(column, self._edges[task])
                self._sums[task] += float(column.sum())
        return {t: {"counts": self._counts[t].tolist(), "sum": self._sums[t]} for t in self.references}

    def expected(self) -> dict[str, dict[str, Any]]:
        """What the counts are compared with, by task: the same in every replica."""
        return {t: {"shares": list(r.shares), "mean": r.mean} for t, r in self.references.items()}


class Drift:
    """Counters of all versions that a replica holds."""

    def __init__(self) -> None:
        self._counters: dict[str, ScoreCounter] = {}

    def report(self, loaded: Mapping[str, Served], now: float) -> dict[str, Any]:
        """`scores`, sums by version and task, which merge, and `expected`, what they are compared with."""
        for version, served in loaded.items():
            if version not in self._counters:
                artifact = served.ranker.artifact
                self._counters[version] = ScoreCounter(artifact.model.tasks, stored_references(artifact.manifest))
        self._counters = {version: self._counters[version] for version in loaded}
        scores = {v: counter.report(loaded[v].ranker.recent, now) for v, counter in self._counters.items()}
        return {"scores": scores, "expected": {v: counter.expected() for v, counter in self._counters.items()}}


def psi(expected_B: Sequence[float], counts_B: Sequence[float]) -> float | None:
    """Population stability index: sum over bins of (live - expected) * ln(live / expected) of their shares.

    None below LEAST_SCORES counts, which say nothing yet.
    """
    total = sum(counts_B)
    if total < LEAST_SCORES:
        return None
    shares = [(max(c / total, FLOOR), max(e, FLOOR)) for c, e in zip(counts_B, expected_B, strict=True)]
    return sum((live - expected) * math.log(live / expected) for live, expected in shares)


def mean_ratio(expected_mean: float, counts_B: Sequence[float], total_score: float) -> float | None:
    """Live mean score / the validation split's; None below LEAST_SCORES counts, or where that mean is 0."""
    total = sum(counts_B)
    return None if total < LEAST_SCORES or expected_mean <= 0 else total_score / total / expected_mean
