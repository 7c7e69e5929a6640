"""Rank the same requests with two versions, in the background, before the new one may answer users.

Legend: K candidates, T tasks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from serve.agreement import Agreement
from serve.errors import RequestError
from serve.ranker import Ranker
from serve.request import RankRequest, ScoreRequest
from trainer.metrics import sigmoid

TOP = 10  # of a request for scores, which names no k
PAUSE_S = 0.002  # between two requests: those of users go first


def compare(old: Ranker, new: Ranker, requests: Sequence[ScoreRequest]) -> Agreement:
    """Rank recent requests with both versions; the golden rows of the old one where no request tells anything."""
    overlaps: list[float] = []
    sums = np.zeros((2, len(old.artifact.model.tasks)))
    unreadable = 0
    for request in requests:
        time.sleep(PAUSE_S)
        before = probabilities(old, request)
        if before is None:
            continue
        after = probabilities(new, request)
        if after is None:
            unreadable += 1
            overlaps.append(0.0)
            continue
        if len(before) > 1:
            k = request.k if isinstance(request, RankRequest) else TOP
            overlaps.append(top_overlap(old.values(before), new.values(after), k))
        sums += before.sum(axis=0), matched(after, new, old).sum(axis=0)
    if not overlaps:
        return compare_golden(old, new)
    return Agreement(
        source="requests",
        requests=len(overlaps),
        unreadable=unreadable,
        overlap=float(np.mean(overlaps)),
        calibration=ratios(old.artifact.model.tasks, sums),
    )


def compare_golden(old: Ranker, new: Ranker) -> Agreement:
    """Score the raw rows that the old version carries with both, as if they were one request for the better half."""
    rows = old.artifact.golden.drop_columns(["_expected"])
    scores = []
    for ranker in (old, new):
        model = ranker.artifact.model
        scores.append(sigmoid(model.score_encoded(model.transform.encode(rows))))
    before, after = scores
    sums = np.stack([before.sum(axis=0), matched(after, new, old).sum(axis=0)])
    return Agreement(
        source="golden rows",
        requests=len(rows),
        unreadable=0,
        overlap=top_overlap(old.values(before), new.values(after), len(rows)),
        calibration=ratios(old.artifact.model.tasks, sums),
    )


def probabilities(ranker: Ranker, request: ScoreRequest) -> np.ndarray | None:
    """Probabilities (K, T) of a request's candidates in their order; None when this version cannot read it."""
    try:
        return ranker.probabilities(request)
    except RequestError:
        return None


def matched(scores_KT: np.ndarray, new: Ranker, old: Ranker) -> np.ndarray:
    """The new version's scores in the order of the old one's tasks; NaN for a task that it lacks."""
    names = new.artifact.model.tasks
    missing = np.full(len(scores_KT), np.nan)
    return np.stack([scores_KT[:, names.index(t)] if t in names else missing for t in old.artifact.model.tasks], axis=1)


def top_overlap(old_K: np.ndarray, new_K: np.ndarray, k: int) -> float:
    """Share of the old top k that is in the new one; of at most half the candidates, as all of them always agree."""
    k = max(1, min(k, len(old_K) // 2))
    if np.isnan(new_K).any():
        return 0.0
    first, second = (set(np.argsort(-scores, kind="stable")[:k].tolist()) for scores in (old_K, new_K))
    return len(first & second) / k


def ratios(tasks: Sequence[str], sums_2T: np.ndarray) -> dict[str, float | None]:
    """Mean new score over mean old score of each task; None where there is none."""
    old, new = sums_2T
    return {
        task: float(n / o) if np.isfinite(n) and o > 0 else None for task, o, n in zip(tasks, old, new, strict=True)
    }
