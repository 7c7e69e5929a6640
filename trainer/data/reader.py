"""Prepared Parquet -> Batch, in an order that depends on the seed, the epoch and the lanes, not on the workers.

An epoch lays the split's row groups in one line, shuffled by (seed, epoch), and cuts the line into `lanes` streams of
equal rows. Global batch b of B takes from each lane, of n rows, its rows b*n/B to (b+1)*n/B, lane after lane; so all
lanes end with the last batch. Rank r of W reads lanes r*L//W to (r+1)*L//W and decodes no other rank's row groups, but
for one that lies across the cut between them. The same rows make the same global batch whatever the number of workers,
and (epoch, batch) is the whole position. Rows are shuffled within a lane's window of some row groups; a split that fits
in memory is shuffled as one, and its lanes are runs of that order.

Legend: N rows, T tasks, L lanes, W ranks, B batches.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data import encoded
from trainer.data.batch import Batch, to_batch
from trainer.data.dataset import DENSE, GROUP, LABELS, Dataset, SplitName
from trainer.data.digest import row_digest
from trainer.data.encoded import Encoded, Ragged, from_columns
from trainer.data.transform import OOV_ROW, flat
from trainer.errors import ConfigError, DataError
from trainer.storage import Location, open_parquet, reading

LANES = 12  # streams of a shuffled epoch: 1, 2, 3, 4, 6 and 12 ranks read equal shares
WINDOW_ROWS = 393_216  # held by all lanes together, that rows are shuffled within; two row groups a lane of twelve
WHOLE_ROWS = WINDOW_ROWS  # a split of so many rows is shuffled whole: each rank reads all of it, once
PREFETCH_BATCHES = 4
TEACHER = "logits"


@dataclass(frozen=True)
class Rows:
    """Some prepared rows in memory.

    Encoded features; labels (N, T) float32; groups (N,) uint64 or None; index (N,) int64, the row's number in the
    split; teacher (N, T) float32 log-odds, where the reader was given any.
    """

    encoded: Encoded
    labels: np.ndarray
    groups: np.ndarray | None
    index: np.ndarray
    teacher: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> Rows:
        """The rows at `index`, in that order."""
        return Rows(
            self.encoded.take(index),
            self.labels[index],
            None if self.groups is None else self.groups[index],
            self.index[index],
            None if self.teacher is None else self.teacher[index],
        )


@dataclass(frozen=True)
class Chunk:
    """One row group of one prepared file; `first` is the number in the split of its first row."""

    path: Location
    row_group: int
    rows: int
    first: int = 0


def chunks_of(dataset: Dataset, split: SplitName) -> list[Chunk]:
    """The row groups of a split in its own order."""
    chunks: list[Chunk] = []
    first = 0
    for file in dataset.files[split]:
        for group, rows in enumerate(file.row_groups):
            chunks.append(Chunk(file.path, group, rows, first))
            first += rows
    return chunks


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a chunk."""

    chunk: Chunk
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Rows of the piece."""
        return self.stop - self.start


def deal(chunks: Sequence[Chunk], lanes: int) -> list[list[Piece]]:
    """Cut a line of chunks into `lanes` runs of pieces whose rows differ by one at most."""
    rows = sum(c.rows for c in chunks)
    ends = [rows * (lane + 1) // lanes for lane in range(lanes)]
    dealt: list[list[Piece]] = [[] for _ in range(lanes)]
    lane = at = 0
    for chunk in chunks:
        start = 0
        while start < chunk.rows:
            while at == ends[lane]:
                lane += 1
            stop = min(chunk.rows, start + ends[lane] - at)
            dealt[lane].append(Piece(chunk, start, stop))
            start, at = stop, at + stop - start
    return dealt


def windows_of(pieces: Sequence[Piece], window_rows: int) -> list[list[Piece]]:
    """Runs of pieces that are shuffled together: of `window_rows` at most, or one piece."""
    windows: list[list[Piece]] = [[]]
    held = 0
    for piece in pieces:
        if windows[-1] and held + piece.rows > window_rows:
            windows.append([])
            held = 0
        windows[-1].append(piece)
        held += piece.rows
    return windows


@dataclass(frozen=True)
class Window:
    """Some pieces of a lane; `first` is where they begin in the lane's order."""

    number: int
    first: int
    pieces: list[Piece]

    @property
    def end(self) -> int:
        """Where the next window begins."""
        return self.first + sum(p.rows for p in self.pieces)


class Lane:
    """One stream of an epoch, from row `begin` to row `end` of its order; it is only read forwards."""

    def __init__(
        self,
        number: int,
        pieces: Sequence[Piece],
        window_rows: int,
        begin: int,
        end: int,
        order: Callable[[int, int, int], np.ndarray],
    ) -> None:
        self.number = number
        self.order = order
        self.ahead: list[Window] = []
        self.held: list[tuple[Window, Rows, np.ndarray]] = []
        at = 0
        for index, window in enumerate(windows_of(pieces, window_rows)):
            made = Window(index, at, window)
            at = made.end
            if made.end > begin and made.first < end:
                self.ahead.append(made)

    def take(self, begin: int, end: int, read: Callable[[Piece], Rows]) -> Rows:
        """Rows `begin` to `end` of the lane's order."""
        self.held = [held for held in self.held if held[0].end > begin]
        while self.ahead and self.ahead[0].first < end:
            window = self.ahead.pop(0)
            rows = concatenate([read(p) for p in window.pieces])
            self.held.append((window, rows, self.order(self.number, window.number, len(rows))))
        return concatenate([rows.take(order[max(begin - w.first, 0) : end - w.first]) for w, rows, order in self.held])


class Reader:
    """Reads one rank's share of one split of a prepared data set.

    `lanes` is fixed for a run: batches depend on it. Without it a shuffled reader has LANES; one that keeps the order
    has one a rank, so that each rank reads a run of neighbouring row groups. `oov_rate` of the ids are replaced by the
    out-of-vocabulary row (training only), so that this row is always trained. `fraction` cuts an epoch to its first
    batches. `teacher` is a folder of log-odds, file for file and row for row beside the split's own.

    Raises: ConfigError when there are more ranks than lanes, rows of a batch, or rows; DataError when the teacher's
    files are not those of the split.
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
        lanes: int | None = None,
        fraction: float = 1.0,
        teacher: Path | None = None,
    ) -> None:
        self.dataset = dataset
        self.split = split
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.oov_rate = oov_rate
        self.fraction = fraction
        self.teacher = teacher
        self._whole: Rows | None = None
        self.chunks = chunks_of(dataset, split)
        self.rows = dataset.rows(split)
        wanted = lanes or (LANES if shuffle else world_size)
        self.lanes = min(wanted, batch_size, self.rows)  # each lane has a row for each batch
        if world_size > self.lanes:
            limit = next(
                f"{name} {value}"
                for name, value in (("lanes", wanted), ("batch_size", batch_size), (f"{split} rows", self.rows))
                if value == self.lanes
            )
            raise ConfigError(
                f"{limit}: fewer than {world_size} workers (world_size), each of which needs one: use {self.lanes} "
                f"workers at most" + (f", or start the run with lanes {world_size}" if wanted < world_size else "")
            )
        if teacher is not None:
            check_teacher(dataset, split, teacher)

    def num_batches(self) -> int:
        """Global batches of an epoch, whatever the number of workers."""
        return max(round(self._whole_batches() * self.fraction), 1)

    def epoch_rows(self) -> int:
        """Rows of an epoch, over all ranks."""
        return sum(self._share(lane, self.num_batches())[0] for lane in range(self.lanes))

    def batch_rows(self, batch: int) -> int:
        """Rows of one global batch, over all ranks."""
        shares = [self._share(lane, batch) for lane in range(self.lanes)]
        return sum(end - begin for begin, end in shares)

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[tuple[Batch, int]]:
        """This rank's slices of global batches `start`.. of an epoch, each with the global batch's row count.

        Reading and packing run ahead in a thread; position counts what was yielded, never what was read.
        """
        for rows, size in _ahead(self._slices(epoch, start)):
            batch = to_batch(rows.encoded, rows.labels, rows.teacher, size)
            batch.digest = row_digest(rows.index, epoch)
            yield batch, size

    def slices(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Rows, int]]:
        """As `batches`, but as rows in memory (numpy)."""
        return _ahead(self._slices(epoch, start))

    def _whole_batches(self) -> int:
        # a last batch too small to give every lane a row joins the others
        return min(-(-self.rows // self.batch_size), self.rows // self.lanes)

    def _share(self, lane: int, batch: int) -> tuple[int, int]:
        """What a global batch takes of a lane: first and past-last row of the lane's order."""
        rows = self.rows * (lane + 1) // self.lanes - self.rows * lane // self.lanes
        whole = self._whole_batches()
        phase = lane * whole // self.lanes  # lanes round up at different batches, so that these are of even sizes
        return (batch * rows + phase) // whole, ((batch + 1) * rows + phase) // whole

    def _slices(self, epoch: int, start: int) -> Iterator[tuple[Rows, int]]:
        if self.shuffle and self.rows <= WHOLE_ROWS:
            yield from self._whole_slices(epoch, start)
            return
        lanes = self._lanes(epoch, start)
        read = _Decoder(self, [p for lane in lanes for window in lane.ahead for p in window.pieces])
        for batch in range(start, self.num_batches()):
            parts = [
                self._mask(lane.take(*self._share(lane.number, batch), read), epoch, batch, lane.number)
                for lane in lanes
            ]
            yield concatenate(parts), self.batch_rows(batch)

    def _whole_slices(self, epoch: int, start: int) -> Iterator[tuple[Rows, int]]:
        """A split that fits in memory: lanes are runs of one permutation of all its rows, whatever file they lie in."""
        if self._whole is None:
            read = _Decoder(self, [Piece(c, 0, c.rows) for c in self.chunks])
            self._whole = concatenate([read(Piece(c, 0, c.rows)) for c in self.chunks])
        order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        mine = range(self.rank * self.lanes // self.world_size, (self.rank + 1) * self.lanes // self.world_size)
        for batch in range(start, self.num_batches()):
            parts = []
            for lane in mine:
                first, (begin, end) = self.rows * lane // self.lanes, self._share(lane, batch)
                parts.append(self._mask(self._whole.take(order[first + begin : first + end]), epoch, batch, lane))
            yield concatenate(parts), self.batch_rows(batch)

    def _lanes(self, epoch: int, start: int) -> list[Lane]:
        """This rank's lanes, standing before batch `start` of an epoch."""
        line = self.chunks
        if self.shuffle:
            line = [line[i] for i in np.random.default_rng((self.seed, epoch)).permutation(len(line))]
        dealt = deal(line, self.lanes)
        if self.shuffle:  # lanes that share a chunk then come to it at about the same batch: it is not held for long
            dealt = [pieces[::-1] if lane % 2 else pieces for lane, pieces in enumerate(dealt)]
        window_rows = WINDOW_ROWS // self.lanes if self.shuffle else 1
        mine = range(self.rank * self.lanes // self.world_size, (self.rank + 1) * self.lanes // self.world_size)
        last = self.num_batches() - 1
        return [
            Lane(n, dealt[n], window_rows, self._share(n, start)[0], self._share(n, last)[1], self._order(epoch))
            for n in mine
        ]

    def _order(self, epoch: int) -> Callable[[int, int, int], np.ndarray]:
        def order(lane: int, window: int, rows: int) -> np.ndarray:
            if not self.shuffle:
                return np.arange(rows)
            return np.random.default_rng((self.seed, epoch, lane, window)).permutation(rows)

        return order

    def _mask(self, rows: Rows, epoch: int, batch: int, lane: int) -> Rows:
        if self.oov_rate == 0.0:
            return rows
        rng = np.random.default_rng((self.seed, epoch, batch, lane))
        before = rows.encoded.sparse
        draws = rng.random(sum(len(r.values) for r in before.values()), dtype=np.float32)
        hit, at = draws < self.oov_rate, 0
        sparse = {}
        for name, ragged in before.items():
            end = at + len(ragged.values)
            values = ragged.values.copy()
            values[hit[at:end]] = OOV_ROW
            sparse[name] = Ragged(values, ragged.lengths, ragged.weights, ragged.positions)
            at = end
        return replace(rows, encoded=replace(rows.encoded, sparse=sparse))


class _Decoder:
    """Reads pieces; a chunk that several of them lie in is decoded once and held until the last."""

    def __init__(self, reader: Reader, pieces: Sequence[Piece]) -> None:
        self.reader = reader
        self.uses = Counter(p.chunk for p in pieces)
        self.held: dict[Chunk, Rows] = {}

    def __call__(self, piece: Piece) -> Rows:
        chunk = piece.chunk
        rows = self.held.pop(chunk, None)
        if rows is None:
            rows = read_chunk(self.reader.dataset, chunk)
            if self.reader.teacher is not None:
                rows = replace(rows, teacher=read_teacher(self.reader.dataset, chunk, self.reader.teacher))
        self.uses[chunk] -= 1
        if self.uses[chunk]:
            self.held[chunk] = rows
        return rows if piece.rows == chunk.rows else rows.take(np.arange(piece.start, piece.stop))


def _teacher_path(dataset: Dataset, path: Location, teacher: Path) -> Path:
    assert isinstance(path, Path), "ray_distill.py refuses a teacher for data in a storage"
    return Path(teacher) / path.relative_to(str(dataset.folder))


def check_teacher(dataset: Dataset, split: SplitName, teacher: Path) -> None:
    """Raises: DataError naming the first of the teacher's files that is absent or has other rows than the split's."""
    again = "write the teacher's logits for this prepared data again"
    tasks = len(dataset.transform.schema.tasks)
    for file in dataset.files[split]:
        path = _teacher_path(dataset, file.path, teacher)
        try:
            with pq.ParquetFile(path) as footer:
                metadata, schema = footer.metadata, footer.schema_arrow
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}: teacher cannot be read: {str(error).splitlines()[0]}: {again}") from None
        sizes = tuple(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
        if sizes != file.row_groups:
            raise DataError(f"{path}: teacher has row groups {sizes}, the data {file.row_groups}: {again}")
        wanted = pa.list_(pa.float32(), tasks)
        seen = schema.field(TEACHER).type if TEACHER in schema.names else None
        if seen != wanted:
            raise DataError(f"{path}: teacher's column {TEACHER!r} is {seen}, it must be {wanted}: {again}")


def read_teacher(dataset: Dataset, chunk: Chunk, teacher: Path) -> np.ndarray:
    """The teacher's log-odds (N, T) float32 of one row group. Raises: DataError when they cannot be read."""
    path = _teacher_path(dataset, chunk.path, teacher)
    try:
        with pq.ParquetFile(path) as file:
            column = flat(file.read_row_group(chunk.row_group, columns=[TEACHER])[TEACHER])
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: teacher cannot be read: {str(error).splitlines()[0]}") from None
    return column.flatten().to_numpy().reshape(chunk.rows, -1)


def read_chunk(dataset: Dataset, chunk: Chunk) -> Rows:
    """Read one row group into memory."""
    try:
        with reading(chunk.path), open_parquet(chunk.path) as file:
            table = file.read_row_group(chunk.row_group)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{chunk.path}: cannot be read: {str(error).splitlines()[0]}: prepare the data again") from None
    transform = dataset.transform
    sparse = {name: from_columns(table, name, transform.positions(name)) for name in transform.sparse}
    if DENSE in table.column_names:
        dense = flat(table[DENSE]).flatten().to_numpy().reshape(len(table), -1).copy()  # torch wants it writable
    else:
        dense = np.zeros((len(table), 0), dtype=np.float32)
    labels = flat(table[LABELS]).flatten().to_numpy().reshape(len(table), -1).copy()
    groups = flat(table[GROUP]).to_numpy() if GROUP in table.column_names else None
    return Rows(Encoded(sparse, dense), labels, groups, np.arange(chunk.first, chunk.first + len(table)))


def concatenate(parts: list[Rows]) -> Rows:
    """Rows of several parts, in order."""
    if len(parts) == 1:
        return parts[0]
    groups = [p.groups for p in parts if p.groups is not None]
    teachers = [p.teacher for p in parts if p.teacher is not None]
    return Rows(
        encoded.concatenate([p.encoded for p in parts]),
        np.concatenate([p.labels for p in parts]),
        np.concatenate(groups) if groups else None,
        np.concatenate([p.index for p in parts]),
        np.concatenate(teachers) if teachers else None,
    )


def read_split(dataset: Dataset, split: SplitName, limit: int | None = None) -> Rows:
    """A whole split in its own order, or its first `limit` rows."""
    whole = concatenate([read_chunk(dataset, c) for c in chunks_of(dataset, split) if limit is None or c.first < limit])
    return whole if limit is None or len(whole) <= limit else whole.take(np.arange(limit))


def spread_rows(dataset: Dataset, split: SplitName, limit: int) -> Rows:
    """About `limit` rows of a split at most, in whole row groups from all over it."""
    chunks = chunks_of(dataset, split)
    wanted = max(round(len(chunks) * min(limit / max(dataset.rows(split), 1), 1.0)), 1)
    chosen = np.unique(np.linspace(0, len(chunks) - 1, wanted).round().astype(int))
    rows = concatenate([read_chunk(dataset, chunks[i]) for i in chosen])
    return rows if len(rows) <= limit else rows.take(np.sort(np.random.default_rng(0).permutation(len(rows))[:limit]))


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
