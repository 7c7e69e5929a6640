"""Pruning as a prefix cut: the most frequent rows stay, the others read one shared centroid.

A table's ranks are its training rows in the order of an artifact: the two reserved rows, then by falling count. Cuts
fall on bucket edges, so the centroid of any cut is a ratio of sums taken once (see compress/search/profile.py).

Legend: N rows, D embedding dim, E bucket edges.
"""

from __future__ import annotations

import numpy as np

from trainer.data.transform import RESERVED_ROWS

EDGES = 96


def frequency_order(counts_N: np.ndarray) -> np.ndarray:  # noqa: N803
    """Training rows (N,) int64 in the order of an artifact: reserved rows first, then by falling count."""
    by_count = np.argsort(-counts_N[RESERVED_ROWS:], kind="stable") + RESERVED_ROWS
    return np.concatenate([np.arange(RESERVED_ROWS), by_count])


def bucket_edges(rows: int) -> np.ndarray:
    """Ranks (E,) int64 at which a table may be cut: evenly and geometrically spaced, from the reserved rows to all."""
    even = np.linspace(RESERVED_ROWS, rows, EDGES // 2)
    geometric = np.geomspace(RESERVED_ROWS, max(rows, RESERVED_ROWS), EDGES // 2)
    return np.unique(np.round(np.concatenate([even, geometric, [rows]])).astype(np.int64))


def cut_for_share(edges_E: np.ndarray, share: float, rows: int) -> int:  # noqa: N803
    """The first edge that keeps at least a share of the rows."""
    return int(edges_E[np.searchsorted(edges_E, min(np.ceil(share * rows), rows))])


def cut_for_coverage(edges_E: np.ndarray, lookups_E: np.ndarray, coverage: float) -> int:  # noqa: N803
    """The first edge that keeps at least a share of the lookups; lookups_E counts those before each edge."""
    total = lookups_E[-1]
    if total == 0:
        return int(edges_E[-1])
    return int(edges_E[np.searchsorted(lookups_E, coverage * total - min(1e-9 * total, 0.5))])


def settle_cut(cut: int, rows: int) -> int:
    """A cut that saves no row once the centroid is counted is no cut."""
    return rows if cut + 1 >= rows else cut
