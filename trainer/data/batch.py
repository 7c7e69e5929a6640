"""What one step of training, one trial or one request works on.

Legend: B batch, I dense inputs, T tasks, F sparse features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.data.encoded import Encoded


@dataclass
class Batch:
    """Model input. dense (B, I) float32; sparse: KeyedJaggedTensor of F features; labels (B, T) float32 or None."""

    dense: Tensor
    sparse: KeyedJaggedTensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return self.dense.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return Batch(self.dense.to(device, non_blocking=True), self.sparse.to(device, non_blocking=True), labels)


def to_batch(encoded: Encoded, labels: np.ndarray | None = None) -> Batch:
    """Pack encoded rows into a Batch; feature order is the order of `encoded.sparse`."""
    rows = len(encoded)
    parts = list(encoded.sparse.values())
    ones = np.ones(rows, dtype=np.int32)
    values = np.concatenate([p.values for p in parts])
    lengths = np.concatenate([ones if p.lengths is None else p.lengths for p in parts])
    kjt = KeyedJaggedTensor(
        keys=list(encoded.sparse),
        values=torch.from_numpy(values),
        lengths=torch.from_numpy(lengths),
        stride=rows,
    )
    return Batch(
        torch.from_numpy(np.ascontiguousarray(encoded.dense)),
        kjt,
        None if labels is None else torch.from_numpy(np.ascontiguousarray(labels)),
    )
