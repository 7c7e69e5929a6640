"""Pruning of tables: by row as a prefix cut, the others reading shared centroids, and by column.

A table's ranks are its training rows in the order of an artifact: the two reserved rows, then by falling score. Cuts
fall on bucket edges, so the centroid of any cut is a ratio of sums taken once (see compress/search/profile.py).

Legend: N rows, D embedding dim, E bucket edges (E - 1 buckets), C centroids, r columns kept.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from compress.errors import PlanError
from trainer.data.transform import RESERVED_ROWS

EDGES = 96

Score = Literal["frequency", "norm", "frequency_norm", "fisher"]


def row_scores(
    score: Score,
    weight_ND: np.ndarray,
    counts_N: np.ndarray,
    centroid_D: np.ndarray | None = None,
    fisher: np.ndarray | float | None = None,
) -> np.ndarray:
    """What pruning each row of a chunk would cost: scores (N,) float32, higher for rows to keep.

    "frequency": n. "norm": |w|. "frequency_norm": n |w|. "fisher": n (w - c)'F(w - c), twice the loss predicted for
    reading the centroid c (D,) instead, where fisher is F (D, D), its diagonal (D,) or one number for all columns.
    Raises: PlanError for an unknown score, and for "fisher" without a centroid and F.
    """
    counts = counts_N.astype(np.float32)
    if score == "frequency":
        return counts
    if score in ("norm", "frequency_norm"):
        norm_N = np.linalg.norm(weight_ND.astype(np.float32), axis=1)
        return norm_N if score == "norm" else counts * norm_N
    if score != "fisher":
        raise PlanError(f"score {score!r}: rows are ranked by {', '.join(get_args(Score))}")
    if centroid_D is None or fisher is None:
        raise PlanError("score fisher: needs the centroid and the Fisher matrix of the table: profile it with labels")
    off_ND = (weight_ND - centroid_D).astype(np.float32)
    fisher = np.asarray(fisher, dtype=np.float32)
    sensitive_ND = off_ND @ fisher if fisher.ndim == 2 else off_ND * fisher
    return counts * np.einsum("nd,nd->n", sensitive_ND, off_ND)


def order_by_score(scores_N: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    """Training rows (N,) int32 in the order of an artifact: reserved rows first, then by falling fp32 score.

    Ties fall to the higher count, then to the lower row. Raises: PlanError for a score that is NaN.
    """
    if np.isnan(scores_N).any():
        raise PlanError(f"score of row {int(np.isnan(scores_N).argmax())} is NaN: profile the table again")
    order = np.arange(len(scores_N), dtype=np.int32)
    # score and row in one number: sorting these takes a tenth of the time of sorting indices by two keys
    keys = _falling(scores_N[RESERVED_ROWS:]).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= order[RESERVED_ROWS:].astype(np.uint32)
    keys.sort()
    tied = np.zeros(len(keys) + 1, dtype=bool)  # with the one before
    np.equal((keys[1:] >> np.uint64(32)), (keys[:-1] >> np.uint64(32)), out=tied[1:-1])
    keys &= np.uint64(0xFFFFFFFF)
    ranked = order[RESERVED_ROWS:]
    ranked[:] = keys
    counts = counts_N[ranked]
    if (tied[1:-1] & (counts[1:] > counts[:-1])).any():
        places = np.flatnonzero(tied[1:] | tied[:-1])
        group = np.cumsum(~tied[:-1])[places]
        ranked[places] = ranked[places][np.lexsort((-counts[places], group))]
    return order


def _falling(scores: np.ndarray) -> np.ndarray:
    """Numbers (N,) uint32 that rise where fp32 scores fall; 0.0 and -0.0 give the same."""
    bits = (scores.astype(np.float32) + np.float32(0.0)).view(np.uint32)
    return np.where(bits >> np.uint32(31), bits, ~(bits | np.uint32(1 << 31)))


def bucket_edges(rows: int) -> np.ndarray:
    """Ranks (E,) int64 at which a table may be cut: evenly and geometrically spaced, from the reserved rows to all."""
    even = np.linspace(RESERVED_ROWS, rows, EDGES // 2)
    geometric = np.geomspace(RESERVED_ROWS, max(rows, RESERVED_ROWS), EDGES // 2)
    return np.unique(np.round(np.concatenate([even, geometric, [rows]])).astype(np.int64))


def cut_for_share(edges_E: np.ndarray, share: float, rows: int) -> int:
    """The first edge that keeps at least a share of the rows."""
    return int(edges_E[np.searchsorted(edges_E, min(np.ceil(share * rows), rows))])


def cut_for_coverage(edges_E: np.ndarray, lookups_E: np.ndarray, coverage: float) -> int:
    """The first edge that keeps at least a share of the lookups; lookups_E counts those before each edge."""
    total = lookups_E[-1]
    if total == 0:
        return int(edges_E[-1])
    return int(edges_E[np.searchsorted(lookups_E, coverage * total - min(1e-9 * total, 0.5))])


def settle_cut(cut: int, rows: int) -> int:
    """A cut that saves no row once the centroid is counted is no cut."""
    return rows if cut + 1 >= rows else cut


# -- columns ---------------------------------------------------------------------------------------------------------


def keep_columns(second_moment_DD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The columns (r,) int64 to keep, rising, and the matrix (r, D) fp32 that rebuilds all columns from these.

    second_moment_DD: the sum of n w w' over rows. Each step keeps the column that explains most energy of all others
    by least squares (forward selection), so kept columns are rebuilt exactly and the others as well as these allow.
    Raises: PlanError for a count outside 1 to D.
    """
    moment_DD = second_moment_DD.double()
    dim = len(moment_DD)
    if not 1 <= count <= dim:
        raise PlanError(f"{count} columns: give a number from 1 to {dim}")
    left_DD = moment_DD.clone()
    tiny = 1e-12 * float(moment_DD.diagonal().max())
    free_D = torch.ones(dim, dtype=torch.bool)
    for _ in range(count):
        own_D = left_DD.diagonal()
        gain_D = torch.where(own_D > tiny, left_DD.square().sum(0) / own_D.clamp_min(1e-300), 0.0)
        best = int(torch.where(free_D, gain_D, -1.0).argmax())
        free_D[best] = False
        if float(own_D[best]) > tiny:
            left_DD = left_DD - torch.outer(left_DD[:, best], left_DD[best]) / own_D[best]
    kept_r = torch.nonzero(~free_D).flatten()
    rebuild_rD = torch.linalg.pinv(moment_DD[kept_r][:, kept_r], hermitian=True, rtol=1e-12) @ moment_DD[kept_r]
    rebuild_rD[:, kept_r] = torch.eye(count, dtype=torch.float64)
    return kept_r, rebuild_rD.float()
