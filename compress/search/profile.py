"""One pass over a checkpoint's tables: what is global about pruning, as sums by bucket.

In: a checkpoint and the row counts that prepare took. Out: a TableProfile a table, small whatever the table's size but
for its rank array. Everything a trial needs that its own rows do not tell is here.

Legend: N rows, D embedding dim, E bucket edges (E - 1 buckets).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from compress.config import TablePlan
from compress.ids import id_map_bytes
from compress.methods.prune import bucket_edges, cut_for_coverage, cut_for_share, frequency_order, settle_cut
from trainer.checkpoint import Checkpoint
from trainer.data.dataset import Dataset
from trainer.data.transform import IdMap, TableInfo
from trainer.errors import CheckpointError
from trainer.progress import ReportProgress

UNSEEN_WEIGHT = 1e-6  # of a row without lookups in a centroid, so that a bucket of such rows has a mean


@dataclass(frozen=True)
class TableProfile:
    """Ranks, bucket edges and bucket sums of one table.

    order (N,) int64: training rows by rank (empty in what trials get). edges (E,), lookups (E,): ranks, and lookups
    before each. sums (E - 1, D) float64 and weights (E - 1,): weighted rows of each bucket. id_bytes: of the id map,
    with no row pruned and with some.
    """

    info: TableInfo
    order: np.ndarray
    edges: np.ndarray
    lookups: np.ndarray
    sums: np.ndarray
    weights: np.ndarray
    id_bytes: tuple[int, int]

    def slim(self) -> TableProfile:
        """The same without what grows with the table: all that a trial needs."""
        return replace(self, order=np.zeros(0, dtype=np.int64))

    def ranks(self) -> np.ndarray:
        """Rank (N,) int64 of each training row."""
        ranks = np.empty(len(self.order), dtype=np.int64)
        ranks[self.order] = np.arange(len(self.order))
        return ranks

    def cut(self, plan: TablePlan) -> int:
        """Rows that stay under a plan; all of them when cutting would save nothing."""
        rows = self.info.num_embeddings
        if plan.coverage is not None:
            return settle_cut(cut_for_coverage(self.edges, self.lookups, plan.coverage), rows)
        return settle_cut(cut_for_share(self.edges, plan.keep if plan.keep is not None else 1.0, rows), rows)

    def centroid(self, cut: int) -> np.ndarray:
        """The mean row (D,) float32 of all ranks from `cut` on, weighted by lookups. `cut` is an edge below N."""
        bucket = int(np.searchsorted(self.edges, cut))
        assert self.edges[bucket] == cut < self.edges[-1], f"cut {cut} is no edge of {self.info.name}"
        return (self.sums[bucket:].sum(0) / self.weights[bucket:].sum()).astype(np.float32)


def profile_tables(checkpoint: Checkpoint, dataset: Dataset, progress: ReportProgress) -> dict[str, TableProfile]:
    """Profile every table of a checkpoint, a chunk of rows at a time."""
    tables = dataset.transform.tables
    profiles = {}
    for index, table in enumerate(tables.values()):
        profiles[table.name] = profile_table(
            checkpoint, table, dataset.counts(table.name), dataset.transform.id_maps[table.name]
        )
        progress("profile", index + 1, len(tables))
    return profiles


def profile_table(
    checkpoint: Checkpoint,
    table: TableInfo,
    counts_N: np.ndarray,  # noqa: N803
    id_map: IdMap,
) -> TableProfile:
    """Profile one table. Raises: CheckpointError when it holds NaN or infinity."""
    order = frequency_order(counts_N)
    edges = bucket_edges(table.num_embeddings)
    before = np.concatenate([[0], np.cumsum(counts_N[order])])
    bucket_of_row = np.empty(len(order), dtype=np.int64)
    bucket_of_row[order] = np.searchsorted(edges, np.arange(len(order)), side="right")
    sums = torch.zeros((len(edges) + 1, table.embedding_dim), dtype=torch.float64)
    weights = torch.zeros(len(edges) + 1, dtype=torch.float64)
    for first, rows in checkpoint.table_chunks(table.name):
        if not bool(torch.isfinite(rows).all()):
            raise CheckpointError(
                f"{checkpoint.folder}: table {table.name} holds values that are not finite: train again"
            )
        chunk = slice(first, first + len(rows))
        bucket = torch.from_numpy(bucket_of_row[chunk])
        weight = torch.from_numpy(np.maximum(counts_N[chunk], UNSEEN_WEIGHT).astype(np.float64))
        sums.index_add_(0, bucket, rows.double() * weight[:, None])
        weights.index_add_(0, bucket, weight)
    # bucket 0 of the searchsorted holds the reserved rows, which no centroid counts
    rows = table.num_embeddings
    id_bytes = id_map_bytes(id_map, rows, rows), id_map_bytes(id_map, rows, rows - 1)
    return TableProfile(table, order, edges, before[edges], sums[1:-1].numpy(), weights[1:-1].numpy(), id_bytes)
