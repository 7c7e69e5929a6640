"""The item catalogue of an artifact: encoded item-side features, found by item id.

    items.arrow   key uint64 (sorted hash of the id), id, title, sparse.FEATURE (rows of the artifact), dense.NAME

Legend: K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.data.encoded import Encoded, from_columns, to_columns
from trainer.data.transform import Transform, flat, hash_ids, pick, read_arrow, write_arrow


def item_transform(transform: Transform) -> Transform:
    """The part of a transform that reads item-side features."""
    return pick(transform, [f for f in transform.schema.features if f.side == "item"])


def request_transform(transform: Transform) -> Transform:
    """The part of a transform that reads user-side and context features."""
    return pick(transform, [f for f in transform.schema.features if f.side != "item"])


@dataclass(frozen=True)
class Catalogue:
    """Items by the hash of their id. `encoded` holds item-side features only; titles are text or None."""

    keys: np.ndarray
    ids: list[object]
    titles: list[str | None]
    encoded: Encoded

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions (K,) of hashed ids (K,) uint64, and which of them are known (K,) bool."""
        if not len(self.keys):
            return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
        found = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return found, self.keys[found] == wanted


def write_catalogue(path: Path, items: pa.Table, transform: Transform) -> None:
    """Encode raw catalogue rows with an artifact's transform and write them in the order of their keys."""
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
    write_arrow(pa.table(columns), path)


def read_catalogue(path: Path, transform: Transform) -> Catalogue:
    """Open what `write_catalogue` wrote."""
    stored = read_arrow(path)
    part = item_transform(transform)
    sparse = {name: from_columns(stored, name, part.positions(name)) for name in part.sparse}
    dense = [stored[f"dense.{name}"].to_numpy() for name in part.dense_names]
    rows = len(stored)
    matrix = np.stack(dense, axis=1) if dense else np.zeros((rows, 0), dtype=np.float32)
    titles = stored["title"].to_pylist() if "title" in stored.column_names else [None] * rows
    return Catalogue(flat(stored["key"]).to_numpy(), stored["id"].to_pylist(), titles, Encoded(sparse, matrix))


def join_sides(transform: Transform, sides: list[tuple[Transform, Encoded]]) -> Encoded:
    """Features of several partial transforms side by side, in the order of the whole one. All have K rows."""
    sparse = {name: part.sparse[name] for _, part in sides for name in part.sparse}
    dense = {name: part.dense[:, i] for own, part in sides for i, name in enumerate(own.dense_names)}
    rows = len(sides[0][1])
    names = transform.dense_names
    matrix = np.stack([dense[n] for n in names], axis=1) if names else np.zeros((rows, 0), dtype=np.float32)
    return Encoded({name: sparse[name] for name in transform.sparse}, matrix)
