"""The item catalogue of an artifact: encoded item-side features, found by item id.

    items.arrow   key uint64 (sorted hash of the id), id, title, sparse.FEATURE (rows of the artifact), dense.NAME

All of it stays in the mapped file: a request copies the rows that it asks for, and replicas share the rest.

Legend: N items, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from trainer.data.encoded import SPARSE, WEIGHTS, Encoded, Ragged, to_columns
from trainer.data.transform import Transform, flat, hash_ids, pick, read_arrow, write_arrow

VERSION_KEY = b"slimrank.artifact"  # schema metadata of a catalogue that lies beside its artifact: whose rows it names


def item_transform(transform: Transform) -> Transform:
    """The part of a transform that reads item-side features."""
    return pick(transform, [f for f in transform.schema.features if f.side == "item"])


def request_transform(transform: Transform) -> Transform:
    """The part of a transform that reads user-side and context features."""
    return pick(transform, [f for f in transform.schema.features if f.side != "item"])


class Values(Sequence[Any]):
    """An Arrow column read one value at a time, so that a million ids are no million Python objects."""

    def __init__(self, array: pa.Array) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, at: int) -> Any: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Any]: ...
    def __getitem__(self, at: int | slice) -> Any:
        return self.array[at].to_pylist() if isinstance(at, slice) else self.array[int(at)].as_py()


@dataclass(frozen=True)
class ItemIds:
    """The table rows of one sparse feature for all items, as they lie in the file.

    `values` int32 (total,); item n has those from `offsets[n]` to `offsets[n + 1]`, or without offsets (N + 1,) the
    n-th; `weights` float32 (total,), or None; `positions` as in Ragged.
    """

    values: np.ndarray
    offsets: np.ndarray | None = None
    weights: np.ndarray | None = None
    positions: int | None = None

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    def take(self, index: np.ndarray) -> Ragged:
        """The rows of the items at `index` (K,), in that order: a copy of these alone."""
        if self.offsets is None:
            return Ragged(self.values[index].astype(np.int64), positions=self.positions)
        first = self.offsets[index].astype(np.int64)
        lengths = self.offsets[index + 1] - first
        before = np.cumsum(lengths) - lengths
        at = np.arange(lengths.sum()) + np.repeat(first - before, lengths)
        weights = None if self.weights is None else self.weights[at]
        return Ragged(self.values[at].astype(np.int64), lengths.astype(np.int32), weights, self.positions)


@dataclass(frozen=True)
class Catalogue:
    """Items by the hash of their id. `sparse` and `dense` hold item-side features only; a title may be None.

    Shapes: keys (N,) uint64, each column of dense (N,) float32.
    """

    keys: np.ndarray
    ids: Sequence[Any]
    titles: Sequence[str | None]
    sparse: dict[str, ItemIds]
    dense: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions (K,) of hashed ids (K,) uint64, and which of them are known (K,) bool."""
        if not len(self.keys):
            return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
        found = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return found, self.keys[found] == wanted

    def take(self, index: np.ndarray) -> Encoded:
        """The features of the items at `index` (K,), in that order."""
        dense = np.empty((len(index), len(self.dense)), dtype=np.float32)
        for column, values in enumerate(self.dense):
            dense[:, column] = values[index]
        return Encoded({name: ids.take(index) for name, ids in self.sparse.items()}, dense)


def write_catalogue(path: Path, items: pa.Table, transform: Transform, version: str | None = None) -> None:
    """Encode raw catalogue rows with an artifact's transform and write them in the order of their keys.

    `version`: of the artifact, where the file is to lie beside it; the rows that it names are that artifact's own.
    """
    schema = transform.schema
    assert schema.ids.item is not None, "a catalogue needs an item id"
    keys, _ = hash_ids(flat(items[schema.ids.item]), schema.ids.item)
    order = np.argsort(keys, kind="stable")
    items, keys = items.take(pa.array(order)), keys[order]
    part = item_transform(transform)
    encoded = part.encode(items)
    columns: dict[str, pa.Array] = {"key": pa.array(keys), "id": flat(items[schema.ids.item])}
    if schema.title is not None:
        columns["title"] = flat(items[schema.title]).cast(pa.string())
    for name, ragged in encoded.sparse.items():
        columns |= to_columns(name, ragged)
    for index, name in enumerate(part.dense_names):
        columns[f"dense.{name}"] = pa.array(np.ascontiguousarray(encoded.dense[:, index]))
    table = pa.table(columns)
    write_arrow(table if version is None else table.replace_schema_metadata({VERSION_KEY: version}), path)


def read_catalogue(path: Path, transform: Transform) -> Catalogue:
    """Map what `write_catalogue` wrote. Raises: DataError, LookupError or ValueError when it wrote something else."""
    stored = read_arrow(path)
    part = item_transform(transform)
    sparse = {name: _item_ids(stored, name, part.positions(name)) for name in part.sparse}
    dense = [mapped(stored[f"dense.{name}"]).to_numpy() for name in part.dense_names]
    titles = mapped(stored["title"]) if "title" in stored.column_names else pa.nulls(len(stored))
    return Catalogue(mapped(stored["key"]).to_numpy(), Values(mapped(stored["id"])), Values(titles), sparse, dense)


def mapped(column: pa.ChunkedArray) -> pa.Array:
    """A column of a mapped file as it lies there; joining even a single chunk would copy it."""
    return column.chunk(0) if column.num_chunks == 1 else flat(column)


def _item_ids(stored: pa.Table, name: str, positions: int | None) -> ItemIds:
    column = mapped(stored[f"{SPARSE}{name}"])
    if not pa.types.is_list(column.type):
        return ItemIds(column.to_numpy(), positions=positions)
    weights = None
    if f"{WEIGHTS}{name}" in stored.column_names:
        weights = mapped(stored[f"{WEIGHTS}{name}"]).values.to_numpy()
    return ItemIds(column.values.to_numpy(), column.offsets.to_numpy(), weights, positions)


def join_sides(transform: Transform, sides: list[tuple[Transform, Encoded]]) -> Encoded:
    """Features of several partial transforms side by side, in the order of the whole one. All have K rows."""
    sparse = {name: part.sparse[name] for _, part in sides for name in part.sparse}
    dense = {name: part.dense[:, i] for own, part in sides for i, name in enumerate(own.dense_names)}
    rows = len(sides[0][1])
    names = transform.dense_names
    matrix = np.stack([dense[n] for n in names], axis=1) if names else np.zeros((rows, 0), dtype=np.float32)
    return Encoded({name: sparse[name] for name in transform.sparse}, matrix)
