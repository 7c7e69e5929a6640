"""Tensors of a safetensors file, any rows of them: mapped from this machine's disk, or fetched in byte ranges.

A storage is asked for what is needed and no more than a gap beyond it, several requests at a time, and each answer goes
straight to its place in the result: memory is the result's and PIECE_BYTES a request, whatever the size of the table.

Legend: N rows of the tensor, M rows asked for, B bytes of a row.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import CheckpointError
from trainer.storage import PIECE_BYTES, Location, RemotePath, in_parallel, storage_step

# Bytes between two wanted rows that cost less to read than another request: 20 ms to the first byte at 50 MiB/s, the
# rule of pyarrow.CacheOptions.from_network_metrics with the figures of S3 within a region.
GAP_BYTES = 1 << 20
HEADER_BYTES = 100 << 20  # the safetensors format's own limit
DTYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}


class TensorFile(Protocol):
    """What a checkpoint needs of one of its files."""

    def whole(self, name: str) -> Tensor:
        """A tensor of any shape."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first..last."""

    def take(self, name: str, rows_M: np.ndarray) -> Tensor:
        """Chosen rows (sorted, distinct)."""


def open_tensors(path: Location) -> TensorFile:
    """Open a safetensors file. Raises: CheckpointError or StorageError naming it when it cannot be read."""
    try:
        return MappedTensors(path) if isinstance(path, Path) else RangedTensors(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


class MappedTensors:
    """A file of this machine: pages are read as they are touched."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="pt")

    def whole(self, name: str) -> Tensor:
        """A tensor of any shape."""
        return self._file.get_tensor(name)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first..last."""
        return self._file.get_slice(name)[first:last]

    def take(self, name: str, rows_M: np.ndarray) -> Tensor:
        """Chosen rows."""
        return self._file.get_tensor(name)[torch.from_numpy(rows_M)]  # mapped, not read


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class RangedTensors:
    """A file in a storage: its header is read once, tensors in byte ranges.

    Raises: CheckpointError when its header is not safetensors', or promises more than the file holds.
    """

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        self._file = path.open()
        with storage_step(path, "header cannot be read"):
            size = self._file.size()
            length = int.from_bytes(self._file.read_at(8, 0), "little")
            header = self._file.read_at(length, 8) if length <= min(HEADER_BYTES, size - 8) else b""
        try:
            self._stored = parse_header(header, size)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error}): upload it again") from None

    def whole(self, name: str) -> Tensor:
        """A tensor of any shape."""
        stored = self._stored[name]
        return self._read(stored, stored.begin, stored.shape)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first..last."""
        stored = self._stored[name]
        return self._read(stored, stored.begin + first * stored.row_bytes, (last - first, *stored.shape[1:]))

    def take(self, name: str, rows_M: np.ndarray) -> Tensor:
        """Chosen rows, in as few requests as GAP_BYTES and PIECE_BYTES allow."""
        stored = self._stored[name]
        out = torch.empty((len(rows_M), *stored.shape[1:]), dtype=stored.dtype)
        out_MB = out.view(-1).view(torch.uint8).numpy().reshape(len(rows_M), stored.row_bytes)

        def fetch(part: slice) -> None:
            rows = rows_M[part] - rows_M[part.start]
            length = (int(rows[-1]) + 1) * stored.row_bytes
            data = self._at(stored.begin + int(rows_M[part.start]) * stored.row_bytes, length)
            out_MB[part] = np.frombuffer(data, dtype=np.uint8).reshape(-1, stored.row_bytes)[rows]

        in_parallel(fetch, row_ranges(rows_M, stored.row_bytes))
        return out

    def _read(self, stored: Stored, begin: int, shape: tuple[int, ...]) -> Tensor:
        out = torch.empty(shape, dtype=stored.dtype)
        view = out.view(-1).view(torch.uint8).numpy()

        def fetch(at: int) -> None:
            length = min(PIECE_BYTES, len(view) - at)
            view[at : at + length] = np.frombuffer(self._at(begin + at, length), dtype=np.uint8)

        in_parallel(fetch, range(0, len(view), PIECE_BYTES))
        return out

    def _at(self, offset: int, length: int) -> bytes:
        with storage_step(self.path, f"bytes {offset:,} to {offset + length:,} cannot be read"):
            data = self._file.read_at(length, offset)
        if len(data) != length:
            raise CheckpointError(f"{self.path}: cut short since it was opened: upload it again")
        return data


def parse_header(header: bytes, size: int) -> dict[str, Stored]:
    """Where each tensor of a safetensors file of `size` bytes lies.

    Raises: ValueError, KeyError or TypeError when the header is none, or does not fit the file.
    """
    stored = {}
    for name, entry in json.loads(header).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        stored[name] = Stored(DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + len(header) + begin)
        if not (0 <= begin <= end <= size - 8 - len(header) and end - begin == stored[name].bytes):
            raise ValueError(f"{name} lies outside it")
    return stored


def row_ranges(rows_M: np.ndarray, row_bytes: int) -> list[slice]:
    """Runs of sorted rows that one request covers: gaps of at most GAP_BYTES, spans of at most about PIECE_BYTES."""
    if not len(rows_M):
        return []
    apart = np.diff(rows_M, prepend=rows_M[0] - 1) - 1
    begins = (apart * row_bytes > GAP_BYTES).astype(np.int64)
    begins[0] = 1
    run_first = rows_M[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    piece = (rows_M - run_first) * row_bytes // PIECE_BYTES
    cuts = np.flatnonzero((begins == 1) | (np.diff(piece, prepend=piece[0]) != 0))
    return [slice(int(a), int(b)) for a, b in zip(cuts, [*cuts[1:], len(rows_M)], strict=True)]
