"""One pass over a checkpoint's tables, streamed: what is global about ranking, pruning and factoring their rows.

In: a checkpoint and the row counts that prepare took. Out: a TableProfile a table, small whatever the table's size but
for its order. Everything a trial needs that its own rows do not tell is here. Ranking by what the loss would lose needs
the tables' sensitivities (compress/search/sensitivity.py) and a second pass over their rows.

Legend: N rows, D embedding dim, E bucket edges (E - 1 buckets), S sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from compress.config import Cut, Order
from compress.ids import prefix_key_bits
from compress.methods.prune import bucket_edges, cut_for_coverage, cut_for_share, order_by, settle_cut
from trainer.checkpoint import Checkpoint
from trainer.data.dataset import Dataset
from trainer.data.transform import RESERVED_ROWS, IdMap, TableInfo
from trainer.errors import CheckpointError
from trainer.progress import ReportProgress

UNSEEN_WEIGHT = 1e-6  # of a row without lookups in a centroid, so that a bucket of such rows has a mean


@dataclass(frozen=True)
class TableProfile:
    """Order, bucket edges and bucket sums of one table.

    order (N,), counts (N,) int64: training rows by rank; lookups of each row (both empty in what trials get). edges
    (E,), lookups (E,): ranks, and lookups before each. sums (E - 1, D) float64 and weights (E - 1,): weighted rows of
    each bucket. moment (D, D) float64: sum of n w w' over rows w looked up n times. oov (D,): the out-of-vocabulary
    row; unknown: how many lookups in as many rows as the training split's would meet it, by the validation split.
    key_bits (E,): bits of a stored key if the rows before each edge have one; None for a hash or bucket table. fisher
    (D, D): what the loss minds, where it is known.
    """

    info: TableInfo
    order: np.ndarray
    counts: np.ndarray
    edges: np.ndarray
    lookups: np.ndarray
    sums: np.ndarray
    weights: np.ndarray
    moment: np.ndarray
    oov: np.ndarray
    unknown: float
    key_bits: np.ndarray | None
    fisher: np.ndarray | None = None

    def slim(self) -> TableProfile:
        """The same without what grows with the table: all that a trial needs."""
        none = np.zeros(0, dtype=np.int64)
        return replace(self, order=none, counts=none)

    def ranks(self) -> np.ndarray:
        """Rank (N,) int64 of each training row."""
        ranks = np.empty(len(self.order), dtype=np.int64)
        ranks[self.order] = np.arange(len(self.order))
        return ranks

    def cut(self, asked: Cut) -> int:
        """Rows up to a cut; all of them when cutting would save nothing."""
        rows = self.info.num_embeddings
        if asked.coverage is not None:
            return settle_cut(cut_for_coverage(self.edges, self.lookups, asked.coverage), rows)
        if asked.rows is not None:
            return settle_cut(int(self.edges[np.searchsorted(self.edges, min(asked.rows, rows))]), rows)
        return settle_cut(cut_for_share(self.edges, asked.keep if asked.keep is not None else 1.0, rows), rows)

    def centroid(self, cut: int, end: int | None = None) -> np.ndarray:
        """The mean row (D,) float32 of the ranks from `cut` to `end`, edges both, weighted by lookups."""
        first = int(np.searchsorted(self.edges, cut))
        last = len(self.edges) - 1 if end is None else int(np.searchsorted(self.edges, end))
        assert self.edges[first] == cut < self.edges[last], f"cut {cut} is no edge of {self.info.name}"
        assert end is None or self.edges[last] == end, f"{end} is no edge of {self.info.name}"
        return (self.sums[first:last].sum(0) / self.weights[first:last].sum()).astype(np.float32)

    def fallback(self, cut: int) -> np.ndarray:
        """What ids that are cut share with ids that training never saw: the mean row (D,) of both, by lookups."""
        first = int(np.searchsorted(self.edges, cut))
        known = float(self.weights[first:].sum())
        total = self.sums[first:].sum(0) + self.oov.astype(np.float64) * self.unknown
        return (total / (known + self.unknown)).astype(np.float32) if known + self.unknown > 0 else self.oov

    def bands(self, cut: int, count: int) -> tuple[int, ...]:
        """Edges at which `count` bands of the ranks from `cut` on end, of about equal lookups each."""
        first = int(np.searchsorted(self.edges, cut))
        through = np.cumsum(self.weights[first:])
        wanted = through[-1] * np.arange(1, count) / count
        ends = self.edges[first + 1 + np.searchsorted(through, wanted)]
        return tuple(int(e) for e in np.unique([*ends, self.edges[-1]]))


def profile_tables(
    checkpoint: Checkpoint,
    dataset: Dataset,
    progress: ReportProgress,
    order: Order = "frequency",
    fisher: Mapping[str, np.ndarray] | None = None,
) -> dict[str, TableProfile]:
    """Profile every table of a checkpoint, a chunk of rows at a time.

    `fisher` (D, D) by table is what order "fisher" ranks with. Raises: CheckpointError for values that are not finite.
    """
    tables = dataset.transform.tables
    profiles = {}
    for index, table in enumerate(tables.values()):
        profiles[table.name] = profile_table(
            checkpoint,
            table,
            dataset.counts(table.name),
            dataset.transform.id_maps[table.name],
            unknown_lookups(dataset, table),
            order,
            None if fisher is None else fisher[table.name],
        )
        progress("profile", index + 1, len(tables))
    return profiles


def unknown_lookups(dataset: Dataset, table: TableInfo) -> float:
    """Lookups of unknown ids that as many rows as the training split's would do, by what the validation split does."""
    met = dataset.manifest["unknown_ids"]["val"]
    return sum(met[feature] for feature in table.features) * dataset.rows("train") / max(dataset.rows("val"), 1)


def profile_table(
    checkpoint: Checkpoint,
    table: TableInfo,
    counts_N: np.ndarray,  # noqa: N803
    id_map: IdMap,
    unknown: float,
    order: Order = "frequency",
    fisher_DD: np.ndarray | None = None,  # noqa: N803
) -> TableProfile:
    """Profile one table. Raises: CheckpointError when it holds NaN or infinity."""
    scores = row_scores(checkpoint, table, counts_N, order, fisher_DD)
    ranked = order_by(scores, counts_N)
    edges = bucket_edges(table.num_embeddings)
    before = np.concatenate([[0], np.cumsum(counts_N[ranked])])
    bucket_of_row = np.empty(len(ranked), dtype=np.int64)
    bucket_of_row[ranked] = np.searchsorted(edges, np.arange(len(ranked)), side="right")
    sums = torch.zeros((len(edges) + 1, table.embedding_dim), dtype=torch.float64)
    weights = torch.zeros(len(edges) + 1, dtype=torch.float64)
    moment = torch.zeros((table.embedding_dim, table.embedding_dim), dtype=torch.float64)

    def add(chunk: slice, rows: Tensor) -> None:
        bucket = torch.from_numpy(bucket_of_row[chunk])
        weight = torch.from_numpy(np.maximum(counts_N[chunk], UNSEEN_WEIGHT).astype(np.float64))
        weighted = rows.double() * weight[:, None]
        sums.index_add_(0, bucket, weighted)
        weights.index_add_(0, bucket, weight)
        moment.add_(weighted.T @ rows.double())

    each_chunk(checkpoint, table, add)
    keys = None if id_map.keys is None else id_map.keys_by_row()[ranked[RESERVED_ROWS:] - RESERVED_ROWS]
    bits = None if keys is None else prefix_key_bits(keys, edges - RESERVED_ROWS)
    # bucket 0 of the searchsorted holds the reserved rows, which no centroid counts
    return TableProfile(
        table,
        ranked,
        counts_N,
        edges,
        before[edges],
        sums[1:-1].numpy(),
        weights[1:-1].numpy(),
        moment.numpy(),
        checkpoint.table_rows(table.name, np.zeros(1, dtype=np.int64))[0].numpy(),
        unknown,
        bits,
        fisher_DD,
    )


def each_chunk(checkpoint: Checkpoint, table: TableInfo, look: Callable[[slice, Tensor], None]) -> None:
    """Call `look` with each chunk of a table's rows. Raises: CheckpointError when one holds NaN or infinity."""
    for first, rows in checkpoint.table_chunks(table.name):
        if not bool(torch.isfinite(rows).all()):
            raise CheckpointError(
                f"{checkpoint.folder}: table {table.name} holds values that are not finite: train again"
            )
        look(slice(first, first + len(rows)), rows)


def row_scores(
    checkpoint: Checkpoint,
    table: TableInfo,
    counts_N: np.ndarray,  # noqa: N803
    order: Order,
    fisher_DD: np.ndarray | None,  # noqa: N803
) -> np.ndarray:
    """What each row (N,) float32 is ranked by, the highest first. The reserved rows' scores count for nothing.

    "fisher" is n (w - c)' F (w - c): about what the loss loses when a row w, looked up n times, reads the table's mean
    row c in its place.
    """
    if order == "frequency":
        return counts_N.astype(np.float32)
    scores = np.zeros(len(counts_N), dtype=np.float32)
    root = torch.eye(table.embedding_dim, dtype=torch.float64)
    centre = torch.zeros(table.embedding_dim, dtype=torch.float64)
    if order == "fisher":
        assert fisher_DD is not None, "order fisher needs the table's sensitivity"
        values, vectors = torch.linalg.eigh(torch.from_numpy(np.asarray(fisher_DD, dtype=np.float64)))
        root = vectors * values.clamp(min=0).sqrt()
        centre = mean_row(checkpoint, table, counts_N)

    def score(chunk: slice, rows: Tensor) -> None:
        lengths = ((rows.double() - centre) @ root).square().sum(1).numpy()
        n = 1.0 if order == "norm" else np.maximum(counts_N[chunk], UNSEEN_WEIGHT)
        scores[chunk] = np.sqrt(lengths) * n if order == "frequency_norm" else lengths * n

    each_chunk(checkpoint, table, score)
    return scores


def mean_row(checkpoint: Checkpoint, table: TableInfo, counts_N: np.ndarray) -> Tensor:  # noqa: N803
    """The mean row (D,) float64 of a table, weighted by lookups, reserved rows left out."""
    total, weight = torch.zeros(table.embedding_dim, dtype=torch.float64), 0.0
    counts = np.maximum(counts_N, UNSEEN_WEIGHT).astype(np.float64)
    counts[:RESERVED_ROWS] = 0.0

    def add(chunk: slice, rows: Tensor) -> None:
        nonlocal weight
        total.add_(torch.from_numpy(counts[chunk]) @ rows.double())
        weight += float(counts[chunk].sum())

    each_chunk(checkpoint, table, add)
    return total / max(weight, UNSEEN_WEIGHT)
