"""Does a new version rank as the one that answers? What both made of the same requests, and whether that will do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from serve.config import SwapConfig
from trainer.data.schema import Config

CHECKS = ("overlap", "calibration")


class Agreement(Config):
    """How two versions compare on `requests` requests, or on the golden rows where there were none.

    `overlap`: mean share of the old top k that is in the new one. `calibration`: mean new score / mean old score, by
    task; None where the new version lacks the task. `unreadable`: requests that only the old one can read.
    """

    source: Literal["requests", "golden rows"]
    requests: int
    unreadable: int
    overlap: float
    calibration: dict[str, float | None]


def merged(parts: Iterable[Agreement]) -> Agreement | None:
    """What several replicas found: the mean by requests, of real requests where any replica had some."""
    found = list(parts)
    real = [p for p in found if p.source == "requests"] or found
    if not real:
        return None
    weights = np.array([p.requests for p in real], dtype=float)
    weights = weights / weights.sum() if weights.sum() else np.full(len(real), 1 / len(real))
    calibration: dict[str, float | None] = {}
    for task in real[0].calibration:
        each = [p.calibration.get(task) for p in real]
        known = [e for e in each if e is not None]
        calibration[task] = float(np.dot(weights, known)) if len(known) == len(each) else None
    return Agreement(
        source=real[0].source,
        requests=sum(p.requests for p in real),
        unreadable=sum(p.unreadable for p in real),
        overlap=float(np.dot(weights, [p.overlap for p in real])),
        calibration=calibration,
    )


def disagreements(agreement: Agreement, swap: SwapConfig) -> dict[str, str]:
    """The checks that fail, by name, each with its figures."""
    on = f"on {agreement.requests} {agreement.source.replace('requests', 'recent requests')}"
    problems: dict[str, str] = {}
    if agreement.overlap < swap.min_overlap:
        unread = f", {agreement.unreadable} of them unreadable for it" if agreement.unreadable else ""
        problems["overlap"] = (
            f"top-k overlap {agreement.overlap:.3f} with the live version {on}{unread}, "
            f"at least {swap.min_overlap:g} is asked (swap.min_overlap)"
        )
    for task, ratio in agreement.calibration.items():
        if ratio is None and not agreement.unreadable:
            problems["calibration"] = f"no comparable scores of task {task} {on}"
        elif ratio is not None and not 1 / swap.max_calibration <= ratio <= swap.max_calibration:
            problems["calibration"] = (
                f"mean score of {task} is {ratio:.3f} times the live version's {on}, "
                f"at most {swap.max_calibration:g} times either way is asked (swap.max_calibration)"
            )
    return problems
