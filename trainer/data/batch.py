"""What one step of training, one trial or one request works on.

Legend: B batch, I dense inputs, T tasks, F lookups: one a sparse feature, or one a position of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from trainer.data.encoded import Encoded, Ragged


@dataclass
class Batch(Pipelineable):
    """Model input, and what the loss is taken against.

    dense (B, I) float32; sparse: KeyedJaggedTensor of F lookups; labels (B, T) float32; teacher (B, T) float32, log-odds
    of a larger model; rows: of the global batch that this is a rank's share of; digest: of the share's row numbers
    (reader.row_digest).
    """

    dense: Tensor
    sparse: KeyedJaggedTensor
    labels: Tensor | None = None
    teacher: Tensor | None = None
    rows: int = 0
    digest: int = 0

    def __len__(self) -> int:
        return self.dense.shape[0]

    def to(self, device: torch.device, non_blocking: bool = True) -> Batch:
        """The same batch on `device`."""
        if device.type == "cpu" and self.dense.device.type == "cpu":
            return self
        return replace(
            self,
            dense=self.dense.to(device, non_blocking=non_blocking),
            sparse=self.sparse.to(device, non_blocking=non_blocking),
            labels=None if self.labels is None else self.labels.to(device, non_blocking=non_blocking),
            teacher=None if self.teacher is None else self.teacher.to(device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that a CUDA stream uses these tensors (the pipeline copies on a stream of its own)."""
        for part in (self.dense, self.sparse, self.labels, self.teacher):
            if part is not None:
                part.record_stream(stream)  # type: ignore[arg-type]

    def pin_memory(self) -> Batch:
        """The same batch in pinned host memory."""
        return replace(
            self,
            dense=self.dense.pin_memory(),
            sparse=self.sparse.pin_memory(),
            labels=None if self.labels is None else self.labels.pin_memory(),
            teacher=None if self.teacher is None else self.teacher.pin_memory(),
        )


def to_batch(
    encoded: Encoded, labels: np.ndarray | None = None, teacher: np.ndarray | None = None, rows: int | None = None
) -> Batch:
    """Pack encoded rows into a Batch; lookups are in the order of `encoded.sparse`, a sequence's positions in a row."""
    parts = [part for name, ragged in encoded.sparse.items() for part in lookups(name, ragged)]
    size = len(encoded)
    ones = np.ones(size, dtype=np.int32)
    weights = None
    if any(ragged.weights is not None for _, ragged in parts):
        weights = np.concatenate(
            [np.ones(len(r.values), np.float32) if r.weights is None else r.weights for _, r in parts]
        )
    kjt = KeyedJaggedTensor(
        keys=[name for name, _ in parts],
        values=torch.from_numpy(np.concatenate([r.values for _, r in parts])),
        weights=None if weights is None else torch.from_numpy(weights),
        lengths=torch.from_numpy(np.concatenate([ones if r.lengths is None else r.lengths for _, r in parts])),
        stride=size,
    )
    return Batch(
        torch.from_numpy(np.ascontiguousarray(encoded.dense)),
        kjt,
        None if labels is None else torch.from_numpy(np.ascontiguousarray(labels)),
        None if teacher is None else torch.from_numpy(np.ascontiguousarray(teacher)),
        size if rows is None else rows,
    )


def lookup_names(feature: str, positions: int | None) -> list[str]:
    """The names under which a feature's ids are looked up: its own, or one for each position of a sequence."""
    return [feature] if positions is None else [f"{feature}@{p}" for p in range(positions)]


def feature_of(lookup: str) -> str:
    """The feature that a lookup belongs to."""
    return lookup.partition("@")[0]


def lookups(name: str, ragged: Ragged) -> list[tuple[str, Ragged]]:
    """A feature's lookups and the ids of each. Position p of a sequence holds 0 or 1 ids a row: the p-th it has."""
    if ragged.positions is None:
        return [(name, ragged)]
    lengths = np.ones(len(ragged), dtype=np.int32) if ragged.lengths is None else ragged.lengths
    first = np.cumsum(lengths, dtype=np.int64) - lengths
    parts = []
    for position, key in enumerate(lookup_names(name, ragged.positions)):
        has = lengths > position
        parts.append((key, Ragged(ragged.values[first[has] + position], has.astype(np.int32))))
    return parts
