"""All tables of a model in one FBGEMM TBE over one block of bytes, mapped read-only where it comes from a file.

In: ids that are rows of these tables, already translated (index remapping inside the TBE is wrong for shared tables).
Out: pooled embeddings. One TBE has one pooling mode, so means are sums with weights of 1 / length.

Legend: B batch, F lookups (one a feature, or one a position of a sequence), D sum of their embedding dims.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
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
class Tier:
    """Rows that follow each other, at one number of bits a value."""

    rows: int
    bits: int


@dataclass(frozen=True)
class StoredTable:
    """One table as stored, and the features that read it.

    Its rows are the reserved ones, `centroids` shared ones, then the training rows that were kept, by rank, in as many
    `segments` as they have numbers of bits; tiers divide all of them. `dim` is what a lookup gives; `width` what a row
    holds: less than `dim` where a decoder (width, dim) widens what was looked up.
    """

    name: str
    dim: int
    width: int
    tiers: tuple[Tier, ...]
    features: tuple[str, ...]
    centroids: int = 0
    segments: int = 1

    @property
    def rows(self) -> int:
        """All rows that are stored."""
        return sum(tier.rows for tier in self.tiers)

    @property
    def bytes(self) -> int:
        """Bytes of its rows, scale and bias included, padding between tiers not."""
        return sum(tier.rows * row_bytes(self.width, tier.bits) for tier in self.tiers)

    @property
    def firsts(self) -> list[int]:
        """The first row of each tier."""
        return [0, *itertools.accumulate(tier.rows for tier in self.tiers[:-1])]


@dataclass(frozen=True)
class Piece:
    """Where one tier lies in the block: FBGEMM's physical table."""

    table: int
    tier: int
    first_byte: int
    bytes: int


def pieces_of(tables: Sequence[StoredTable]) -> tuple[list[Piece], int]:
    """All tiers of all tables in the order of the block, and the block's size in bytes."""
    pieces, at = [], 0
    for index, table in enumerate(tables):
        for number, tier in enumerate(table.tiers):
            size = tier.rows * row_bytes(table.width, tier.bits)
            pieces.append(Piece(index, number, at, size))
            at += -(-size // TABLE_ALIGNMENT) * TABLE_ALIGNMENT
    return pieces, at


def tier_views(block: Tensor, tables: Sequence[StoredTable]) -> list[list[Tensor]]:
    """The rows (N, W) uint8 of each tier of each table, as views of the block."""
    views: list[list[Tensor]] = [[] for _ in tables]
    for piece in pieces_of(tables)[0]:
        rows = tables[piece.table].tiers[piece.tier].rows
        view = block[piece.first_byte : piece.first_byte + piece.bytes]
        views[piece.table].append(view.view(rows, piece.bytes // rows))
    return views


def map_block(path: Path, size: int) -> Tensor:
    """Map a tables file read-only; its pages are shared between all processes of the node."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that nobody may write into it, as intended
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        # rows are read here and there: read-ahead (8 MiB on some machines) would read the disk empty for a few of them
        pages.madvise(mmap.MADV_RANDOM)
        return torch.frombuffer(pages, dtype=torch.uint8)


class Lookup:
    """Pooled embeddings of `lookups`, in that order, from one block of bytes.

    A lookup is a feature, or a position of a sequence feature. `mean` names the features whose bags are pooled by mean
    where ids bring no weights of their own. `decoders` (width, dim) fp32, by table, where rows are narrower.

    A table of several tiers is as many tables of the TBE: each gets all of a lookup's ids, those of other tiers as -1,
    which it skips, and the lookup is their sum.
    """

    def __init__(
        self,
        tables: Sequence[StoredTable],
        lookups: Sequence[str],
        mean: set[str],
        block: Tensor,
        decoders: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.tables = list(tables)
        self.names = list(lookups)
        self.mean_features = mean
        self.mean = [feature_of(name) in mean for name in lookups]
        self.block = block
        self.decoders = dict(decoders or {})
        for table in tables:
            shape = tuple(self.decoders[table.name].shape) if table.name in self.decoders else (table.dim, table.dim)
            assert shape == (table.width, table.dim), f"{table.name}: no decoder from {table.width} to {table.dim}"
        owner = {f: i for i, t in enumerate(tables) for f in t.features}
        self.table_of = [owner[feature_of(name)] for name in lookups]
        pieces, size = pieces_of(tables)
        pieces = [p for p in pieces if p.table in self.table_of]  # the TBE takes no table that nobody reads
        place = {(p.table, p.tier): i for i, p in enumerate(pieces)}
        # the first tier of each lookup, then the second of those that have one, ...
        spread = sorted(
            ((f, t, k) for f, t in enumerate(self.table_of) for k in range(len(tables[t].tiers))), key=lambda s: s[2]
        )
        self.split = len(spread) > len(lookups)
        self.lookup_of_P = torch.tensor([f for f, _, _ in spread])
        self.first_P = torch.tensor([tables[t].firsts[k] for _, t, k in spread], dtype=torch.int32)
        self.rows_P = torch.tensor([tables[t].tiers[k].rows for _, t, k in spread], dtype=torch.int32)
        self.rows_F = torch.tensor([tables[t].rows for t in self.table_of], dtype=torch.int32)
        self.widths = [tables[t].width for t in self.table_of]
        starts = np.cumsum([0, *self.widths])
        more = [np.arange(starts[f], starts[f + 1]) for f, _, k in spread if k]
        counts = [
            sum(self.widths[f] for f, _, k in spread if k == each) for each in range(1, 1 + max(k for *_, k in spread))
        ]
        self.columns = list(torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *more])).split(counts))
        level = logging.getLogger().level
        logging.getLogger().setLevel(logging.WARNING)  # the TBE logs its whole make-up on the root logger
        self.tbe = IntNBitTableBatchedEmbeddingBagsCodegen(
            [_spec(tables[p.table], p.tier) for p in pieces],
            feature_table_map=[place[t, k] for _, t, k in spread],
            pooling_mode=PoolingMode.SUM,
            device="cpu",
            bounds_check_mode=BoundsCheckMode.FATAL,
            output_dtype=SparseType.FP32,
            row_alignment=1,
        )
        logging.getLogger().setLevel(level)
        taken = sum(-(-p.bytes // TABLE_ALIGNMENT) * TABLE_ALIGNMENT for p in pieces)
        assert self.tbe.host_size == taken, "rows are not laid out as this FBGEMM reads them"
        assert size == block.numel(), f"block of {block.numel()} bytes, tables need {size}"
        self.tbe.weights_physical_offsets = [p.first_byte for p in pieces]
        self.tbe.initialize_logical_weights_placements_and_offsets()
        self.tbe.weights_host = block
        self.tbe.weight_initialized = True

    def __call__(self, sparse: KeyedJaggedTensor) -> Tensor:
        """Pooled embeddings (B, D) fp32. Raises: RuntimeError for an id that is no row of its table."""
        values = sparse.values()
        # the TBE takes negative ids for pruned ones, and the cast below would wrap large ones into a table
        if values.numel() and (int(values.min()) < 0 or int(values.max()) > INT32_MAX):
            raise RuntimeError(f"ids from {int(values.min())} to {int(values.max())} are not rows of the tables")
        if not self.split:
            return self._widened(self.tbe(values.int(), sparse.offsets().int(), self._weights(sparse)))
        return self._widened(self.tbe(*self._by_tier(sparse)))

    def _by_tier(self, sparse: KeyedJaggedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids, offsets and weights for the TBE: each lookup's once for each of its tiers."""
        lengths_FB = sparse.lengths().view(len(self.names), -1)
        values = sparse.values().int()
        if values.numel() == lengths_FB.numel() and bool((lengths_FB == 1).all()):
            return self._one_id_each(values.view_as(lengths_FB), self._weights(sparse))
        counts_F = lengths_FB.sum(1)
        lookup = torch.repeat_interleave(torch.arange(len(counts_F)), counts_F, output_size=values.numel())
        self._check_rows(values >= self.rows_F[lookup], lookup)
        starts_F = counts_F.cumsum(0) - counts_F
        counts_P = counts_F[self.lookup_of_P]
        moved_P = starts_F[self.lookup_of_P] - (counts_P.cumsum(0) - counts_P)
        total = int(counts_P.sum())
        piece = torch.repeat_interleave(torch.arange(len(counts_P)), counts_P, output_size=total)
        source = torch.arange(total) + moved_P[piece]
        local = values[source] - self.first_P[piece]
        inside = (local >= 0) & (local < self.rows_P[piece])
        offsets = torch.nn.functional.pad(lengths_FB[self.lookup_of_P].flatten().cumsum(0), (1, 0)).int()
        weights = self._weights(sparse)
        return torch.where(inside, local, -1), offsets, None if weights is None else weights[source]

    def _one_id_each(self, values_FB: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same for bags of one id, which most features have."""
        self._check_rows((values_FB >= self.rows_F[:, None]).any(1), torch.arange(len(values_FB)))
        local_PB = values_FB[self.lookup_of_P] - self.first_P[:, None]
        inside = (local_PB >= 0) & (local_PB < self.rows_P[:, None])
        spread = None if weights is None else weights.view_as(values_FB)[self.lookup_of_P].flatten()
        offsets = torch.arange(local_PB.numel() + 1, dtype=torch.int32)
        return torch.where(inside, local_PB, -1).flatten(), offsets, spread

    def _check_rows(self, beyond: Tensor, lookup: Tensor) -> None:
        if bool(beyond.any()):
            raise RuntimeError(f"{self.names[int(lookup[beyond.int().argmax()])]}: an id is not a row of its table")

    def _widened(self, pooled_BP: Tensor) -> Tensor:
        """Tiers of a lookup summed, narrow rows widened by their decoder: (B, D)."""
        summed = pooled_BP
        if self.split:
            first, *later = pooled_BP.split([sum(self.widths), *map(len, self.columns)], dim=1)
            summed = first.contiguous()
            for columns, tier in zip(self.columns, later, strict=True):
                summed.index_add_(1, columns, tier)
        if not self.decoders:
            return summed
        parts = []
        for table, part in zip(self.table_of, summed.split(self.widths, dim=1), strict=True):
            decoder = self.decoders.get(self.tables[table].name)
            parts.append(part if decoder is None else part @ decoder)
        return torch.cat(parts, dim=1)

    def _weights(self, sparse: KeyedJaggedTensor) -> Tensor | None:
        if sparse.weights_or_none() is not None:
            return sparse.weights()
        if not any(self.mean):
            return None
        lengths_FB = sparse.lengths().view(len(self.names), -1)
        mean_F1 = torch.tensor(self.mean).unsqueeze(1)
        share = torch.where(mean_F1, 1.0 / lengths_FB.clamp(min=1).float(), 1.0)
        return torch.repeat_interleave(share.flatten(), lengths_FB.flatten())

    def squared_weights(self, sparse: KeyedJaggedTensor) -> Tensor:
        """Sum (F, B) of the squares of what each id of a bag counts for."""
        lengths_FB = sparse.lengths().view(len(self.names), -1)
        weights = self._weights(sparse)
        if weights is None:
            return lengths_FB.float()
        bag = torch.repeat_interleave(torch.arange(lengths_FB.numel()), lengths_FB.flatten())
        return torch.zeros(lengths_FB.numel()).index_add_(0, bag, weights.square()).view_as(lengths_FB)

    def decoded(self, index: int, rows: Tensor) -> Tensor:
        """Values (N, D) fp32 of some stored rows (N,) of one table, in plain torch."""
        table = self.tables[index]
        values = torch.empty((len(rows), table.width))
        views = tier_views(self.block, self.tables)[index]
        for first, tier, view in zip(table.firsts, table.tiers, views, strict=True):
            own = (rows >= first) & (rows < first + tier.rows)
            values[own] = dequantize_rows(view[rows[own] - first], table.width, tier.bits)
        decoder = self.decoders.get(table.name)
        return values if decoder is None else values @ decoder

    def oracle(self, sparse: KeyedJaggedTensor) -> Tensor:
        """The plain-torch twin: decode the wanted rows, pool with embedding_bag."""
        parts = []
        for index, name in enumerate(self.names):
            jagged = sparse[name]
            wanted, local = torch.unique(jagged.values().long(), return_inverse=True)
            values = self.decoded(self.table_of[index], wanted)
            weights = jagged.weights_or_none()
            mode = "mean" if self.mean[index] and weights is None else "sum"
            offsets = jagged.offsets()[:-1].long()
            parts.append(
                torch.nn.functional.embedding_bag(local.long(), values, offsets, mode=mode, per_sample_weights=weights)
            )
        return torch.cat(parts, dim=1)


def _summed(tiers: Tensor) -> Tensor:
    """Tiers (..., tiers, width) added one after the other: one that a sample never touches changes no digit."""
    return reduce(torch.add, tiers.unbind(-2))


def _spec(table: StoredTable, tier: int) -> tuple[str, int, int, SparseType, EmbeddingLocation]:
    part = table.tiers[tier]
    return f"{table.name}#{tier}", part.rows, table.width, _TYPES[part.bits], EmbeddingLocation.HOST
