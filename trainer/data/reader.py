"""Prepared Parquet -> Batch, in an order that depends on the seed and the epoch and on nothing else.

An epoch is a sequence of windows, each some row groups drawn from all over the split; rows are shuffled within a
window. A global batch is the next `batch_size` rows of that sequence and a rank takes its slice of it, so the same rows
make the same global batch whatever the number of workers, and (epoch, batch) is the whole position.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data import encoded
from trainer.data.batch import Batch, to_batch
from trainer.data.dataset import DENSE, GROUP, LABELS, Dataset, SplitName
from trainer.data.encoded import Encoded, from_columns
from trainer.data.transform import OOV_ROW, flat
from trainer.errors import DataError

WINDOW_ROWS = 262_144
PREFETCH_BATCHES = 4


@dataclass(frozen=True)
class Rows:
    """Some prepared rows in memory: encoded features, labels (N, T) float32, groups (N,) uint64 or None."""

    encoded: Encoded
    labels: np.ndarray
    groups: np.ndarray | None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> Rows:
        """The rows at `index`, in that order."""
        groups = None if self.groups is None else self.groups[index]
        return Rows(self.encoded.take(index), self.labels[index], groups)


@dataclass(frozen=True)
class Chunk:
    """One row group of one prepared file."""

    path: str
    row_group: int
    rows: int


class Reader:
    """Reads one split of a prepared data set.

    `oov_rate` of the ids are replaced by the out-of-vocabulary row (training only), so that this row is always trained.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: SplitName,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        oov_rate: float = 0.0,
    ) -> None:
        self.dataset = dataset
        self.split = split
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.oov_rate = oov_rate
        self.chunks = [Chunk(f.path, g, n) for f in dataset.files[split] for g, n in enumerate(f.row_groups)]
        self.rows = sum(c.rows for c in self.chunks)

    def num_batches(self) -> int:
        """Global batches of an epoch. A remainder smaller than the number of workers joins the batch before it."""
        whole, rest = divmod(self.rows, self.batch_size)
        return max(whole + (rest >= self.world_size), 1)

    def bounds(self, batch: int) -> tuple[int, int]:
        """First and past-last row of a global batch, in the epoch's order."""
        last = batch == self.num_batches() - 1
        return batch * self.batch_size, self.rows if last else (batch + 1) * self.batch_size

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Batch, int]]:
        """This rank's slices of global batches `start`.. of an epoch, each with the global batch's row count.

        Reading and packing run ahead in a thread; position counts what was yielded, never what was read.
        """
        for rows, size in _ahead(self._slices(epoch, start)):
            yield to_batch(rows.encoded, rows.labels), size

    def slices(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Rows, int]]:
        """As `batches`, but as rows in memory (numpy)."""
        return self._slices(epoch, start)

    def _slices(self, epoch: int, start: int) -> Iterator[tuple[Rows, int]]:
        windows = self._windows(epoch)
        at = 0  # first row of windows[0] in the epoch's order
        held: list[tuple[int, Rows]] = []
        for batch in range(start, self.num_batches()):
            begin, end = self.bounds(batch)
            size = end - begin
            mine = begin + size * self.rank // self.world_size, begin + size * (self.rank + 1) // self.world_size
            while windows and at < mine[1]:
                chunks = windows.pop(0)
                rows = sum(c.rows for c in chunks)
                if at + rows > mine[0]:
                    held.append((at, concatenate([read_chunk(self.dataset, c) for c in chunks])))
                at += rows
            held = [(first, rows) for first, rows in held if first + len(rows) > mine[0]]
            parts = [
                rows.take(self._order(first, len(rows), epoch)[max(mine[0] - first, 0) : mine[1] - first])
                for first, rows in held
                if first < mine[1]
            ]
            yield self._mask(parts[0] if len(parts) == 1 else concatenate(parts), epoch, batch), size

    def _windows(self, epoch: int) -> list[list[Chunk]]:
        order = list(range(len(self.chunks)))
        if self.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        windows: list[list[Chunk]] = [[]]
        for index in order:
            if sum(c.rows for c in windows[-1]) >= WINDOW_ROWS:
                windows.append([])
            windows[-1].append(self.chunks[index])
        return windows

    def _order(self, first: int, rows: int, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(rows)
        key = (first, rows, epoch)
        if getattr(self, "_order_key", None) != key:
            self._order_key = key
            self._order_value = np.random.default_rng((self.seed, epoch, first)).permutation(rows)
        return self._order_value

    def _mask(self, rows: Rows, epoch: int, batch: int) -> Rows:
        if self.oov_rate == 0.0:
            return rows
        rng = np.random.default_rng((self.seed, epoch, batch, self.rank, self.world_size))
        sparse = {}
        for name, ragged in rows.encoded.sparse.items():
            hit = rng.random(len(ragged.values), dtype=np.float32) < self.oov_rate
            sparse[name] = replace(ragged, values=np.where(hit, OOV_ROW, ragged.values))
        return Rows(Encoded(sparse, rows.encoded.dense), rows.labels, rows.groups)


def read_chunk(dataset: Dataset, chunk: Chunk) -> Rows:
    """Read one row group into memory."""
    try:
        with pq.ParquetFile(chunk.path) as file:
            table = file.read_row_group(chunk.row_group)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{chunk.path}: cannot be read: {str(error).splitlines()[0]}: prepare the data again") from None
    transform = dataset.transform
    sparse = {name: from_columns(table, name, transform.positions(name)) for name in transform.sparse}
    if DENSE in table.column_names:
        dense = flat(table[DENSE]).flatten().to_numpy().reshape(len(table), -1)
    else:
        dense = np.zeros((len(table), 0), dtype=np.float32)
    labels = flat(table[LABELS]).flatten().to_numpy().reshape(len(table), -1)
    groups = flat(table[GROUP]).to_numpy() if GROUP in table.column_names else None
    return Rows(Encoded(sparse, dense), labels, groups)


def concatenate(parts: list[Rows]) -> Rows:
    """Rows of several parts, in order."""
    if len(parts) == 1:
        return parts[0]
    groups = [p.groups for p in parts if p.groups is not None]
    return Rows(
        encoded.concatenate([p.encoded for p in parts]),
        np.concatenate([p.labels for p in parts]),
        np.concatenate(groups) if groups else None,
    )


def read_split(dataset: Dataset, split: SplitName, limit: int | None = None) -> Rows:
    """A whole split in its own order, or its first `limit` rows."""
    parts, rows = [], 0
    for file in dataset.files[split]:
        for group, size in enumerate(file.row_groups):
            if limit is not None and rows >= limit:
                break
            parts.append(read_chunk(dataset, Chunk(file.path, group, size)))
            rows += size
    whole = concatenate(parts)
    return whole if limit is None or len(whole) <= limit else whole.take(np.arange(limit))


def _ahead(source: Iterator[tuple[Rows, int]]) -> Iterator[tuple[Rows, int]]:
    """Run an iterator in a thread, a few items ahead; errors arrive where the item would have."""
    ready: queue.Queue = queue.Queue(maxsize=PREFETCH_BATCHES)
    stopped = threading.Event()

    def put(item: tuple[Rows, int] | BaseException | None) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False  # the consumer has left

    def run() -> None:
        try:
            for item in source:
                if not put(item):
                    return
            put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=run, daemon=True, name="slimrank-reader")
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
