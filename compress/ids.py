"""The id map of an artifact on disk: what takes a raw id to a row of the packed tables, and its bytes.

A vocabulary is stored as the leading bits of its ids' hashes. Rows follow each other in segments (the tiers, then the
bands of ids that were cut); inside a segment they lie in the order of their hashes, so a row number takes no byte and
the hashes, sorted, take about log2(2**bits / K) + 2 bits each (Elias-Fano). A hash or bucket table stores, for each of
its rows, the segment it belongs to, in as many bits as that takes; untouched it keeps its order, which costs nothing.

One Arrow file holds all tables: name, bits of a key or of a segment number, rows of each segment, the packed bits.

Legend: N training rows, K rows of a segment, S segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from compress.errors import ArtifactError
from trainer.data.transform import OOV_ROW, RESERVED_ROWS, IdMap, TableInfo, read_arrow, write_arrow

FALSE_KNOWN = 1e-4  # share of unknown ids that a shortened hash may take for a known one, at most
MIN_KEY_BITS = 16
CHUNK_KEYS = 1 << 18


@dataclass(frozen=True)
class Layout:
    """Where training rows lie in an artifact.

    `order` (N,): training rows by rank, reserved ones first. `cuts`: ranks at which tiers end; the last is the number
    of rows kept. `bands`: ranks at which each centroid's band of cut rows ends; none where nothing is cut, or where
    what is cut is forgotten (`shared`) and reads the out-of-vocabulary row.
    """

    order: np.ndarray
    cuts: tuple[int, ...]
    bands: tuple[int, ...] = ()
    shared: bool = False

    @property
    def kept(self) -> int:
        """Training rows with a row of their own."""
        return self.cuts[-1]

    @property
    def untouched(self) -> bool:
        """Whether every row is kept, in one tier, with no centroid before them.

        The rows that a sample touches may all be kept and still lie behind centroids.
        """
        return len(self.cuts) == 1 and self.kept == len(self.order) and not self.bands

    def segments(self) -> list[np.ndarray]:
        """Training rows of each tier, then of each band, reserved rows left out; inside each by rank."""
        edges = [RESERVED_ROWS, *self.cuts, *self.bands]
        return [self.order[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]


class Stored(Protocol):
    """What is to be known of a stored table here (compress/lookup.py has it)."""

    @property
    def name(self) -> str: ...
    @property
    def tiers(self) -> Sequence[Any]: ...
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
    own = RESERVED_ROWS + len(layout.bands)
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
    return int(prefix_key_bits(keys, np.array([len(keys)]))[0])


def prefix_key_bits(keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`key_bits` of the first keys (K,) of a sequence, for each of some rising counts (C,) of them."""
    enough = np.ceil(np.log2(np.maximum(counts, 1) / FALSE_KNOWN))
    bits = np.maximum(enough, MIN_KEY_BITS).astype(np.int64)
    sort = np.argsort(keys, kind="stable")
    alike = np.asarray(keys)[sort]
    for width in range(MIN_KEY_BITS, 65):  # keys that share `width` bits with another one, in the order of their bits
        prefix = alike >> np.uint64(64 - width)
        same = prefix[1:] == prefix[:-1]
        if not same.any():
            break
        mates = np.append(same, False) | np.insert(same, 0, False)
        sort, alike, prefix = sort[mates], alike[mates], prefix[mates]
        order = np.lexsort((sort, prefix))
        second = np.flatnonzero(prefix[order][1:] == prefix[order][:-1]) + 1
        clash = int(sort[order][second].min())  # the first key that meets one before it
        bits = np.where(counts > clash, np.maximum(bits, min(width + 1, 64)), bits)
    return bits


def low_bits(count: int, bits: int) -> int:
    """How many low bits of each of `count` sorted numbers below 2**bits are stored as they are."""
    return max(bits - int(np.floor(np.log2(count))), 0) if count else 0


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
        some = min(CHUNK_KEYS, count - at)
        lows = np.unpackbits(packed[at * low // 8 : split], count=some * low, bitorder="little").reshape(some, low)
        for bit in range(low):
            numbers[at : at + some] |= lows[:, bit].astype(np.uint64) << np.uint64(bit)
    return numbers


def segment_bits(segments: int) -> int:
    """Bits of a segment number."""
    return next(bits for bits in (1, 2, 4, 8) if segments <= 1 << bits)


def _stored_segments(trained: IdMap, layout: Layout) -> list[np.ndarray]:
    segments = layout.segments()
    if trained.keys is None and layout.shared:  # a forgotten row still needs a number
        segments = [*segments, layout.order[layout.kept :]]
    return segments


def id_map_bytes(num_embeddings: int, layout: Layout, bits: int | None) -> int:
    """Bytes of one table's id map as `write_ids` stores it, Arrow's framing not counted.

    `bits` of a stored key; None for a hash or bucket table. Of `layout` only the numbers of rows count.
    """
    edges = [RESERVED_ROWS, *layout.cuts, *layout.bands]
    sizes = [int(b - a) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    if bits is not None:
        return sum(packed_bytes(size, bits) for size in sizes)
    if len(layout.cuts) == 1 and layout.kept == num_embeddings:
        return 0
    return -(-(num_embeddings - RESERVED_ROWS) * segment_bits(len(sizes) + layout.shared) // 8)


# -- the file --------------------------------------------------------------------------------------------------------


def write_ids(path: Path, trained: Mapping[str, IdMap], layouts: Mapping[str, Layout]) -> None:
    """Write the id maps of all tables."""
    columns: dict[str, list] = {"table": [], "bits": [], "rows": [], "packed": []}
    for name, id_map in trained.items():
        bits, rows, packed = _packed(id_map, layouts[name])
        columns["table"].append(name)
        columns["bits"].append(bits)
        columns["rows"].append(rows)
        columns["packed"].append(packed)
    write_arrow(
        pa.table(
            {
                "table": pa.array(columns["table"]),
                "bits": pa.array(columns["bits"], pa.int8()),
                "rows": pa.array(columns["rows"], pa.list_(pa.int64())),
                "packed": pa.array(columns["packed"], pa.large_binary()),
            }
        ),
        path,
    )


def _packed(trained: IdMap, layout: Layout) -> tuple[int, list[int], bytes]:
    """Bits of a number, rows of each segment, and the packed numbers of one table."""
    segments = _stored_segments(trained, layout)
    rows = [len(s) for s in segments]
    if trained.keys is None:
        if layout.untouched:
            return 0, rows, b""
        bits = segment_bits(len(segments))
        numbers = np.zeros(len(layout.order), dtype=np.uint8)
        for index, segment in enumerate(segments):
            numbers[segment] = index
        return bits, rows, pack_numbers(numbers[RESERVED_ROWS:], bits)
    keys = trained.keys_by_row()
    parts = [keys[s - RESERVED_ROWS] for s in segments]
    bits = key_bits(np.concatenate(parts))
    return bits, rows, b"".join(pack_sorted(np.sort(p) >> np.uint64(64 - bits), bits) for p in parts)


def pack_numbers(numbers: np.ndarray, bits: int) -> bytes:
    """Numbers (N,) uint8 below 2**bits side by side; bits is 1, 2, 4 or 8."""
    spread = (numbers[:, None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    return np.packbits(spread, bitorder="little").tobytes()


def unpack_numbers(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """The numbers (N,) uint8 that `pack_numbers` packed."""
    spread = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return (spread << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)


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
    for index, name in enumerate(names):
        packed = np.frombuffer(file["packed"][index].as_buffer() or b"", dtype=np.uint8)
        bits, rows = file["bits"][index].as_py(), file["rows"][index].as_py()
        try:
            maps[name] = _id_map(
                tables[name].num_embeddings, bits, rows, packed, len(of[name].tiers), of[name].centroids
            )
        except ArtifactError as error:
            raise ArtifactError(f"{path}: table {name}: {error}: restore the file") from None
    return maps


def _id_map(
    num_embeddings: int, bits: int, rows: Sequence[int], packed: np.ndarray, tiers: int, centroids: int
) -> IdMap:
    size = num_embeddings - RESERVED_ROWS
    reserved = np.arange(OOV_ROW, RESERVED_ROWS)
    firsts = np.cumsum([RESERVED_ROWS + centroids, *rows[:tiers]])
    if not bits:
        return IdMap(size)
    if len(rows) not in (tiers, tiers + centroids, tiers + 1) or min(rows) < 0 or sum(rows) > size:
        raise ArtifactError(
            f"segments of {rows} rows in a table of {num_embeddings}, {tiers} tiers and {centroids} centroids"
        )
    if bits <= 8:  # segment numbers
        if sum(rows) != size:
            raise ArtifactError(f"segments of {rows} rows in a table of {num_embeddings}")
        numbers = unpack_numbers(packed, size, bits)
        found = np.zeros(size, dtype=np.int32)
        for segment in range(len(rows)):
            own = np.flatnonzero(numbers == segment)
            if len(own) != rows[segment]:
                raise ArtifactError(f"a segment of {len(own)} rows is said to have {rows[segment]}")
            found[own] = _rows_of(segment, len(own), firsts, tiers, centroids)
        return IdMap(size, remap=np.concatenate([reserved, found]).astype(np.int32))
    keys, found_rows, at = [], [], 0
    for segment, count in enumerate(rows):
        end = at + packed_bytes(count, bits)
        keys.append(unpack_sorted(packed[at:end], count, bits))
        found_rows.append(_rows_of(segment, count, firsts, tiers, centroids))
        at = end
    if at != len(packed):
        raise ArtifactError(f"segments of {rows} keys take {at} bytes, there are {len(packed)}")
    together = np.concatenate(keys)
    sort = np.argsort(together, kind="stable")
    remap = np.concatenate([reserved, np.concatenate(found_rows)[sort]]).astype(np.int32)
    return IdMap(size, together[sort], 64 - bits, remap)


def _rows_of(segment: int, count: int, firsts: np.ndarray, tiers: int, centroids: int) -> np.ndarray:
    """Artifact rows of a segment: its own in a tier, one centroid in a band, the unknown's where it is forgotten."""
    if segment < tiers:
        return np.arange(firsts[segment], firsts[segment] + count)
    return np.full(count, RESERVED_ROWS + segment - tiers if centroids else OOV_ROW)
