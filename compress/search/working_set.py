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

from compress.compressor import ResolvedTable, put_rows, put_shared
from compress.ids import Layout, target_rows
from compress.lookup import Tier, pieces_of, tier_views
from compress.methods.codec import quantize_rows
from compress.model import CompressedModel, build_model, whole_table
from compress.search.profile import TableProfile
from trainer.checkpoint import Checkpoint
from trainer.config import RunConfig
from trainer.data.encoded import Encoded
from trainer.data.reader import Rows
from trainer.data.transform import RESERVED_ROWS, IdMap, Transform


@dataclass(frozen=True)
class WorkingSet:
    """The rows a sample touches, by table, and the sample with its ids pointing at them.

    weights[table] (M, D) float32 by rank, the reserved rows first; ranks[table] (M,) int64: of each in its whole table.
    """

    run: RunConfig
    transform: Transform
    sample: Encoded
    labels: np.ndarray
    weights: dict[str, np.ndarray]
    ranks: dict[str, np.ndarray]
    dense: dict[str, np.ndarray]

    @property
    def bytes(self) -> int:
        """Bytes of the fp32 rows."""
        return sum(w.nbytes for w in self.weights.values())


def extract(
    checkpoint: Checkpoint, transform: Transform, profiles: Mapping[str, TableProfile] | None, rows: Rows
) -> WorkingSet:
    """Take from a checkpoint what a sample of prepared rows needs. Without profiles, rows rank as they were trained."""
    sparse, weights, ranks = dict(rows.encoded.sparse), {}, {}
    for name, table in transform.tables.items():
        used = [np.arange(RESERVED_ROWS), *(rows.encoded.sparse[f].values for f in table.features)]
        touched = np.unique(np.concatenate(used))
        rank = touched if profiles is None else profiles[name].ranks()[touched]
        order = np.argsort(rank)
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        for feature in table.features:
            ragged = rows.encoded.sparse[feature]
            sparse[feature] = replace(ragged, values=place[np.searchsorted(touched, ragged.values)])
        weights[name] = checkpoint.table_rows(name, touched[order]).numpy()
        ranks[name] = rank[order]
    return WorkingSet(
        checkpoint.run,
        # trials score encoded rows only: vocabularies would be dead weight in the object store
        transform.with_id_maps({}),
        Encoded(sparse, rows.encoded.dense),
        rows.labels,
        weights,
        ranks,
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
        local[name] = _localized(resolved[name], ranks)
        tables.append(local[name].stored)
        rows_of[name] = target_rows(IdMap(0), local[name].layout).astype(np.int64)
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
    decoders = {n: torch.from_numpy(p.decoder) for n, p in local.items() if p.decoder is not None}
    return build_model(working.run, working.transform, tables, block, dense, "trial", decoders), rows_of


def _localized(part: ResolvedTable, ranks: np.ndarray) -> ResolvedTable:
    """A resolved table of the rows of a working set alone, which lie by rank: cuts and bands fall among them."""
    ends = np.searchsorted(ranks, part.layout.cuts)
    bands = tuple(int(b) for b in np.searchsorted(ranks, part.layout.bands))
    sizes = np.diff([0, *ends])
    used = np.flatnonzero(sizes)  # the sample may touch no row of a tier
    sizes[0] += len(bands)
    tiers = tuple(Tier(int(sizes[i]), part.stored.tiers[i].bits) for i in used)
    layout = Layout(np.arange(len(ranks)), tuple(int(ends[i]) for i in used), bands, part.layout.shared)
    return replace(part, stored=replace(part.stored, tiers=tiers), layout=layout)


def score(working: WorkingSet, resolved: Mapping[str, ResolvedTable] | None) -> np.ndarray:
    """Log-odds (N, T) of the sample, compressed as resolved; the fp32 model's when nothing is."""
    model, rows_of = trial_model(working, resolved)
    sparse = {
        name: replace(ragged, values=rows_of[working.transform.table_of(name).name][ragged.values])
        for name, ragged in working.sample.sparse.items()
    }
    return model.score_encoded(Encoded(sparse, working.sample.dense))
