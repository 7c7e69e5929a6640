"""Which trials go on to more rows: successive halving for several objectives at once.

Trials run side by side, so a trial is judged when it gets to a rung, among those that got there before it (ASHA): it
goes on if it is among the best one in `eta`. "Best" is NSGA-II's order: those that hold what must hold before those
that do not, then by how many fronts lie below, then the loneliest of a front first.
Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, 2020 (ASHA); Schmucker et al.,
Multi-objective Asynchronous Successive Halving, 2021; Deb et al., NSGA-II, 2002.

Legend: P points, O objectives (less is better).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_RUNG_ROWS = 4_000  # with fewer, one trial in ten is dropped by chance alone (click log, delta NE of .001)


@dataclass(frozen=True)
class Point:
    """What a trial came to on a rung. violation: by how much it breaks what must hold, 0 where it does not."""

    objectives: tuple[float, ...]
    violation: float = 0.0


def rung_ends(rows: int, shares: Sequence[float]) -> list[int]:
    """The rows after which trials are judged, all of them last; rungs of fewer than MIN_RUNG_ROWS are left out."""
    ends = [int(rows * share) for share in shares[:-1]]
    return [end for end in ends if MIN_RUNG_ROWS <= end < rows] + [rows]


def goes_on(before: Sequence[Point], mine: Point, eta: int) -> bool:
    """Whether a trial that got to a rung after others is among the best one in `eta` there."""
    allowed = max(math.ceil((len(before) + 1) / eta), 1)
    order = best_first([*before, mine])
    return order.index(len(before)) < allowed


def best_first(points: Sequence[Point]) -> list[int]:
    """Indices of points, the best first; of equals, the earlier."""
    holding = [i for i, p in enumerate(points) if p.violation <= 0]
    breaking = sorted((i for i, p in enumerate(points) if p.violation > 0), key=lambda i: points[i].violation)
    if not holding:
        return breaking
    values_PO = np.array([points[i].objectives for i in holding], dtype=np.float64)
    fronts_P = fronts(values_PO)
    lonely_P = crowding(values_PO, fronts_P)
    order = np.lexsort((np.arange(len(holding)), -lonely_P, fronts_P))
    return [holding[i] for i in order] + breaking


def fronts(values_PO: np.ndarray) -> np.ndarray:
    """Of each point (P,) how many fronts lie below its own: 0 where no other point is as good in all and better in one.

    Shapes: values (P, O), less is better.
    """
    no_worse = (values_PO[:, None] <= values_PO[None]).all(2)
    beats = np.asarray(no_worse & (values_PO[:, None] < values_PO[None]).any(2))
    fronts_P = np.full(len(values_PO), -1)
    number = 0
    while (fronts_P < 0).any():
        left = fronts_P < 0
        beaten = beats[np.flatnonzero(left)].any(0)
        fronts_P[left & ~beaten] = number
        number += 1
    return fronts_P


def crowding(values_PO: np.ndarray, fronts_P: np.ndarray) -> np.ndarray:
    """How far a point's neighbours on its front are apart (P,), each objective scaled to its range; ends: infinite."""
    lonely_P = np.zeros(len(values_PO))
    for front in np.unique(fronts_P):
        members = np.flatnonzero(fronts_P == front)
        for column in values_PO[members].T:
            order = members[np.argsort(column, kind="stable")]
            sorted_values = np.sort(column)
            span = sorted_values[-1] - sorted_values[0]
            lonely_P[order[[0, -1]]] = np.inf
            if span > 0 and len(order) > 2:
                lonely_P[order[1:-1]] += (sorted_values[2:] - sorted_values[:-2]) / span
    return lonely_P


def hypervolume(points_P2: np.ndarray, reference: tuple[float, float]) -> float:
    """The area that points of two objectives (P, 2) dominate up to a reference point.

    Units: the product of the two objectives' own.
    """
    inside = points_P2[(points_P2 < reference).all(1)]
    area, ceiling = 0.0, reference[1]
    for first, second in inside[np.lexsort((inside[:, 1], inside[:, 0]))]:
        if second < ceiling:
            area += (reference[0] - first) * (ceiling - second)
            ceiling = second
    return float(area)
