"""One pass over a checkpoint's tables, streamed: what is global about ranking, pruning and factoring their rows.

In: a checkpoint and the row counts that prepare took. Out: a TableProfile a table, small whatever the table's size but
for its order. Everything a trial needs that its own rows do not tell is here. Ranking by what the loss would lose needs
the tables' sensitivities (compress/search/sensitivity.py) and a second pass over their rows.

Legend: N rows, D embedding dim, E bucket edges (E - 1 buckets), S sampled rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from compress.config import Cut
from compress.ids import key_bits, loose_bits, packed_bytes
from compress.methods import prune
from compress.methods.codebook import fit_codebook, metric_root, nearest
from compress.methods.fold import foldable_tables
from compress.methods.prune import Score, bucket_edges, cut_for_coverage, cut_for_share, order_by_score, settle_cut
from trainer.checkpoint import Checkpoint
from trainer.data.dataset import Dataset
from trainer.data.transform import RESERVED_ROWS, IdMap, TableInfo
from trainer.errors import CheckpointError
from trainer.progress import ReportProgress

CHUNK_ROWS = 1 << 14  # looked at together: in fp64 they stay in the cache, and what they take is not given back
CODEBOOK_ROWS = 16_384  # of a table that its centroids are fitted to
ROWS_PER_CENTROID = 4  # a table has a codebook where it has so many rows for each
HEAD_SHARE = 0.02  # of the ranks, which have rows of their own: codebooks are for the others
UNSEEN_WEIGHT = 1e-6  # of a row without lookups in a centroid, so that a bucket of such rows has a mean


@dataclass(frozen=True)
class Codebook:
    """Centroids (C, D) float32 of a table; the nearest one's number (N,) uint8 of each training row (empty in what
    trials get); how many rows of each bucket read each (E - 1, C)."""

    centroids: np.ndarray
    numbers: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class TableProfile:
    """Score, bucket edges and bucket sums of one table.

    order (N,) int32, counts (N,) int64: training rows by rank; lookups of each row (both empty in what trials get).
    edges (E,), lookups (E,): ranks, and lookups before each. sums (E - 1, D) float64 and weights (E - 1,): weighted
    rows of each bucket. moment (D, D) float64: sum of n w w' over rows w looked up n times. oov (D,): the
    out-of-vocabulary row; unknown: how many lookups in as many rows as the training split's would meet it, by the
    validation split. key_bits: of a stored key; None for a hash or bucket table. fisher (D, D): what the loss minds,
    where it is known. codebooks: by their number of centroids. foldable: only linear layers read what it gives, so
    that a decoder may become part of them (compress/methods/fold.py).
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
    key_bits: int | None
    fisher: np.ndarray | None = None
    codebooks: dict[int, Codebook] = field(default_factory=dict)
    foldable: bool = False

    def slim(self) -> TableProfile:
        """The same without what grows with the table: all that a trial needs."""
        none = np.zeros(0, dtype=np.int64)
        books = {count: replace(book, numbers=none) for count, book in self.codebooks.items()}
        return replace(self, order=none, counts=none, codebooks=books)

    @cached_property
    def key_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes (E - 1,) that the keys of each bucket's rows take, with rows of their own, and with centroids'."""
        assert self.key_bits is not None, f"{self.info.name}: a hash table stores no keys"
        own, loose = (
            np.maximum(np.diff([packed_bytes(int(e) - RESERVED_ROWS, width) for e in self.edges]), 0)
            for width in (self.key_bits, loose_bits(int(self.edges[-1])))
        )
        return own, loose

    def ranks(self) -> np.ndarray:
        """Rank (N,) int32 of each training row."""
        ranks = np.empty(len(self.order), dtype=np.int32)
        ranks[self.order] = np.arange(len(self.order), dtype=np.int32)
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

    def codebook(self, count: int) -> Codebook | None:
        """The largest codebook of `count` centroids at most; None where one centroid is all there is."""
        return max((b for c, b in self.codebooks.items() if c <= count), key=lambda b: len(b.centroids), default=None)


def profile_tables(
    checkpoint: Checkpoint,
    dataset: Dataset,
    progress: ReportProgress,
    order: Score = "frequency",
    fisher: Mapping[str, np.ndarray] | None = None,
    codebooks: Iterable[int] = (),
) -> dict[str, TableProfile]:
    """Profile every table of a checkpoint, a chunk of rows at a time.

    `fisher` (D, D) by table is what order "fisher" ranks with. Raises: CheckpointError for values that are not finite.
    """
    tables = dataset.transform.tables
    foldable = foldable_tables(checkpoint.run.model, dataset.transform, checkpoint.dense_state())
    profiles = {}
    for index, table in enumerate(tables.values()):
        profile = profile_table(
            checkpoint,
            table,
            dataset.counts(table.name),
            dataset.transform.id_maps[table.name],
            unknown_lookups(dataset, table),
            order,
            None if fisher is None else fisher[table.name],
            codebooks,
        )
        profiles[table.name] = replace(profile, foldable=table.name in foldable)
        progress("profile", index + 1, len(tables))
    return profiles


def unknown_lookups(dataset: Dataset, table: TableInfo) -> float:
    """Lookups of unknown ids that as many rows as the training split's would do, by what the validation split does."""
    met = dataset.manifest["unknown_ids"]["val"]
    return sum(met[feature] for feature in table.features) * dataset.rows("train") / max(dataset.rows("val"), 1)


def profile_table(
    checkpoint: Checkpoint,
    table: TableInfo,
    counts_N: np.ndarray,
    id_map: IdMap,
    unknown: float,
    order: Score = "frequency",
    fisher_DD: np.ndarray | None = None,
    codebooks: Iterable[int] = (),
) -> TableProfile:
    """Profile one table, with codebooks of so many centroids where it has rows enough.

    Raises: CheckpointError when it holds NaN or infinity.
    """
    scores = row_scores(checkpoint, table, counts_N, order, fisher_DD)
    ranked = order_by_score(scores, counts_N)
    edges = bucket_edges(table.num_embeddings)
    bucket_of_row = np.empty(len(ranked), dtype=np.uint8)
    looked_up = []
    for index, (first, last) in enumerate(itertools.pairwise([0, *edges])):  # bucket 0: the reserved rows
        bucket_of_row[ranked[first:last]] = index
        looked_up.append(int(counts_N[ranked[first:last]].sum()))
    sums = torch.zeros((len(edges), table.embedding_dim), dtype=torch.float64)
    weights = torch.zeros(len(edges), dtype=torch.float64)
    moment = torch.zeros((table.embedding_dim, table.embedding_dim), dtype=torch.float64)

    def add(chunk: slice, rows: Tensor) -> None:
        bucket = torch.from_numpy(bucket_of_row[chunk]).int()
        weight = torch.from_numpy(np.maximum(counts_N[chunk], UNSEEN_WEIGHT).astype(np.float64))
        values = rows.double()
        weighted = values * weight[:, None]
        sums.index_add_(0, bucket, weighted)
        weights.index_add_(0, bucket, weight)
        moment.add_(weighted.T @ values)

    each_chunk(checkpoint, table, add)
    keys = None if id_map.keys is None else id_map.keys_by_row()
    bits = None if keys is None else key_bits(keys)
    books = make_codebooks(checkpoint, table, ranked, edges, counts_N, keys, fisher_DD, codebooks)
    # no centroid counts the reserved rows
    return TableProfile(
        table,
        ranked,
        counts_N,
        edges,
        np.cumsum(looked_up),
        sums[1:].numpy(),
        weights[1:].numpy(),
        moment.numpy(),
        checkpoint.table_rows(table.name, np.zeros(1, dtype=np.int64))[0].numpy(),
        unknown,
        bits,
        fisher_DD,
        books,
    )


def each_chunk(checkpoint: Checkpoint, table: TableInfo, look: Callable[[slice, Tensor], None]) -> None:
    """Call `look` with each chunk of a table's rows. Raises: CheckpointError when one holds NaN or infinity."""
    for begin, read in checkpoint.table_chunks(table.name):
        for index, rows in enumerate(read.split(CHUNK_ROWS)):
            if not bool(torch.isfinite(rows).all()):
                raise CheckpointError(
                    f"{checkpoint.folder}: table {table.name} holds values that are not finite: train again"
                )
            first = begin + index * CHUNK_ROWS
            look(slice(first, first + len(rows)), rows)


def row_scores(
    checkpoint: Checkpoint,
    table: TableInfo,
    counts_N: np.ndarray,
    order: Score,
    fisher_DD: np.ndarray | None,
) -> np.ndarray:
    """What each row (N,) float32 is ranked by, the highest first. The reserved rows' scores count for nothing.

    "fisher" is n (w - c)' F (w - c): about what the loss loses when a row w, looked up n times, reads the table's mean
    row c in its place.
    """
    if order == "frequency":
        return counts_N.astype(np.float32)
    scores = np.zeros(len(counts_N), dtype=np.float32)
    centre = mean_row(checkpoint, table, counts_N).numpy() if order == "fisher" else None

    def score(chunk: slice, rows: Tensor) -> None:
        n = np.maximum(counts_N[chunk], UNSEEN_WEIGHT)
        scores[chunk] = prune.row_scores(order, rows.numpy(), n, centre, fisher_DD)

    each_chunk(checkpoint, table, score)
    return scores


def mean_row(checkpoint: Checkpoint, table: TableInfo, counts_N: np.ndarray) -> Tensor:
    """The mean row (D,) float64 of a table, weighted by lookups, reserved rows left out."""
    total, weight = torch.zeros(table.embedding_dim, dtype=torch.float64), 0.0

    def add(chunk: slice, rows: Tensor) -> None:
        nonlocal weight
        counts = np.maximum(counts_N[chunk], UNSEEN_WEIGHT).astype(np.float64)
        counts[: max(RESERVED_ROWS - chunk.start, 0)] = 0.0
        total.add_(torch.from_numpy(counts) @ rows.double())
        weight += float(counts.sum())

    each_chunk(checkpoint, table, add)
    return total / max(weight, UNSEEN_WEIGHT)


def make_codebooks(
    checkpoint: Checkpoint,
    table: TableInfo,
    order: np.ndarray,
    edges: np.ndarray,
    counts_N: np.ndarray,
    keys: np.ndarray | None,
    fisher_DD: np.ndarray | None,
    wanted: Iterable[int],
) -> dict[int, Codebook]:
    """Codebooks of one table, by the number of centroids, and what each row reads.

    Rows whose ids have the same loose key read the centroid nearest to their mean.
    """
    rows = table.num_embeddings
    wanted = [count for count in wanted if count > 1 and count * ROWS_PER_CENTROID <= rows - RESERVED_ROWS]
    if not wanted:
        return {}
    root = metric_root(fisher_DD, table.embedding_dim)
    tail = order[max(RESERVED_ROWS, int(HEAD_SHARE * rows)) :]
    if len(tail) > CODEBOOK_ROWS:
        tail = np.random.default_rng(0).choice(tail, CODEBOOK_ROWS, replace=False)
    tail = np.sort(tail)
    sample = checkpoint.table_rows(table.name, tail)
    weight = torch.from_numpy(np.maximum(counts_N[tail], UNSEEN_WEIGHT).astype(np.float64))
    fitted = {count: fit_codebook(sample, weight, count, root) for count in wanted}
    numbers = {count: np.zeros(rows, dtype=np.uint8) for count in wanted}

    def assign(chunk: slice, values: Tensor) -> None:
        for count, centroids in fitted.items():
            numbers[count][chunk] = nearest(values, centroids, root)

    each_chunk(checkpoint, table, assign)
    if keys is not None:
        together, mates = same_class(keys, loose_bits(rows))
        means = class_means(checkpoint.table_rows(table.name, together), mates, counts_N[together])
        for count, centroids in fitted.items():
            numbers[count][together] = nearest(means, centroids, root)[mates]
    books = {}
    for count, centroids in fitted.items():
        sizes = [np.bincount(numbers[count][order[a:b]], minlength=count) for a, b in itertools.pairwise(edges)]
        books[count] = Codebook(centroids.numpy(), numbers[count], np.stack(sizes))
    return books


def same_class(keys: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Training rows (M,) whose ids share their first `bits` bits with another one's, rising, and their classes (M,)."""
    classes = keys >> np.uint64(64 - bits)
    order = None if (keys[1:] > keys[:-1]).all() else np.argsort(classes, kind="stable")
    ordered = classes if order is None else classes[order]
    alike = np.zeros(len(keys) + 1, dtype=bool)
    np.equal(ordered[1:], ordered[:-1], out=alike[1:-1])
    places = np.flatnonzero(alike[1:] | alike[:-1])
    together = places if order is None else np.sort(order[places])
    return together + RESERVED_ROWS, np.unique(classes[together], return_inverse=True)[1]


def class_means(rows_MD: Tensor, class_M: np.ndarray, counts_M: np.ndarray) -> Tensor:
    """The mean row of each class, weighted by lookups."""
    classes = int(class_M.max()) + 1 if len(class_M) else 0
    weight = torch.from_numpy(np.maximum(counts_M, UNSEEN_WEIGHT).astype(np.float64))
    index = torch.from_numpy(class_M)
    sums = torch.zeros((classes, rows_MD.shape[1]), dtype=torch.float64)
    sums.index_add_(0, index, rows_MD.double() * weight[:, None])
    return (sums / torch.zeros(classes, dtype=torch.float64).index_add_(0, index, weight)[:, None]).float()
