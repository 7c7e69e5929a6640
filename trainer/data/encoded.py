"""Rows after the transform, in numpy: what prepare writes and a request becomes. Imports no torch.

Legend: N rows, I dense inputs, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

SPARSE = "sparse."
WEIGHTS = "weights."


@dataclass(frozen=True)
class Ragged:
    """The ids of one sparse feature for N rows.

    `values` int64 (total,); `lengths` int32 (N,), or None when every row holds exactly one id; `weights` float32
    (total,): what each id counts for in the pooled sum, or None. `positions` is set where a row's ids are looked up
    one by one instead of pooled: the most a row may hold.
    """

    values: np.ndarray
    lengths: np.ndarray | None = None
    weights: np.ndarray | None = None
    positions: int | None = None

    def __len__(self) -> int:
        return len(self.values) if self.lengths is None else len(self.lengths)

    def take(self, index: np.ndarray) -> Ragged:
        """The rows at `index`, in that order."""
        if self.lengths is None:
            return Ragged(self.values.take(index), None, None, self.positions)
        starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        lengths = self.lengths[index]
        first = np.repeat(starts[index], lengths)
        within = np.arange(lengths.sum(), dtype=np.int64) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        weights = None if self.weights is None else self.weights[first + within]
        return Ragged(self.values[first + within], lengths, weights, self.positions)

    def repeat(self, times: int) -> Ragged:
        """A single row repeated `times` times (a user's ids beside each of K candidates)."""
        assert len(self) == 1, "repeat is for one row"
        lengths = None if self.lengths is None else np.repeat(self.lengths, times)
        weights = None if self.weights is None else np.tile(self.weights, times)
        return replace(self, values=np.tile(self.values, times), lengths=lengths, weights=weights)


@dataclass(frozen=True)
class Encoded:
    """Rows after the transform: table row ids by feature, and dense (N, I) float32."""

    sparse: dict[str, Ragged]
    dense: np.ndarray

    def __len__(self) -> int:
        return len(self.dense)

    def take(self, index: np.ndarray) -> Encoded:
        """The rows at `index`, in that order."""
        return Encoded({k: v.take(index) for k, v in self.sparse.items()}, self.dense[index])

    def repeat(self, times: int) -> Encoded:
        """A single row beside each of K candidates."""
        return Encoded({k: v.repeat(times) for k, v in self.sparse.items()}, np.repeat(self.dense, times, axis=0))


def concatenate(parts: Sequence[Encoded]) -> Encoded:
    """Rows of several parts with the same features, one after another."""
    if len(parts) == 1:
        return parts[0]
    sparse = {name: concatenate_ragged([p.sparse[name] for p in parts]) for name in parts[0].sparse}
    return Encoded(sparse, np.concatenate([p.dense for p in parts]))


def concatenate_ragged(parts: Sequence[Ragged]) -> Ragged:
    """Rows of several parts of one feature, one after another."""
    lengths = [p.lengths for p in parts if p.lengths is not None]
    weights = [p.weights for p in parts if p.weights is not None]
    return Ragged(
        np.concatenate([p.values for p in parts]),
        np.concatenate(lengths) if lengths else None,
        np.concatenate(weights) if weights else None,
        parts[0].positions,
    )


def to_columns(name: str, ragged: Ragged) -> dict[str, pa.Array]:
    """Rows of a feature as Arrow columns: sparse.NAME (int32, or lists of it) and, with weights, weights.NAME."""
    values = pa.array(ragged.values.astype(np.int32))
    if ragged.lengths is None:
        return {f"{SPARSE}{name}": values}
    offsets = pa.array(np.concatenate(([0], np.cumsum(ragged.lengths))).astype(np.int32))
    columns = {f"{SPARSE}{name}": pa.ListArray.from_arrays(offsets, values)}
    if ragged.weights is not None:
        columns[f"{WEIGHTS}{name}"] = pa.ListArray.from_arrays(offsets, pa.array(ragged.weights))
    return columns


def from_columns(table: pa.Table, name: str, positions: int | None = None) -> Ragged:
    """What `to_columns` made."""
    column = _whole(table[f"{SPARSE}{name}"])
    if not pa.types.is_list(column.type):
        return Ragged(column.to_numpy().astype(np.int64), positions=positions)
    weights = None
    if f"{WEIGHTS}{name}" in table.column_names:
        weights = _whole(table[f"{WEIGHTS}{name}"]).flatten().to_numpy().astype(np.float32)
    lengths = np.diff(column.offsets.to_numpy()).astype(np.int32)
    return Ragged(column.flatten().to_numpy().astype(np.int64), lengths, weights, positions)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
