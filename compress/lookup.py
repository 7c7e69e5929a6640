"""All tables of a model in one FBGEMM TBE over one block of bytes, mapped read-only where it comes from a file.

In: ids that are rows of these tables, already translated (index remapping inside the TBE is wrong for shared tables).
Out: pooled embeddings. One TBE has one pooling mode, so means are sums with weights of 1 / length.

Legend: B batch, F lookups (one a feature, or one a position of a sequence), D sum of their embedding dims.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from compress.methods.codec import dequantize_rows, row_bytes
from trainer.data.batch import feature_of

INT32_MAX = 2**31 - 1
TABLE_ALIGNMENT = 128  # FBGEMM aligns each table to a cache line pair
_TYPES = {
    2: SparseType.INT2,
    4: SparseType.INT4,
    8: SparseType.INT8,
    16: SparseType.FP16,
    32: SparseType.FP32,
}


@dataclass(frozen=True)
class PackedTable:
    """One table as stored: rows (the centroid included), dim, bits, and the features that read it."""

    name: str
    rows: int
    dim: int
    bits: int
    features: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its rows, scale and bias included."""
        return self.rows * row_bytes(self.dim, self.bits)


def table_offsets(tables: Sequence[PackedTable]) -> tuple[list[int], int]:
    """First byte of each table, and the size of the block."""
    offsets, at = [], 0
    for table in tables:
        offsets.append(at)
        at += -(-table.bytes // TABLE_ALIGNMENT) * TABLE_ALIGNMENT
    return offsets, at


def table_view(block: Tensor, tables: Sequence[PackedTable], index: int) -> Tensor:
    """The rows (N, W) uint8 of one table, as a view of the block."""
    first = table_offsets(tables)[0][index]
    table = tables[index]
    return block[first : first + table.bytes].view(table.rows, -1)


def map_block(path: Path, size: int) -> Tensor:
    """Map a tables file read-only; its pages are shared between all processes of the node."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that nobody may write into it, as intended
        return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="r", shape=(size,)))


class Lookup:
    """Pooled embeddings of `lookups`, in that order, from one block of bytes.

    A lookup is a feature, or a position of a sequence feature. `mean` names the features whose bags are pooled by mean where ids bring no weights of their own.
    """

    def __init__(self, tables: Sequence[PackedTable], lookups: Sequence[str], mean: set[str], block: Tensor) -> None:
        self.tables = list(tables)
        self.names = list(lookups)
        self.mean = [feature_of(name) in mean for name in lookups]
        self.block = block
        owner = {f: i for i, t in enumerate(tables) for f in t.features}
        self.table_of = [owner[feature_of(name)] for name in lookups]
        level = logging.getLogger().level
        logging.getLogger().setLevel(logging.WARNING)  # the TBE logs its whole make-up on the root logger
        self.tbe = IntNBitTableBatchedEmbeddingBagsCodegen(
            [(t.name, t.rows, t.dim, _TYPES[t.bits], EmbeddingLocation.HOST) for t in tables],
            feature_table_map=self.table_of,
            pooling_mode=PoolingMode.SUM,
            device="cpu",
            bounds_check_mode=BoundsCheckMode.FATAL,
            output_dtype=SparseType.FP32,
            row_alignment=1,
        )
        logging.getLogger().setLevel(level)
        offsets, size = table_offsets(tables)
        assert self.tbe.weights_physical_offsets == offsets, "the block is not laid out as this FBGEMM reads it"
        assert self.tbe.host_size == size == block.numel(), f"block of {block.numel()} bytes, tables need {size}"
        self.tbe.initialize_logical_weights_placements_and_offsets()
        self.tbe.weights_host = block
        self.tbe.weight_initialized = True

    def __call__(self, sparse: KeyedJaggedTensor) -> Tensor:
        """Pooled embeddings (B, D) fp32. Raises: RuntimeError for an id that is no row of its table."""
        values = sparse.values()
        # the TBE takes negative ids for pruned ones, and the cast below would wrap large ones into a table
        if values.numel() and (int(values.min()) < 0 or int(values.max()) > INT32_MAX):
            raise RuntimeError(f"ids from {int(values.min())} to {int(values.max())} are not rows of the tables")
        return self.tbe(values.int(), sparse.offsets().int(), self._weights(sparse))

    def _weights(self, sparse: KeyedJaggedTensor) -> Tensor | None:
        if sparse.weights_or_none() is not None:
            return sparse.weights()
        if not any(self.mean):
            return None
        lengths_FB = sparse.lengths().view(len(self.names), -1)
        mean_F1 = torch.tensor(self.mean).unsqueeze(1)
        share = torch.where(mean_F1, 1.0 / lengths_FB.clamp(min=1).float(), 1.0)
        return torch.repeat_interleave(share.flatten(), lengths_FB.flatten())

    def oracle(self, sparse: KeyedJaggedTensor) -> Tensor:
        """The plain-torch twin: decode the wanted rows, pool with embedding_bag."""
        parts = []
        for index, name in enumerate(self.names):
            table = self.tables[self.table_of[index]]
            rows = table_view(self.block, self.tables, self.table_of[index])
            jagged = sparse[name]
            wanted, local = torch.unique(jagged.values(), return_inverse=True)
            values = dequantize_rows(rows[wanted.long()], table.dim, table.bits)
            weights = jagged.weights_or_none()
            mode = "mean" if self.mean[index] and weights is None else "sum"
            offsets = jagged.offsets()[:-1].long()
            parts.append(
                torch.nn.functional.embedding_bag(local.long(), values, offsets, mode=mode, per_sample_weights=weights)
            )
        return torch.cat(parts, dim=1)
