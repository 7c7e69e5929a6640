"""The id map of an artifact on disk: what takes a raw id to a row of the packed tables, and its bytes.

A vocabulary is stored as the leading bits of its ids' hashes. Rows follow each other in segments (the tiers, then the
ids that read each centroid); inside a segment they lie in the order of their hashes, so a row number takes no byte and
the hashes, sorted, take about log2(2**bits / K) + 2 bits each (Elias-Fano). Ids with rows of their own have bits enough
to tell all trained ids apart. Ids that read a centroid have fewer: ids whose bits are the same, a class, read the same
centroid, and one unknown id in LOOSE does too. A hash or bucket table stores, for each of its rows, the segment it
belongs to, in as many bits as that takes; untouched it keeps its order, which costs nothing.

One Arrow file holds all tables: name, bits of a key (or of a segment number), bits of a loose key, rows of each
segment, the packed bits.

Legend: N training rows, K rows of a segment, S segments.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from compress.errors import ArtifactError
from trainer.data.transform import OOV_ROW, RESERVED_ROWS, IdMap, TableInfo, read_arrow, write_arrow

SCHEMA = pa.schema(
    {
        "table": pa.string(),
        "bits": pa.int8(),
        "loose": pa.int8(),
        "rows": pa.list_(pa.int64()),
        "packed": pa.large_binary(),
    }
)
FALSE_KNOWN = 1e-4  # share of unknown ids that may be taken for one with a row of its own, at most
LOOSE = 64  # one unknown id in so many, at most, is taken for one that reads a centroid
MIN_KEY_BITS = 12
CHUNK_KEYS = 1 << 18


@dataclass(frozen=True)
class Layout:
    """Where training rows lie in an artifact.

    `order` (N,): training rows by rank, reserved ones first. `cuts`: ranks at which tiers end; the last is the number
    of rows kept. The rows from there to rank `zone` read one of `count` centroids, which `clusters` (N,) names by
    training row (all the first one where it is empty); those beyond are forgotten and read the out-of-vocabulary row.
    """

    order: np.ndarray
    cuts: tuple[int, ...]
    zone: int
    count: int = 0
    clusters: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))

    def numbers(self, rows: np.ndarray) -> np.ndarray:
        """Which centroid training rows read, if they read one."""
        return self.clusters[rows].astype(np.int64) if len(self.clusters) else np.zeros(len(rows), dtype=np.int64)

    @property
    def kept(self) -> int:
        """Training rows with a row of their own."""
        return self.cuts[-1]

    @property
    def untouched(self) -> bool:
        """Whether every row is kept, in one tier, with no centroid before them.

        The rows that a sample touches may all be kept and still lie behind centroids.
        """
        return len(self.cuts) == 1 and self.kept == len(self.order) and not self.count

    def segments(self) -> list[np.ndarray]:
        """Training rows of each tier, then of each centroid, reserved rows left out; inside each by rank."""
        edges = [RESERVED_ROWS, *self.cuts]
        tiers = [self.order[a:b] for a, b in itertools.pairwise(edges)]
        zone = self.order[self.kept : self.zone]
        if not len(self.clusters):
            return [*tiers, zone] if self.count else tiers
        number = self.clusters[zone]
        return [*tiers, *(zone[number == c] for c in range(self.count))]


class Stored(Protocol):
    """What is to be known of a stored table here (compress/lookup.py has it)."""

    @property
    def name(self) -> str: ...
    @property
    def segments(self) -> int: ...
    @property
    def centroids(self) -> int: ...


def target_rows(trained: IdMap, layout: Layout) -> np.ndarray:
    """The artifact's row (N,) int32 of each training row."""
    total = len(layout.order)
    rows = np.zeros(total, dtype=np.int32)  # what is forgotten reads the out-of-vocabulary row
    rows[layout.order[:RESERVED_ROWS]] = np.arange(RESERVED_ROWS)
    if trained.keys is None and layout.untouched:
        return np.arange(total, dtype=np.int32)
    keys = None if trained.keys is None else trained.keys_by_row()
    own = RESERVED_ROWS + layout.count
    for index, segment in enumerate(layout.segments()):
        if index < len(layout.cuts):
            inside = np.sort(segment) if keys is None else segment[np.argsort(keys[segment - RESERVED_ROWS])]
            rows[inside] = np.arange(own, own + len(inside))
            own += len(inside)
        else:
            rows[segment] = RESERVED_ROWS + index - len(layout.cuts)
    return rows


# -- sorted keys, packed ---------------------------------------------------------------------------------------------


def key_bits(keys: np.ndarray) -> int:
    """The fewest leading bits of 64-bit hashes (K,) that tell them apart and keep unknown ids unknown."""
    enough = max(MIN_KEY_BITS, int(np.ceil(np.log2(max(len(keys), 1) / FALSE_KNOWN))))
    ordered = keys if (keys[1:] > keys[:-1]).all() else np.sort(keys)
    if len(ordered) < 2:
        return enough
    nearest = int((ordered[1:] ^ ordered[:-1]).min())
    return min(max(65 - nearest.bit_length(), enough), 64)


def loose_bits(num_embeddings: int) -> int:
    """Leading bits of the hash of an id that reads a centroid: an unknown id is taken for it once in LOOSE at most."""
    return max(int(np.ceil(np.log2(num_embeddings * LOOSE))), MIN_KEY_BITS)


def low_bits(count: int, bits: int) -> int:
    """How many low bits of each of `count` sorted numbers below 2**bits are stored as they are."""
    return max(bits - int(count).bit_length() + 1, 0) if count else 0


def pack_sorted(numbers: np.ndarray, bits: int) -> bytes:
    """Elias-Fano code of sorted numbers (K,) uint64 below 2**bits: low bits side by side, high parts in unary."""
    count = len(numbers)
    if not count:
        return b""
    low = low_bits(count, bits)
    shifts = np.arange(low, dtype=np.uint64)
    chunks = (numbers[at : at + CHUNK_KEYS, None] for at in range(0, count, CHUNK_KEYS))
    lows = [np.packbits(((c >> shifts) & np.uint64(1)).astype(np.uint8), bitorder="little") for c in chunks]
    highs = np.zeros(count + (1 << (bits - low)), dtype=np.uint8)
    highs[(numbers >> np.uint64(low)).astype(np.int64) + np.arange(count)] = 1
    return b"".join(part.tobytes() for part in (*lows, np.packbits(highs, bitorder="little")))


@functools.lru_cache(1 << 16)
def packed_bytes(count: int, bits: int) -> int:
    """Bytes of what `pack_sorted` writes."""
    if not count:
        return 0
    low = low_bits(count, bits)
    return -(-count * low // 8) + -(-(count + (1 << (bits - low))) // 8)


def unpack_sorted(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """The numbers (K,) uint64 that `pack_sorted` packed into bytes. Raises: ArtifactError when they are not so many."""
    if not count:
        return np.zeros(0, dtype=np.uint64)
    low = low_bits(count, bits)
    split = -(-count * low // 8)
    highs = np.unpackbits(packed[split:], count=count + (1 << (bits - low)), bitorder="little")
    places = np.flatnonzero(highs)
    if len(places) != count:
        raise ArtifactError(f"a segment of {len(places)} keys is said to have {count}")
    numbers = (places - np.arange(count)).astype(np.uint64) << np.uint64(low)
    for at in range(0, count if low else 0, CHUNK_KEYS):  # a multiple of 8 keys fills whole bytes
        numbers[at : at + CHUNK_KEYS] |= _unpack_bits(packed[at * low // 8 : split], min(CHUNK_KEYS, count - at), low)
    return numbers


def _unpack_bits(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Numbers (K,) uint64 of so many bits each, side by side from the low bits up."""
    groups = -(-count // 8)  # eight numbers fill whole bytes, the same ones in every group
    whole = np.zeros(groups * bits, dtype=np.uint8)
    whole[: len(packed)] = packed[: len(whole)]
    columns = whole.reshape(groups, bits).T.astype(np.uint64)
    numbers = np.empty((groups, 8), dtype=np.uint64)
    for index in range(8):
        first, *others = range(index * bits // 8, -(-(index + 1) * bits // 8))
        number = columns[first] >> np.uint64(index * bits % 8)
        for byte in others:
            number |= columns[byte] << np.uint64(byte * 8 - index * bits)
        numbers[:, index] = number & np.uint64((1 << bits) - 1)
    return numbers.reshape(-1)[:count]


def segment_bits(segments: int) -> int:
    """Bits of a segment number."""
    return max((segments - 1).bit_length(), 1)


def _stored_segments(trained: IdMap, layout: Layout) -> list[np.ndarray]:
    segments = layout.segments()
    if trained.keys is None and layout.zone < len(layout.order):  # a forgotten row still needs a number
        segments = [*segments, layout.order[layout.zone :]]
    return segments


def id_map_bytes(num_embeddings: int, tiers: Sequence[int], clusters: Sequence[int], bits: int | None) -> int:
    """Bytes of one table's id map as `write_ids` stores it, Arrow's framing not counted.

    `tiers`, `clusters`: rows of each tier and of each centroid, reserved rows left out; what they lack of all rows is
    forgotten. `bits` of a stored key; None for a hash or bucket table.
    """
    if bits is not None:
        loose = loose_bits(num_embeddings)
        return sum(packed_bytes(n, bits) for n in tiers) + sum(packed_bytes(n, loose) for n in clusters)
    rows = num_embeddings - RESERVED_ROWS
    if tuple(tiers) == (rows,) and not clusters:
        return 0
    forgotten = sum(tiers) + sum(clusters) < rows
    return -(-rows * segment_bits(len(tiers) + len(clusters) + forgotten) // 8)


# -- the file --------------------------------------------------------------------------------------------------------


def write_ids(path: Path, trained: Mapping[str, IdMap], layouts: Mapping[str, Layout]) -> None:
    """Write the id maps of all tables."""
    rows = [{"table": name, **_stored(id_map, layouts[name])} for name, id_map in trained.items()]
    write_arrow(pa.Table.from_pylist(rows, SCHEMA), path)


def _stored(trained: IdMap, layout: Layout) -> dict[str, Any]:
    """What is stored of one table, but its name."""
    segments = _stored_segments(trained, layout)
    rows = [len(s) for s in segments]
    if trained.keys is None:
        if layout.untouched:
            return {"bits": 0, "loose": 0, "rows": rows, "packed": b""}
        bits = segment_bits(len(segments))
        numbers = np.zeros(len(layout.order), dtype=np.uint16)
        for index, segment in enumerate(segments):
            numbers[segment] = index
        return {"bits": bits, "loose": 0, "rows": rows, "packed": pack_numbers(numbers[RESERVED_ROWS:], bits)}
    keys = trained.keys_by_row()
    bits, loose = key_bits(keys), loose_bits(len(layout.order))
    packed = [
        pack_sorted(np.sort(keys[s - RESERVED_ROWS]) >> np.uint64(64 - width), width)
        for index, s in enumerate(segments)
        for width in [bits if index < len(layout.cuts) else loose]
    ]
    return {"bits": bits, "loose": loose, "rows": rows, "packed": b"".join(packed)}


def pack_numbers(numbers: np.ndarray, bits: int) -> bytes:
    """Numbers (N,) uint16 below 2**bits side by side."""
    spread = ((numbers[:, None] >> np.arange(bits, dtype=np.uint16)) & np.uint16(1)).astype(np.uint8)
    return np.packbits(spread, bitorder="little").tobytes()


def unpack_numbers(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """The numbers (N,) uint16 that `pack_numbers` packed."""
    spread = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return (spread.astype(np.uint16) << np.arange(bits, dtype=np.uint16)).sum(1, dtype=np.uint16)


def read_ids(path: Path, tables: Mapping[str, TableInfo], stored: Sequence[Stored]) -> dict[str, IdMap]:
    """The id maps that `write_ids` wrote, ready to look up, for tables stored so.

    Raises: ArtifactError when the file does not hold what its own numbers say.
    """
    file = read_arrow(path)
    names = file["table"].to_pylist()
    of = {table.name: table for table in stored}
    if sorted(names) != sorted(tables):
        raise ArtifactError(f"{path}: holds the ids of {names[:5]}, the tables are {sorted(tables)[:5]}: restore it")
    maps = {}
    for line, packed in zip(file.drop_columns(["packed"]).to_pylist(), file["packed"], strict=True):
        table = of[line["table"]]
        size = tables[table.name].num_embeddings - RESERVED_ROWS
        content = np.frombuffer(packed.as_buffer() or b"", dtype=np.uint8)
        segments = Segments(line["bits"], line["loose"], line["rows"], table.segments, table.centroids)
        try:
            segments.check(size)
            maps[table.name] = segments.id_map(size, content)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: table {table.name}: {error}: restore the file") from None
    return maps


@dataclass(frozen=True)
class Segments:
    """How the ids of one table are stored: bits, rows of each segment; `tiers` of them are of rows of their own."""

    bits: int
    loose: int
    rows: list[int]
    tiers: int
    centroids: int

    def check(self, size: int) -> None:
        """Raises: ArtifactError unless these can be the segments of a table of `size` ids."""
        known = self.tiers + self.centroids
        whole = len(self.rows) in (known, known + 1) and min(self.rows) >= 0 and sum(self.rows) <= size
        if not whole or not 0 <= self.bits <= 64 or not 0 <= self.loose <= 64:
            raise ArtifactError(f"segments of {self.rows[:5]} rows in {size}")

    def id_map(self, size: int, packed: np.ndarray) -> IdMap:
        """The id map, ready to look up."""
        if not self.bits:
            if self.rows != [size] or len(packed):
                raise ArtifactError(f"rows that kept their order, but segments of {self.rows[:5]} in {size}")
            return IdMap(size)
        return self._numbered(size, packed) if not self.loose else self._keyed(size, packed)

    def _numbered(self, size: int, packed: np.ndarray) -> IdMap:
        wanted = -(-size * self.bits // 8)
        if sum(self.rows) != size or len(packed) != wanted:
            raise ArtifactError(
                f"segments of {self.rows[:5]} rows in {size}, numbers of {wanted} bytes in {len(packed)}"
            )
        numbers = unpack_numbers(packed, size, self.bits)
        remap = np.arange(size + RESERVED_ROWS, dtype=np.int32)
        for segment, rows in enumerate(self._targets()):
            own = np.flatnonzero(numbers == segment)
            if len(own) != len(rows):
                raise ArtifactError(f"a segment of {len(own)} rows is said to have {len(rows)}")
            remap[own + RESERVED_ROWS] = rows
        return IdMap(size, remap=remap)

    def _keyed(self, size: int, packed: np.ndarray) -> IdMap:
        keys, at = [], 0
        for segment, count in enumerate(self.rows):
            width = self.bits if segment < self.tiers else self.loose
            end = at + packed_bytes(count, width)
            keys.append(unpack_sorted(packed[at:end], count, width))
            at = end
        if at != len(packed):
            raise ArtifactError(f"segments of {self.rows[:5]} keys take {at} bytes, there are {len(packed)}")
        own, own_rows = _sorted(keys[: self.tiers], self._targets()[: self.tiers])
        far, far_rows = _sorted(keys[self.tiers :], self._targets()[self.tiers :])
        remap = np.concatenate([np.arange(OOV_ROW, RESERVED_ROWS), own_rows]).astype(np.int32)
        return LooseIdMap(size, own, 64 - self.bits, remap, far, 64 - self.loose, far_rows.astype(np.int32))

    def _targets(self) -> list[np.ndarray]:
        """Artifact rows of each segment: its own in a tier, one centroid, the unknown's where it is forgotten."""
        firsts = np.cumsum([RESERVED_ROWS + self.centroids, *self.rows[: self.tiers]])
        targets = [np.arange(a, b) for a, b in itertools.pairwise(firsts)]
        for segment, count in enumerate(self.rows[self.tiers :]):
            targets.append(np.full(count, RESERVED_ROWS + segment if segment < self.centroids else OOV_ROW))
        return targets


def _sorted(keys: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    if len(keys) == 1:
        return keys[0], rows[0]
    together = np.concatenate([np.zeros(0, dtype=np.uint64), *keys])
    sort = np.argsort(together, kind="stable")
    return together[sort], np.concatenate([np.zeros(0, dtype=np.int64), *rows])[sort]


@dataclass(frozen=True)
class LooseIdMap(IdMap):
    """An id map with a second look: ids that are not among the keys may be of a class that reads a centroid."""

    far: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    far_shift: int = 0
    far_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """Rows (N,) int64 of 64-bit keys (N,) uint64; unknown ids give the out-of-vocabulary row."""
        rows = super().rows(keys)
        if not len(self.far):
            return rows
        left = np.flatnonzero(rows == OOV_ROW)
        wanted = keys[left] >> np.uint64(self.far_shift)
        found = np.minimum(np.searchsorted(self.far, wanted), len(self.far) - 1)
        rows[left] = np.where(self.far[found] == wanted, self.far_rows[found], OOV_ROW)
        return rows
