"""Rows after the transform, in numpy: what prepare writes and a request becomes. Imports no torch.

Legend: N rows, I dense inputs, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Ragged:
    """The ids of one sparse feature for N rows.

    `values` int64 (total,); `lengths` int32 (N,), or None when every row holds exactly one id.
    """

    values: np.ndarray
    lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values) if self.lengths is None else len(self.lengths)

    def take(self, index: np.ndarray) -> Ragged:
        """The rows at `index`, in that order."""
        if self.lengths is None:
            return Ragged(self.values[index])
        starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        lengths = self.lengths[index]
        first = np.repeat(starts[index], lengths)
        within = np.arange(lengths.sum(), dtype=np.int64) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return Ragged(self.values[first + within], lengths)

    def repeat(self, times: int) -> Ragged:
        """A single row repeated `times` times (a user's ids beside each of K candidates)."""
        assert len(self) == 1, "repeat is for one row"
        values = np.tile(self.values, times)
        return Ragged(values, None if self.lengths is None else np.repeat(self.lengths, times))


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
    values = np.concatenate([p.values for p in parts])
    return Ragged(values, np.concatenate(lengths) if lengths else None)


def to_column(ragged: Ragged) -> pa.Array:
    """Rows of a feature as an Arrow column: int32, or lists of int32."""
    values = pa.array(ragged.values.astype(np.int32))
    if ragged.lengths is None:
        return values
    offsets = np.concatenate(([0], np.cumsum(ragged.lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def from_column(column: pa.Array) -> Ragged:
    """What `to_column` made."""
    if not pa.types.is_list(column.type):
        return Ragged(column.to_numpy().astype(np.int64))
    return Ragged(column.flatten().to_numpy().astype(np.int64), np.diff(column.offsets.to_numpy()).astype(np.int32))
