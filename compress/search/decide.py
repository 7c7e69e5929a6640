"""What a search comes to: the front, the choice, and the gate on rows that the search never saw. Pure functions.

Trials are compared on the search's rows; among the many that were tried the best looks better there than it is. So the
front is scored again on selection rows, the choice is made by these bounds, and gate rows, which had no part in either,
decide. Several plans may come to the gate, in an order settled before: the safest first, each next one smaller, until
one is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from compress.search.halving import fronts
from compress.search.objective import CONFIDENCE, ONE_SIDED, Quality, rows_to_resolve
from trainer.data.reader import Rows
from trainer.errors import DataError

FEWEST_ROWS = 300
OBJECTIVES = ("artifact_bytes", "delta_ne_upper", "ms")  # the bound: by luck a small plan looks better than a safe one
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
    """The trials that no other one beats in bytes, bound of loss and milliseconds, by rising bytes; whole ones only."""
    whole = [t for t in trials if "error" not in t and not t["stopped"] and np.isfinite(t["delta_ne_upper"])]
    if not whole:
        return []
    first = fronts(np.array([[t[name] for name in OBJECTIVES] for t in whole], dtype=np.float64)) == 0
    distinct = {tuple(t[name] for name in OBJECTIVES): t for t, own in zip(whole, first, strict=True) if own}
    return sorted(distinct.values(), key=lambda t: (t["table_bytes"], t["delta_ne_upper"]))


def ms_of(point: Mapping[str, Any]) -> float:
    """Milliseconds of a request by a point of the front: as measured, else as predicted."""
    return point["ms"] if point["measured_ms"] is None else point["measured_ms"]


def holds(point: Mapping[str, Any], max_delta_ne: float, max_ms: float | None) -> bool:
    """Whether a point of the front, scored on selection rows, is within what must hold."""
    return point["selection"]["delta_ne_upper"] <= max_delta_ne and (max_ms is None or ms_of(point) <= max_ms)


def candidates(front: Sequence[Mapping[str, Any]], max_delta_ne: float, max_ms: float | None) -> list[int]:
    """Indices of the points that hold, the smallest artifact first, of equals the quicker; one at least.

    Where none holds: the one with the best bound among those that are quick enough, or of all.
    """
    able = [i for i, point in enumerate(front) if holds(point, max_delta_ne, max_ms)]
    if able:
        return sorted(able, key=lambda i: (front[i]["artifact_bytes"], front[i]["ms"]))
    quick = [i for i, point in enumerate(front) if max_ms is None or ms_of(point) <= max_ms] or range(len(front))
    return [min(quick, key=lambda i: float(np.nan_to_num(front[i]["selection"]["delta_ne_upper"], nan=np.inf)))]


def chance(point: Mapping[str, Any], budget: float, rows: tuple[int, int, int]) -> float:
    """How likely a point's bound will be within the budget on the gate's rows, by its figures on the others.

    `rows` of the search, the selection and the gate. Delta NE is taken from both samples together; what a row adds to
    its variance from the one that says more, since a few rows may change much that the other has none of.
    """
    search, selection, gate_rows = rows
    both = [(point, search), (point["selection"], selection)]
    change = sum(found["delta_ne"] * count for found, count in both) / (search + selection)
    spread = max((found["delta_ne_upper"] - found["delta_ne"]) / ONE_SIDED * count**0.5 for found, count in both)
    there = spread / gate_rows**0.5
    room = budget - change - ONE_SIDED * there
    return NormalDist().cdf(room / max(math.hypot(there, spread / (search + selection) ** 0.5), 1e-12))


def chain(front: Sequence[Mapping[str, Any]], able: Sequence[int], chances: Sequence[float], most: int) -> list[int]:
    """The order in which plans come to the gate: the safest first, each next one smaller and less safe.

    `chances`: of each point of the front, to pass. Plans that are larger and no safer than another are left out. Of
    more than `most` the safest, the smallest and a spread between stay.
    """
    links: list[int] = []
    for index in sorted(able, key=lambda i: (-chances[i], front[i]["artifact_bytes"])):
        if not links or front[index]["artifact_bytes"] < front[links[-1]]["artifact_bytes"]:
            links.append(index)
    if len(links) <= most:
        return links
    return [links[i] for i in np.unique(np.linspace(len(links) - 1, 0, most).round().astype(int))]


def gate(
    order: Sequence[int], qualities: Sequence[Mapping[str, Any]], budget: float, rows: int
) -> tuple[int, dict[str, Any]]:
    """The last of `order` before the first whose bound on the gate's rows is not within the budget, and the verdict.

    `qualities`: of each of `order` there; those after the first refusal are not looked at. As the order was settled
    before and the first refusal ends it, each bound at 95% keeps the whole at 95% (fixed-sequence testing). If the
    first one is refused, it is what is returned, and the verdict says that it did not pass.
    Source: Angelopoulos et al., Learn then Test, 2021.
    """
    passed: list[tuple[int, Mapping[str, Any]]] = []
    refused: list[tuple[int, Mapping[str, Any]]] = []
    for index, found in zip(order, qualities, strict=True):
        (passed if found["delta_ne_upper"] <= budget else refused).append((index, found))
        if refused:
            break
    chosen, quality = (passed or refused)[-1]
    verdict: dict[str, Any] = {
        "passed": bool(passed),
        "budget": budget,
        "rows": rows,
        "confidence": CONFIDENCE,
        **quality,
        "tried": [i for i, _ in [*passed, *refused]],
        "refused": [{"index": i, "delta_ne_upper": q["delta_ne_upper"]} for i, q in refused],
    }
    if not passed:
        bounds = Quality(**{name: quality[name] for name in Quality.__dataclass_fields__})
        verdict["rows_to_resolve"] = rows_to_resolve(bounds, rows, budget)
    return chosen, verdict


def in_time(verdict: Mapping[str, Any], ms: float, max_ms: float | None) -> dict[str, Any]:
    """A verdict with the milliseconds of the choice, which does not pass above their limit."""
    if max_ms is None:
        return dict(verdict)
    timed = {**verdict, "ms": ms, "max_ms": max_ms}
    return timed if ms <= max_ms else {**timed, "passed": False, "rows_to_resolve": 0}


def why(front: Sequence[Mapping[str, Any]], chosen: int, verdict: Mapping[str, Any], max_delta_ne: float) -> str:
    """One sentence on why a point was chosen."""
    size, number = f"{front[chosen]['artifact_bytes']:,.0f} bytes", front[chosen]["number"]
    bound = f"{verdict['delta_ne_upper']:+.2%}"
    if verdict.get("ms", 0.0) > verdict.get("max_ms", math.inf):
        return (
            f"No plan on the front is within {verdict['max_ms']:g} ms: trial {number} ({size}) takes "
            f"{verdict['ms']:.3g} ms."
        )
    if not verdict["passed"]:
        return (
            f"No plan was shown to hold delta NE of {max_delta_ne:.2%}: trial {number} ({size}), the safest, may lose "
            f"{bound} by the gate's rows."
        )
    if verdict["refused"]:
        refused = verdict["refused"][0]
        return (
            f"Trial {number} ({size}) holds delta NE of {max_delta_ne:.2%} on the selection rows and, with {bound}, on "
            f"the gate's; the next smaller plan, trial {front[refused['index']]['number']}, was refused there "
            f"({refused['delta_ne_upper']:+.2%})."
        )
    return (
        f"Trial {number} is the smallest artifact ({size}) whose bound of delta NE holds {max_delta_ne:.2%} on the "
        f"selection rows and, with {bound}, on the gate's."
    )


def described(point: Mapping[str, Any], selection: Mapping[str, Any]) -> dict[str, Any]:
    """A point of the front as tune.json has it: a trial without what only the trial concerns."""
    kept = ("number", "params", "table_bytes", "artifact_bytes", *QUALITY, "ms")
    return {**{k: point[k] for k in kept if k in point}, "measured_ms": None, "selection": dict(selection)}
