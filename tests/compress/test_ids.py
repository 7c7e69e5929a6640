"""compress/ids.py: packed keys, where training rows lie, and what a raw key becomes after writing and reading.

Legend: N training rows, K rows of a segment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from compress_builders import stored

import compress.ids
from compress.errors import ArtifactError
from compress.ids import (
    FALSE_KNOWN,
    LOOSE,
    MIN_KEY_BITS,
    Layout,
    LooseIdMap,
    id_map_bytes,
    key_bits,
    loose_bits,
    pack_numbers,
    pack_sorted,
    packed_bytes,
    read_ids,
    segment_bits,
    target_rows,
    unpack_numbers,
    unpack_sorted,
    write_ids,
)
from compress.lookup import StoredTable
from compress.methods.prune import order_by_score
from trainer.data.transform import MISSING_ROW, OOV_ROW, RESERVED_ROWS, IdMap, TableInfo, read_arrow, write_arrow


def random_keys(size: int, seed: int = 0) -> np.ndarray:
    """Sorted distinct 64-bit keys."""
    keys = np.random.default_rng(seed).integers(0, 2**64, size, dtype=np.uint64)
    keys = np.unique(keys)
    assert len(keys) == size
    return keys


def layout_of(trained: IdMap, cuts: list[float], zone: float = 1.0, count: int = 0, clusters: bool = False) -> Layout:
    """Rows in a random order; cuts and the zone's end are shares of those that are not reserved.

    With `clusters` rows read centroids by chance, those whose ids are of one class the same one, as profiles have it.
    """
    rows = trained.size + RESERVED_ROWS
    counts = np.random.default_rng(rows).integers(0, 50, rows)
    order = order_by_score(counts.astype(np.float32), counts)

    def rank(share: float) -> int:
        return RESERVED_ROWS + round(share * (rows - RESERVED_ROWS))

    ends = tuple(rank(c) for c in cuts)
    numbers = np.zeros(0, dtype=np.uint8)
    if clusters:
        own = np.arange(trained.size, dtype=np.uint64) if trained.keys is None else classes_of(trained)
        mixed = (own * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
        numbers = np.concatenate([np.zeros(RESERVED_ROWS), mixed % np.uint64(count)]).astype(np.uint8)
    return Layout(order, ends, max(rank(zone), ends[-1]), count, numbers)


def classes_of(trained: IdMap) -> np.ndarray:
    """The loose key (N,) uint64 of each training row but the reserved ones."""
    return trained.keys_by_row() >> np.uint64(64 - loose_bits(trained.size + RESERVED_ROWS))


def written(tmp_path: Path, trained: IdMap, layout: Layout) -> tuple[IdMap, Path]:
    """One id map written and read."""
    path = tmp_path / "ids.arrow"
    write_ids(path, {"t": trained}, {"t": layout})
    return read_ids(path, {"t": info_of(trained)}, [table_of("t", layout)])["t"], path


def info_of(trained: IdMap, name: str = "t") -> TableInfo:
    kind = "hash" if trained.keys is None else "vocabulary"
    return TableInfo(name, kind, trained.size + RESERVED_ROWS, 8, (name,))


def table_of(name: str, layout: Layout) -> StoredTable:
    """The stored table of a layout."""
    sizes = np.diff([0, *layout.cuts])
    sizes[0] += layout.count
    tiers = stored(name, sizes.tolist(), 8, [8] * len(sizes), (name,)).tiers
    return StoredTable(name, 8, 8, tiers, (name,), layout.count, len(layout.cuts))


def naive_rows(trained: IdMap, layout: Layout) -> np.ndarray:
    """Where each training row lies, one by one: reserved rows, centroids, then tier by tier by key or training row."""
    found: dict[int, int] = {0: OOV_ROW, 1: MISSING_ROW}
    keys = None if trained.keys is None else [0, 0, *(int(k) for k in trained.keys_by_row())]
    following = RESERVED_ROWS + layout.count
    begin = RESERVED_ROWS
    for cut in layout.cuts:
        inside = sorted((int(r) for r in layout.order[begin:cut]), key=lambda r: r if keys is None else keys[r])
        for row in inside:
            found[row] = following
            following += 1
        begin = cut
    for row in layout.order[begin : layout.zone]:
        found[int(row)] = RESERVED_ROWS + (int(layout.clusters[row]) if len(layout.clusters) else 0)
    return np.array([found.get(r, OOV_ROW) for r in range(len(layout.order))])


def naive_reads(trained: IdMap, layout: Layout) -> np.ndarray:
    """What each trained id reads: its row, but that a forgotten one is taken for one of its class in the zone."""
    rows = naive_rows(trained, layout)
    if trained.keys is None:
        return rows
    classes = [-1, -1, *(int(c) for c in classes_of(trained))]
    near = {classes[r]: rows[r] for r in layout.order[layout.kept : layout.zone]}
    for row in layout.order[layout.zone :]:
        rows[row] = near.get(classes[row], OOV_ROW)
    return rows


def bytes_stored(path: Path) -> int:
    """Bytes of packed numbers in the file."""
    return sum(len(packed.as_py()) for packed in read_arrow(path)["packed"])


LAYOUTS: dict[str, dict[str, Any]] = {
    "whole": {"cuts": [1.0]},
    "cut": {"cuts": [0.4], "count": 1},
    "all cut": {"cuts": [0.0], "count": 1},
    "tiers": {"cuts": [0.1, 0.3, 1.0]},
    "tiers, cut": {"cuts": [0.05, 0.3, 0.31, 0.6], "count": 1},
    "clusters": {"cuts": [0.2], "count": 3, "clusters": True},
    "tiers and clusters": {"cuts": [0.1, 0.2], "count": 16, "clusters": True},
    "many clusters": {"cuts": [0.0], "count": 256, "clusters": True},
    "forgotten": {"cuts": [0.5], "zone": 0.0},
    "tiers, forgotten": {"cuts": [0.1, 0.4], "zone": 0.0},
    "all forgotten": {"cuts": [0.0], "zone": 0.0},
    "zone, forgotten": {"cuts": [0.3], "zone": 0.6, "count": 1},
    "tiers, clusters, forgotten": {"cuts": [0.1, 0.3], "zone": 0.7, "count": 4, "clusters": True},
    "first tier reserved": {"cuts": [0.0, 0.5], "count": 1},
    "whole behind a centroid": {"cuts": [1.0], "count": 1},
}


# -- key bits --------------------------------------------------------------------------------------------------------


def naive_bits(keys: np.ndarray) -> int:
    """The least width, by trying each."""
    for bits in range(MIN_KEY_BITS, 64):
        if max(len(keys), 1) <= FALSE_KNOWN * 2.0**bits and len(set((keys >> np.uint64(64 - bits)).tolist())) == len(
            keys
        ):
            return bits
    return 64


@pytest.mark.parametrize("size", [0, 1, 2, 6, 7, 100, 3000])
def test_key_bits_are_the_least_that_keep_keys_apart_and_unknown_ids_unknown(size: int) -> None:
    keys = random_keys(size)
    assert key_bits(keys) == naive_bits(keys)
    spread = np.arange(size, dtype=np.uint64) << np.uint64(50)
    assert key_bits(spread) == naive_bits(spread) == int(np.ceil(np.log2(max(size, 1) / FALSE_KNOWN)))


@pytest.mark.parametrize("alike", [15, 16, 17, 40, 62, 63])
def test_key_bits_tell_two_keys_apart_and_no_more(alike: int) -> None:
    """Two keys whose first `alike` bits are the same need one bit more."""
    first = np.uint64(0x1122334455667700)
    second = first ^ (np.uint64(1) << np.uint64(63 - alike))
    keys = np.array([5, first, second, 2**63], dtype=np.uint64)
    assert key_bits(np.sort(keys)) == max(alike + 1, 16)


@pytest.mark.parametrize("rows", [2, 30, 64, 65, 1000, 1024, 20_002])
def test_loose_bits_are_the_least_that_take_few_unknown_ids_for_known(rows: int) -> None:
    wanted = next(b for b in range(MIN_KEY_BITS, 64) if rows / 2**b <= 1 / LOOSE)
    assert loose_bits(rows) == wanted


# -- packed numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 1000])
@pytest.mark.parametrize("bits", [16, 17, 31, 40, 64])
def test_sorted_numbers_come_back(count: int, bits: int) -> None:
    limit = 2**bits - 1
    numbers = np.sort(np.random.default_rng(count).integers(0, limit, count, dtype=np.uint64, endpoint=True))
    if count > 1:
        numbers[[0, -1]] = 0, limit
    packed = pack_sorted(numbers, bits)
    assert len(packed) == packed_bytes(count, bits)
    found = unpack_sorted(np.frombuffer(packed or b"", dtype=np.uint8), count, bits)
    assert found.dtype == np.uint64
    assert np.array_equal(found, numbers)


@pytest.mark.parametrize("count", [15, 16, 17, 4321])
@pytest.mark.parametrize("bits", [16, 29])
def test_sorted_numbers_come_back_in_chunks(monkeypatch: pytest.MonkeyPatch, count: int, bits: int) -> None:
    numbers = np.sort(np.random.default_rng(0).integers(0, 2**bits, count, dtype=np.uint64))
    whole = pack_sorted(numbers, bits)
    monkeypatch.setattr(compress.ids, "CHUNK_KEYS", 16)
    assert pack_sorted(numbers, bits) == whole
    assert np.array_equal(unpack_sorted(np.frombuffer(whole, dtype=np.uint8), count, bits), numbers)


def test_sorted_numbers_that_are_dense_take_two_bits() -> None:
    numbers = np.arange(2**16, dtype=np.uint64)
    packed = pack_sorted(numbers, 16)
    assert len(packed) == 2 * 2**16 // 8
    assert np.array_equal(unpack_sorted(np.frombuffer(packed, dtype=np.uint8), 2**16, 16), numbers)


def test_sorted_numbers_take_about_the_bits_that_are_told() -> None:
    """log2(2**bits / K) + 2 each: 13.3 + 2 at the share of false knowns allowed."""
    keys = random_keys(50_000)
    bits = key_bits(keys)
    assert packed_bytes(50_000, bits) * 8 / 50_000 < bits - np.log2(50_000) + 2 + 0.5


@pytest.mark.parametrize("count", [1, 999, 1001, 5000])
def test_sorted_numbers_of_another_count_are_refused(count: int) -> None:
    packed = np.frombuffer(pack_sorted(random_keys(1000) >> np.uint64(40), 24), dtype=np.uint8)
    with pytest.raises(ArtifactError, match=f"is said to have {count}"):
        unpack_sorted(packed, count, 24)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("count", [0, 1, 3, 8, 1001])
def test_small_numbers_come_back(bits: int, count: int) -> None:
    numbers = np.random.default_rng(bits).integers(0, 2**bits, count).astype(np.uint16)
    packed = pack_numbers(numbers, bits)
    assert len(packed) == -(-count * bits // 8)
    assert np.array_equal(unpack_numbers(np.frombuffer(packed or b"", dtype=np.uint8), count, bits), numbers)


def test_segment_bits_hold_the_last_segments_number() -> None:
    assert [segment_bits(s) for s in (1, 2, 3, 4, 5, 16, 17, 70, 256, 273)] == [1, 1, 2, 2, 3, 4, 5, 7, 8, 9]


# -- where rows lie --------------------------------------------------------------------------------------------------


def trained_ids(kind: str, size: int) -> tuple[IdMap, np.ndarray]:
    """An id map of training and its raw keys (N,) by training row."""
    keys = random_keys(size)
    if kind == "extended":
        keys = np.random.default_rng(3).permutation(keys)
        return IdMap.of_rows(keys), keys
    if kind == "hash":
        return IdMap(size), np.arange(size, dtype=np.uint64)
    return IdMap(size, keys), keys


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 50, 997])
@pytest.mark.parametrize("kind", ["vocabulary", "extended", "hash"])
def test_ids_lie_where_a_naive_count_puts_them(tmp_path: Path, name: str, size: int, kind: str) -> None:
    """The packer's rows, the naive ones, and what the id map that was written sends each key to."""
    trained, keys = trained_ids(kind, size)
    layout = layout_of(trained, **LAYOUTS[name])
    target = target_rows(trained, layout)
    assert target.dtype == np.int32
    if kind == "hash" and name == "whole":  # untouched: it keeps its order
        assert target.tolist() == list(range(size + RESERVED_ROWS))
        expected = target
    else:
        assert np.array_equal(target, naive_rows(trained, layout))
        expected = naive_reads(trained, layout)
    own, path = written(tmp_path, trained, layout)
    assert np.array_equal(own.rows(keys), expected[RESERVED_ROWS:])
    assert (own.row(OOV_ROW), own.row(MISSING_ROW)) == (OOV_ROW, MISSING_ROW)
    kept = target[layout.order[: layout.kept]]
    assert len(np.unique(kept)) == layout.kept, "kept rows have rows of their own"
    assert target.max() < table_of("t", layout).rows
    bits = None if trained.keys is None else key_bits(trained.keys)
    sizes = [len(s) for s in layout.segments()]
    tiers, clusters = sizes[: len(layout.cuts)], sizes[len(layout.cuts) :]
    assert len(clusters) == layout.count
    assert id_map_bytes(size + RESERVED_ROWS, tiers, clusters, bits) == bytes_stored(path)


@pytest.mark.parametrize("clusters", [False, True])
def test_numbers_of_rows_are_their_clusters(clusters: bool) -> None:
    layout = layout_of(IdMap(50), [0.2], count=3 if clusters else 1, clusters=clusters)
    rows = np.array([7, 0, 33, 7])
    assert layout.numbers(rows).tolist() == ([int(layout.clusters[r]) for r in rows] if clusters else [0] * 4)


def test_rows_of_a_sample_that_are_all_kept_lie_behind_the_centroids() -> None:
    """A trial's layout: no row of the sample is cut, and its table has centroids all the same."""
    layout = Layout(np.arange(6), (6,), 6, 2)
    assert target_rows(IdMap(0), layout).tolist() == [0, 1, 4, 5, 6, 7]


def test_ids_of_an_untouched_hash_table_cost_nothing(tmp_path: Path) -> None:
    trained = IdMap(100)
    own, path = written(tmp_path, trained, layout_of(trained, [1.0]))
    assert own.remap is None
    assert bytes_stored(path) == 0


def test_ids_of_an_empty_vocabulary_are_all_unknown(tmp_path: Path) -> None:
    own, path = written(tmp_path, IdMap(0, np.zeros(0, dtype=np.uint64)), Layout(np.arange(2), (2,), 2))
    assert own.rows(random_keys(10)).tolist() == [0] * 10
    assert (own.row(OOV_ROW), own.row(MISSING_ROW)) == (0, 1)
    assert bytes_stored(path) == 0


def test_ids_of_adjacent_hashes_stay_apart(tmp_path: Path) -> None:
    """Full-width keys: a neighbour of a known key by one is unknown."""
    trained = IdMap(5, np.array([7, 8, 9, 2**63, 2**64 - 1], dtype=np.uint64))
    layout = layout_of(trained, [0.4, 1.0])
    own, _ = written(tmp_path, trained, layout)
    assert np.array_equal(own.rows(trained.keys), naive_rows(trained, layout)[2:])
    assert own.rows(np.array([0, 6, 10, 11, 2**63 + 1, 2**64 - 2], dtype=np.uint64)).tolist() == [0] * 6


# -- loose keys ------------------------------------------------------------------------------------------------------

LOOSE_LAYOUTS = ["whole", "cut", "tiers and clusters", "tiers, clusters, forgotten", "tiers, forgotten", "all cut"]


@pytest.mark.parametrize("name", LOOSE_LAYOUTS)
def test_unknown_ids_are_taken_for_known_ones_as_rarely_as_told(tmp_path: Path, name: str) -> None:
    """Of a million strange ids: within five standard deviations of the expected, and no more than is allowed."""
    trained = IdMap(3000, random_keys(3000))
    layout = layout_of(trained, **LAYOUTS[name])
    own, path = written(tmp_path, trained, layout)
    found = own.rows(np.random.default_rng(9).integers(0, 2**64, 1_000_000, dtype=np.uint64))
    near = int(((found >= RESERVED_ROWS) & (found < RESERVED_ROWS + layout.count)).sum())
    exact = int((found != OOV_ROW).sum()) - near
    wanted = 1e6 * (layout.kept - RESERVED_ROWS) / 2.0 ** read_arrow(path)["bits"][0].as_py()
    assert abs(exact - wanted) < 5 * np.sqrt(wanted) + 1
    assert wanted <= 1e6 * FALSE_KNOWN
    zone = layout.order[layout.kept : layout.zone] - RESERVED_ROWS
    loose = 1e6 * len(np.unique(classes_of(trained)[zone])) / 2.0 ** loose_bits(3002)
    assert abs(near - loose) < 5 * np.sqrt(loose) + 1
    assert near <= 1e6 / LOOSE
    assert (near > 0) == bool(len(zone))


@pytest.mark.parametrize("name", ["clusters", "tiers, clusters, forgotten", "zone, forgotten"])
def test_ids_of_one_class_read_one_centroid_and_kept_ones_their_row(tmp_path: Path, name: str) -> None:
    """Enough ids that some share their loose key, with kept, read and forgotten ones among them."""
    trained = IdMap(20_000, random_keys(20_000))
    layout = layout_of(trained, **LAYOUTS[name])
    own, _ = written(tmp_path, trained, layout)
    assert isinstance(own, LooseIdMap)
    found, target = own.rows(trained.keys), target_rows(trained, layout)[RESERVED_ROWS:]
    assert np.array_equal(found, naive_reads(trained, layout)[RESERVED_ROWS:])
    rank = np.empty(20_002, dtype=np.int64)
    rank[layout.order] = np.arange(20_002)
    rank = rank[RESERVED_ROWS:]
    assert np.array_equal(found[rank < layout.zone], target[rank < layout.zone]), "kept ids are never mistaken"
    classes, sizes = np.unique(classes_of(trained)[rank >= layout.kept], return_counts=True)
    assert (sizes > 1).sum() > 10
    for alike in classes[sizes > 1]:
        read = found[(classes_of(trained) == alike) & (rank >= layout.kept)]
        assert len(set(read.tolist())) == 1
    mistaken = (rank >= layout.zone) & (found != OOV_ROW)
    assert (mistaken.sum() > 5) == (layout.zone < 20_002)
    assert (found[mistaken] < RESERVED_ROWS + layout.count).all(), "none is taken for an id with a row of its own"


def test_ids_of_several_tables_share_a_file(tmp_path: Path) -> None:
    trained = {"a": IdMap(30, random_keys(30, 1)), "h": IdMap(9), "b": IdMap(40, random_keys(40, 2)), "p": IdMap(9)}
    names = {"a": "tiers", "h": "whole", "b": "forgotten", "p": "tiers and clusters"}
    layouts = {n: layout_of(m, **LAYOUTS[names[n]]) for n, m in trained.items()}
    infos = {n: info_of(m, n) for n, m in trained.items()}
    write_ids(tmp_path / "ids.arrow", trained, layouts)
    own = read_ids(tmp_path / "ids.arrow", infos, [table_of(n, layouts[n]) for n in reversed(trained)])
    assert list(own) == list(trained)
    for name, id_map in trained.items():
        keys = np.arange(id_map.size, dtype=np.uint64) if id_map.keys is None else id_map.keys
        assert np.array_equal(own[name].rows(keys), target_rows(id_map, layouts[name])[2:])


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vocabulary", "hash"])
@pytest.mark.parametrize("rows", [[3, 13, 4], [4, 12, 5], [4, 12], [4, 12, 4, 0, 0], [-1, 17, 4], []])
def test_ids_that_do_not_hold_what_they_say_are_refused(tmp_path: Path, kind: str, rows: list[int]) -> None:
    trained = IdMap(20, random_keys(20) if kind == "vocabulary" else None)
    layout = layout_of(trained, [0.2, 0.8], count=1)
    _, path = written(tmp_path, trained, layout)
    table = read_arrow(path)
    assert table["rows"].to_pylist() == [[4, 12, 4]]
    column = table.schema.get_field_index("rows")
    changed = table.set_column(column, table.schema.field(column), pa.array([rows], pa.list_(pa.int64())))
    write_arrow(changed, tmp_path / "changed.arrow")
    with pytest.raises(ArtifactError, match=r"changed\.arrow: table t: .*restore the file"):
        read_ids(tmp_path / "changed.arrow", {"t": info_of(trained)}, [table_of("t", layout)])


def test_ids_of_other_tables_are_refused(tmp_path: Path) -> None:
    layout = layout_of(IdMap(20), [1.0])
    _, path = written(tmp_path, IdMap(20), layout)
    with pytest.raises(ArtifactError, match=r"holds the ids of \['t'\], the tables are \['u'\]"):
        read_ids(path, {"u": info_of(IdMap(20), "u")}, [table_of("u", layout)])


@pytest.mark.parametrize("kind", ["vocabulary", "hash"])
@pytest.mark.parametrize("name", ["whole", "tiers, clusters, forgotten"])
def test_bytes_left_over_or_missing_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    trained, _ = trained_ids(kind, 300)
    layout = layout_of(trained, **LAYOUTS[name])
    _, path = written(tmp_path, trained, layout)
    table = read_arrow(path)
    packed = table["packed"][0].as_py()
    column = table.schema.get_field_index("packed")
    for wrong in (packed + b"\0", packed[:-1] if packed else b"x"):
        changed = table.set_column(column, table.schema.field(column), pa.array([wrong], pa.large_binary()))
        write_arrow(changed, tmp_path / "changed.arrow")
        with pytest.raises(ArtifactError, match=r"changed\.arrow: table t: .*restore the file"):
            read_ids(tmp_path / "changed.arrow", {"t": info_of(trained)}, [table_of("t", layout)])
