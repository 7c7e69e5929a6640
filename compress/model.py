"""The one scoring path: trials, evaluation, golden requests and serving all come through here.

Legend: B batch, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import nn

from compress.catalogue import item_transform, join_sides, request_transform
from compress.dense import DenseRuntime, make_runtime, sides_of
from compress.lookup import Lookup, StoredTable, Tier, pieces_of, tier_views
from compress.methods.codec import quantize_rows
from compress.methods.dense import DensePlan, simplify
from compress.onnx_head import OnnxHead, head_of
from trainer.checkpoint import Checkpoint
from trainer.config import MetricsConfig, RunConfig
from trainer.data.batch import Batch, to_batch
from trainer.data.dataset import Dataset, SplitName
from trainer.data.encoded import Encoded
from trainer.data.reader import Reader
from trainer.data.schema import encodings
from trainer.data.transform import RESERVED_ROWS, IdMap, TableInfo, Transform
from trainer.errors import DataError
from trainer.models import lookups_of, pooling_of

SCORE_ROWS = 4096  # rows scored at a time


@dataclass
class CompressedModel:
    """Tables behind a lookup, and a head: what scores. Its transform's ids are rows of its own tables."""

    transform: Transform
    lookup: Lookup
    head: nn.Module
    version: str
    metrics: MetricsConfig = MetricsConfig()  # what its run counts in evaluations

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of the logits."""
        return [t.name for t in self.transform.schema.tasks]

    @torch.inference_mode()
    def logits(self, batch: Batch) -> np.ndarray:
        """Log-odds (B, T) float32."""
        return self.head(batch.dense, self.lookup(batch.sparse)).numpy()

    @torch.inference_mode()
    def oracle_logits(self, batch: Batch) -> np.ndarray:
        """The same from the plain-torch lookup."""
        return self.head(batch.dense, self.lookup.oracle(batch.sparse)).numpy()

    @cached_property
    def ranking(self) -> Ranking | None:
        """How one request's candidates are scored with the request's part computed once; None where nothing is shared.

        Made on first use, which takes about a second.
        """
        return None if isinstance(self.head, OnnxHead) else make_ranking(self)

    def rank(self, request: Encoded, items: Encoded) -> np.ndarray:
        """Log-odds (K, T) of one request (1 row of user and context features) and its K candidates' features.

        Equal to `logits` of the request repeated beside each candidate, up to the order of fp32 sums.
        """
        if self.ranking is None:
            sides = [
                (request_transform(self.transform), request.repeat(len(items))),
                (item_transform(self.transform), items),
            ]
            return self.logits(to_batch(join_sides(self.transform, sides)))
        return self.ranking(to_batch(request), to_batch(items))

    def score_encoded(self, encoded: Encoded) -> np.ndarray:
        """Log-odds (N, T) of encoded rows, SCORE_ROWS at a time."""
        parts = [
            self.logits(to_batch(encoded.take(np.arange(at, min(at + SCORE_ROWS, len(encoded))))))
            for at in range(0, len(encoded), SCORE_ROWS)
        ]
        return np.concatenate(parts)


def build_model(
    run: RunConfig,
    transform: Transform,
    tables: list[StoredTable],
    block: torch.Tensor,
    head: nn.Module,
    version: str,
    decoders: Mapping[str, torch.Tensor] | None = None,
) -> CompressedModel:
    """Put tables and head together. `transform` maps ids to the rows of `tables`."""
    mean = {name for name in transform.sparse if pooling_of(transform, name) == "mean"}
    lookup = Lookup(tables, lookups_of(transform, list(transform.sparse)), mean, block, decoders)
    return CompressedModel(transform, lookup, head, version, run.train.metrics)


def model_of_checkpoint(checkpoint: Checkpoint, transform: Transform) -> CompressedModel:
    """The uncompressed model: fp32 rows, all of them, through the same lookup and head. Holds the tables in memory."""
    tables = [whole_table(t, t.num_embeddings) for t in transform.tables.values()]
    block = torch.zeros(pieces_of(tables)[1], dtype=torch.uint8)
    for table, (view,) in zip(tables, tier_views(block, tables), strict=True):
        for first, rows in checkpoint.table_chunks(table.name):
            view[first : first + len(rows)] = quantize_rows(rows, 32)
    head = head_of(checkpoint.run, transform, checkpoint.dense_state())
    return build_model(checkpoint.run, transform, tables, block, head, checkpoint.version)


@dataclass
class Ranking:
    """Lookups of the request's features and of the items', and the head that computes the request's part once."""

    request: Lookup
    items: Lookup
    runtime: DenseRuntime

    @torch.inference_mode()
    def __call__(self, request: Batch, items: Batch) -> np.ndarray:
        """Log-odds (K, T) float32 of one request and K candidates."""
        looked_up = self.request(request.sparse), self.items(items.sparse)
        return self.runtime.rank(request.dense, looked_up[0], items.dense, looked_up[1]).numpy()


def make_ranking(model: CompressedModel) -> Ranking | None:
    """The two sides of a model over its tables; None where one of them looks nothing up."""
    parts = [part(model.transform) for part in (request_transform, item_transform)]
    names = [lookups_of(model.transform, list(part.sparse)) for part in parts]
    if not all(names):
        return None
    lookup = model.lookup
    request, items = (Lookup(lookup.tables, n, lookup.mean_features, lookup.block, lookup.decoders) for n in names)
    runtime = model.head
    if not isinstance(runtime, DenseRuntime):
        runtime = make_runtime(simplify(model.head), sides_of(model.transform), DensePlan(backend="torch"))
    return Ranking(request, items, runtime)


def whole_table(info: TableInfo, rows: int) -> StoredTable:
    """A table of fp32 rows, none of them cut."""
    return StoredTable(info.name, info.embedding_dim, info.embedding_dim, (Tier(rows, 32),), info.features)


def translation(trained: IdMap, own: IdMap, num_embeddings: int) -> np.ndarray:
    """For each training row (num_embeddings,) the row of a model whose ids go through `own`."""
    if trained.keys is None:
        return np.arange(num_embeddings) if own.remap is None else own.remap.astype(np.int64)
    reserved = [own.row(row) for row in range(RESERVED_ROWS)]
    return np.concatenate([np.asarray(reserved, dtype=np.int64), own.rows(trained.keys_by_row())])


def score_split(model: CompressedModel, dataset: Dataset, split: SplitName) -> tuple[np.ndarray, np.ndarray]:
    """Labels and log-odds (N, T) of a prepared split.

    Raises: DataError when the data was not encoded by the transform the model was trained with.
    """
    check_same_transform(model.transform, dataset)
    row_maps = _row_maps(model, dataset)
    labels, logits = [], []
    for rows, _ in Reader(dataset, split, SCORE_ROWS).slices():
        labels.append(rows.labels)
        logits.append(model.logits(to_batch(_translate(row_maps, dataset, rows.encoded))))
    return np.concatenate(labels), np.concatenate(logits)


def translate_rows(model: CompressedModel, dataset: Dataset, encoded: Encoded) -> Encoded:
    """Prepared rows with their training rows turned into the model's."""
    return _translate(_row_maps(model, dataset), dataset, encoded)


def _row_maps(model: CompressedModel, dataset: Dataset) -> dict[str, np.ndarray]:
    return {
        name: translation(dataset.transform.id_maps[name], model.transform.id_maps[name], table.num_embeddings)
        for name, table in dataset.transform.tables.items()
    }


def _translate(row_maps: dict[str, np.ndarray], dataset: Dataset, encoded: Encoded) -> Encoded:
    sparse = {
        name: replace(r, values=row_maps[dataset.transform.table_of(name).name][r.values])
        for name, r in encoded.sparse.items()
    }
    return Encoded(sparse, encoded.dense)


def check_same_transform(transform: Transform, dataset: Dataset) -> None:
    """Raises: DataError unless numbers and features are encoded alike."""
    other = dataset.transform
    same = (
        encodings(transform.schema.features) == encodings(other.schema.features)
        and [t.model_dump() for t in transform.schema.tasks] == [t.model_dump() for t in other.schema.tasks]
        and transform.numerics == other.numerics
    )
    if not same:
        raise DataError(f"{dataset.folder}: not the prepared data this model was trained on: give that one to --data")
