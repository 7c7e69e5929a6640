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

from compress.compressor import ResolvedTable
from compress.lookup import PackedTable, table_offsets, table_view
from compress.methods.codec import quantize_rows
from compress.model import CompressedModel, build_model
from compress.search.profile import TableProfile
from trainer.checkpoint import Checkpoint
from trainer.config import RunConfig
from trainer.data.encoded import Encoded
from trainer.data.reader import Rows
from trainer.data.transform import Transform


@dataclass(frozen=True)
class WorkingSet:
    """The rows a sample touches, by table, and the sample with its ids pointing at them.

    weights[table] (M, D) float32; ranks[table] (M,) int64: each row's rank in its whole table.
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
    checkpoint: Checkpoint, transform: Transform, profiles: Mapping[str, TableProfile], rows: Rows
) -> WorkingSet:
    """Take from a checkpoint what a sample of prepared rows needs."""
    touched: dict[str, np.ndarray] = {}
    for name, table in transform.tables.items():
        touched[name] = np.unique(np.concatenate([rows.encoded.sparse[f].values for f in table.features]))
    sparse = {
        name: replace(r, values=np.searchsorted(touched[transform.table_of(name).name], r.values))
        for name, r in rows.encoded.sparse.items()
    }
    return WorkingSet(
        checkpoint.run,
        # trials score encoded rows only: vocabularies would be dead weight in the object store
        transform.with_id_maps({}),
        Encoded(sparse, rows.encoded.dense),
        rows.labels,
        {name: checkpoint.table_rows(name, t).numpy() for name, t in touched.items()},
        {name: profiles[name].ranks()[t] for name, t in touched.items()},
        {key: value.numpy() for key, value in checkpoint.dense_state().items()},
    )


def trial_model(
    working: WorkingSet, resolved: Mapping[str, ResolvedTable] | None, centroids: Mapping[str, np.ndarray]
) -> CompressedModel:
    """The model that scores the sample as the compressed whole would; the fp32 model when nothing is resolved."""
    tables = []
    for name, info in working.transform.tables.items():
        bits = 32 if resolved is None else resolved[name].table.bits
        tables.append(PackedTable(name, len(working.weights[name]), info.embedding_dim, bits, info.features))
    block = torch.zeros(table_offsets(tables)[1], dtype=torch.uint8)
    for index, table in enumerate(tables):
        view = table_view(block, tables, index)
        view[:] = quantize_rows(torch.tensor(working.weights[table.name]), table.bits)
        if resolved is not None and resolved[table.name].pruned:
            dropped = torch.from_numpy(working.ranks[table.name] >= resolved[table.name].cut)
            view[dropped] = quantize_rows(torch.from_numpy(centroids[table.name])[None], table.bits)[0]
    dense = {key: torch.tensor(value) for key, value in working.dense.items()}
    return build_model(working.run, working.transform, tables, block, dense, "trial")


def score(model: CompressedModel, working: WorkingSet) -> np.ndarray:
    """Log-odds (N, T) of the sample."""
    return model.score_encoded(working.sample)
