"""An exact trial whose cost does not depend on the size of the tables.

Row-wise codes depend on one row alone, so compressing just the rows that a sample touches gives the scores that the
whole compressed table would. What is global comes from the profile: where a cut falls, and the centroid of what it
drops.

In: a checkpoint, its profile and a sample. Out: a WorkingSet of plain arrays, to be put in Ray's object store once; on
each node a trial reads it without a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from compress.compressor import ResolvedTable, decoders_of, physical_tiers, put_rows, put_shared
from compress.ids import Layout, loose_bits, target_rows
from compress.lookup import pieces_of, tier_views
from compress.methods.codec import quantize_rows
from compress.methods.fold import fold_decoders
from compress.model import CompressedModel, build_model, whole_table
from compress.onnx_head import head_of
from compress.search.profile import TableProfile, same_class
from trainer.checkpoint import Checkpoint
from trainer.config import RunConfig
from trainer.data.encoded import Encoded
from trainer.data.reader import Rows
from trainer.data.transform import RESERVED_ROWS, IdMap, Transform


@dataclass(frozen=True)
class WorkingSet:
    """The rows a sample touches, by table, and the sample with its ids pointing at them.

    weights[table] (M, D) float32 by rank, the reserved rows first; ranks[table] (M,) int64: of each in its whole table;
    clusters[table][C] (M,) uint8: which of C centroids each is nearest to. mates[table] (P, 2): a row, and the rank of
    another one whose id is of the same class (compress/ids.py): it is taken for that one where it is itself forgotten.
    """

    run: RunConfig
    transform: Transform
    sample: Encoded
    labels: np.ndarray
    weights: dict[str, np.ndarray]
    ranks: dict[str, np.ndarray]
    clusters: dict[str, dict[int, np.ndarray]]
    mates: dict[str, np.ndarray]
    dense: dict[str, np.ndarray]

    @property
    def bytes(self) -> int:
        """Bytes of the fp32 rows."""
        return sum(w.nbytes for w in self.weights.values())

    def take(self, index: np.ndarray) -> WorkingSet:
        """The working set of some rows of the sample, with only the table rows that these touch."""
        sample = self.sample.take(index)
        sparse, weights, ranks, clusters, mates = dict(sample.sparse), {}, {}, {}, {}
        for name, table in self.transform.tables.items():
            used = np.zeros(len(self.ranks[name]), dtype=bool)
            used[:RESERVED_ROWS] = True
            for feature in table.features:
                used[sample.sparse[feature].values] = True
            place = np.cumsum(used) - 1
            for feature in table.features:
                sparse[feature] = replace(sample.sparse[feature], values=place[sample.sparse[feature].values])
            weights[name], ranks[name] = self.weights[name][used], self.ranks[name][used]
            if name in self.clusters:
                clusters[name] = {count: numbers[used] for count, numbers in self.clusters[name].items()}
                own = self.mates[name][used[self.mates[name][:, 0]]]
                mates[name] = np.stack([place[own[:, 0]], own[:, 1]], axis=1)
        return replace(
            self,
            sample=Encoded(sparse, sample.dense),
            labels=self.labels[index],
            weights=weights,
            ranks=ranks,
            clusters=clusters,
            mates=mates,
        )


def extract(
    checkpoint: Checkpoint, transform: Transform, profiles: Mapping[str, TableProfile] | None, rows: Rows
) -> WorkingSet:
    """Take from a checkpoint what a sample of prepared rows needs. Without profiles, rows rank as they were trained."""
    sparse, weights, ranks, clusters, mates = dict(rows.encoded.sparse), {}, {}, {}, {}
    for name, table in transform.tables.items():
        used = [np.arange(RESERVED_ROWS), *(rows.encoded.sparse[f].values for f in table.features)]
        touched = np.unique(np.concatenate(used))
        all_ranks = None if profiles is None else profiles[name].ranks()
        rank = touched if all_ranks is None else all_ranks[touched].astype(np.int64)
        order = np.argsort(rank)
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        for feature in table.features:
            ragged = rows.encoded.sparse[feature]
            sparse[feature] = replace(ragged, values=place[np.searchsorted(touched, ragged.values)])
        weights[name] = checkpoint.table_rows(name, touched[order]).numpy()
        ranks[name] = rank[order]
        if profiles is not None and all_ranks is not None:
            books = profiles[name].codebooks
            clusters[name] = {count: book.numbers[touched[order]] for count, book in books.items()}
            mates[name] = _mates(transform.id_maps[name], all_ranks, touched[order])
    return WorkingSet(
        checkpoint.run,
        # trials score encoded rows only: vocabularies would be dead weight in the object store
        transform.with_id_maps({}),
        Encoded(sparse, rows.encoded.dense),
        rows.labels,
        weights,
        ranks,
        clusters,
        mates,
        {key: value.numpy() for key, value in checkpoint.dense_state().items()},
    )


def trial_model(
    working: WorkingSet, resolved: Mapping[str, ResolvedTable] | None
) -> tuple[CompressedModel, dict[str, np.ndarray]]:
    """The model that scores the sample as the compressed whole would, and the row (M,) of each row of the working set.

    A table that is not resolved stays fp32; so do all where nothing is.
    """
    tables, local, rows_of = [], {}, {}
    for name, info in working.transform.tables.items():
        ranks = working.ranks[name]
        if resolved is None or name not in resolved:
            tables.append(whole_table(info, len(ranks)))
            rows_of[name] = np.arange(len(ranks))
            continue
        local[name] = _localized(resolved[name], ranks, working.clusters[name])
        tables.append(local[name].stored)
        rows_of[name] = target_rows(IdMap(0), local[name].layout).astype(np.int64)
        taken = _mistaken(resolved[name].layout, ranks, working.mates[name])
        rows_of[name][taken] = RESERVED_ROWS + local[name].layout.numbers(taken)
    block = torch.zeros(pieces_of(tables)[1], dtype=torch.uint8)
    for table, views in zip(tables, tier_views(block, tables), strict=True):
        values = torch.tensor(working.weights[table.name])
        if table.name not in local:
            views[0][:] = quantize_rows(values, 32)
            continue
        part = local[table.name]
        kept = part.layout.kept
        put_rows(views, part, torch.from_numpy(rows_of[table.name][:kept]), values[:kept])
        put_shared(views, part)
    dense = {key: torch.tensor(value) for key, value in working.dense.items()}
    folded = decoders_of(local, folded=True)
    transform, dense = fold_decoders(working.run.model, working.transform, dense, folded)
    head = head_of(working.run, transform, dense)
    return build_model(working.run, transform, tables, block, head, "trial", decoders_of(local)), rows_of


def _mates(id_map: IdMap, ranks: np.ndarray, touched: np.ndarray) -> np.ndarray:
    """Pairs (P, 2) of a touched row, by its place, and the rank of a row of the same class."""
    if id_map.keys is None:
        return np.zeros((0, 2), dtype=np.int64)
    rows, classes = same_class(id_map.keys_by_row(), loose_bits(len(ranks)))
    order = np.argsort(classes, kind="stable")
    rows, classes = rows[order], classes[order]
    place = np.full(len(ranks), -1)
    place[touched] = np.arange(len(touched))
    pairs = []
    for step in range(1, int(np.bincount(classes).max()) if len(classes) else 0):
        same = classes[step:] == classes[:-step]
        for one, other in ((rows[step:][same], rows[:-step][same]), (rows[:-step][same], rows[step:][same])):
            pairs.append(np.stack([place[one], ranks[other]], axis=1))
    together = np.concatenate([np.zeros((0, 2), dtype=np.int64), *pairs])
    return together[together[:, 0] >= 0]


def _mistaken(layout: Layout, ranks: np.ndarray, mates: np.ndarray) -> np.ndarray:
    """Places of the rows that are forgotten and taken for one that reads a centroid, of the same class."""
    place, other = mates[:, 0], mates[:, 1]
    return place[(ranks[place] >= layout.zone) & (other >= layout.kept) & (other < layout.zone)]


def _localized(part: ResolvedTable, ranks: np.ndarray, clusters: Mapping[int, np.ndarray]) -> ResolvedTable:
    """A resolved table of the rows of a working set alone, which lie by rank: all cuts fall among them."""
    layout = part.layout
    ends = tuple(int(e) for e in np.searchsorted(ranks, layout.cuts))
    zone = int(np.searchsorted(ranks, layout.zone))
    numbers = clusters.get(layout.count, np.zeros(0, dtype=np.uint8))
    tiers = physical_tiers(ends, part.bits, layout.count, part.apart)
    local = Layout(np.arange(len(ranks)), ends, zone, layout.count, numbers)
    return replace(part, stored=replace(part.stored, tiers=tiers), layout=local)


def trial(working: WorkingSet, resolved: Mapping[str, ResolvedTable] | None) -> tuple[CompressedModel, Encoded]:
    """The model of `trial_model`, and the sample with its ids as rows of that model's tables."""
    model, rows_of = trial_model(working, resolved)
    sparse = {
        name: replace(ragged, values=rows_of[working.transform.table_of(name).name][ragged.values])
        for name, ragged in working.sample.sparse.items()
    }
    return model, Encoded(sparse, working.sample.dense)


def score(
    working: WorkingSet, resolved: Mapping[str, ResolvedTable] | None, head: nn.Module | None = None
) -> np.ndarray:
    """Log-odds (N, T) of the sample, compressed as resolved; the fp32 model's when nothing is.

    `head`: another one for what is looked up than the checkpoint's own.
    """
    model, sample = trial(working, resolved)
    if head is not None:
        model.head = head
    return model.score_encoded(sample)
