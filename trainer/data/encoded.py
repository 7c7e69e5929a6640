"""Rows after the transform, in numpy: what prepare writes and a request becomes. Imports no torch.

Legend: N rows, I dense inputs, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
        starts = np.concatenate(([0], np.cumsum(self.lengths[:-1], dtype=np.int64))) if len(self.lengths) else []
        lengths = self.lengths[index]
        first = np.repeat(np.asarray(starts, dtype=np.int64)[index], lengths)
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
