"""What a search comes to: the front, the choice, and the gate on rows that the search never saw. Pure functions.

Trials are compared on the search's rows; among the many that were tried the best looks better there than it is. So the
front is scored again on selection rows, the choice is made by these bounds, and gate rows, which had no part in either,
decide. Several plans may come to the gate one after the other: each bound is then taken at a higher confidence
(Bonferroni), so that all of them hold together at 95%.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from compress.search.halving import fronts
from compress.search.objective import CONFIDENCE, Quality, rows_to_resolve
from trainer.data.reader import Rows
from trainer.errors import DataError

FEWEST_ROWS = 300
OBJECTIVES = ("artifact_bytes", "delta_ne", "ms")
QUALITY = ("delta_ne", "delta_ne_upper", "delta_auc", "delta_auc_lower", "overlap", "tasks")
SHARES = (0.35, 0.25)  # of a validation split too small for all: of the search and of the selection; the gate's is most


def split_sizes(rows: int, asked: tuple[int, int, int]) -> tuple[int, int, int]:
    """Rows for the search, the selection and the gate: as asked, or a split too small is shared among them."""
    if rows >= sum(asked):
        return asked
    search, selection = (min(n, int(share * rows)) for n, share in zip(asked, SHARES, strict=False))
    return search, selection, min(asked[2], rows - search - selection)


def split_rows(rows: Rows, asked: tuple[int, int, int], seed: int) -> tuple[Rows, Rows, Rows]:
    """Disjoint rows for the search, the selection and the gate, in no order.

    Raises: DataError with fewer than FEWEST_ROWS.
    """
    if len(rows) < FEWEST_ROWS:
        raise DataError(f"{len(rows)} validation rows: a search, its choice and its gate need {FEWEST_ROWS} at least")
    search, selection, gate = split_sizes(len(rows), asked)
    order = np.random.default_rng(seed).permutation(len(rows))
    ends = np.cumsum([search, selection, gate])
    parts = np.split(order[: ends[-1]], ends[:-1])
    return rows.take(parts[0]), rows.take(parts[1]), rows.take(parts[2])


def front_of(trials: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The trials that no other one beats in bytes, loss and milliseconds, by rising bytes; whole trials only."""
    whole = [t for t in trials if "error" not in t and not t["stopped"] and np.isfinite(t["delta_ne_upper"])]
    if not whole:
        return []
    first = fronts(np.array([[t[name] for name in OBJECTIVES] for t in whole], dtype=np.float64)) == 0
    distinct = {tuple(t[name] for name in OBJECTIVES): t for t, own in zip(whole, first, strict=True) if own}
    return sorted(distinct.values(), key=lambda t: (t["table_bytes"], t["delta_ne"]))


def holds(point: Mapping[str, Any], max_delta_ne: float, max_ms: float | None) -> bool:
    """Whether a point of the front, scored on selection rows, is within what must hold."""
    ms = point.get("measured_ms") or point["ms"]
    return point["selection"]["delta_ne_upper"] <= max_delta_ne and (max_ms is None or ms <= max_ms)


def candidates(front: Sequence[Mapping[str, Any]], max_delta_ne: float, max_ms: float | None) -> list[int]:
    """Indices of the points that hold, the smallest artifact first, of equals the quicker; one at least.

    Where none holds: the one with the best bound among those that are quick enough, or of all.
    """
    able = [i for i, point in enumerate(front) if holds(point, max_delta_ne, max_ms)]
    if able:
        return sorted(able, key=lambda i: (front[i]["artifact_bytes"], front[i]["ms"]))
    quick = [i for i, p in enumerate(front) if max_ms is None or (p.get("measured_ms") or p["ms"]) <= max_ms]
    return [min(quick or range(len(front)), key=lambda i: front[i]["selection"]["delta_ne_upper"])]


def gate(
    order: Sequence[int],
    tries: int,
    budget: float,
    rows: int,
    measure: Callable[[int, float], dict[str, Any]],
) -> tuple[int, dict[str, Any]]:
    """The first of `order` whose bound on the gate's rows is within the budget, and the verdict.

    `measure` (index of the point, confidence) gives its quality there. After `tries` refusals, or where all are
    refused, the point whose bound came closest, and a verdict that it did not pass.
    """
    tried: list[int] = []
    measured: list[dict[str, Any]] = []
    allowed = list(order[:tries])
    confidence = 1.0 - (1.0 - CONFIDENCE) / len(allowed)
    for index in allowed:
        tried.append(index)
        measured.append(measure(index, confidence))
        if measured[-1]["delta_ne_upper"] <= budget:
            break
    passed = measured[-1]["delta_ne_upper"] <= budget
    at = (
        len(tried) - 1 if passed else int(np.argmin(np.nan_to_num([m["delta_ne_upper"] for m in measured], nan=np.inf)))
    )
    refused = [
        {"index": i, "delta_ne_upper": m["delta_ne_upper"]}
        for i, m in zip(tried, measured, strict=True)
        if not (passed and i == tried[at])
    ]
    verdict = {
        "passed": passed,
        "budget": budget,
        "rows": rows,
        "confidence": confidence,
        **measured[at],
        "tried": tried,
        "refused": refused,
    }
    if not passed:
        found = Quality(**{name: measured[at][name] for name in Quality.__dataclass_fields__})
        verdict["rows_to_resolve"] = rows_to_resolve(found, rows, budget)
    return tried[at], verdict


def why(front: Sequence[Mapping[str, Any]], chosen: int, verdict: Mapping[str, Any], max_delta_ne: float) -> str:
    """One sentence on why a point was chosen."""
    size, number = f"{front[chosen]['artifact_bytes']:,.0f} bytes", front[chosen]["number"]
    bound = f"{verdict['delta_ne_upper']:+.2%}"
    if not verdict["passed"]:
        return (
            f"No plan was shown to hold delta NE of {max_delta_ne:.2%}: trial {number} ({size}) came closest on the "
            f"gate's rows, with {bound} at most."
        )
    before = f" after {len(verdict['refused'])} smaller ones were refused" if verdict["refused"] else ""
    return (
        f"Trial {number} is the smallest artifact ({size}) whose bound of delta NE holds {max_delta_ne:.2%} on the "
        f"selection rows and, with {bound}, on the gate's{before}."
    )


def described(point: Mapping[str, Any], selection: Mapping[str, Any]) -> dict[str, Any]:
    """A point of the front as tune.json has it: a trial without what only the trial concerns."""
    kept = ("number", "params", "table_bytes", "artifact_bytes", *QUALITY, "ms")
    return {**{k: point[k] for k in kept if k in point}, "measured_ms": None, "selection": dict(selection)}


def quality_of(found: Quality) -> dict[str, float]:
    """A quality as JSON has it."""
    return asdict(found)
