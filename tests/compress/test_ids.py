"""compress/ids.py: packed keys, where training rows lie, and what a raw key becomes after writing and reading.

Legend: N training rows, K rows of a segment.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from compress_builders import stored

import compress.ids
from compress.errors import ArtifactError
from compress.ids import (
    FALSE_KNOWN,
    MIN_KEY_BITS,
    Layout,
    id_map_bytes,
    key_bits,
    pack_numbers,
    pack_sorted,
    packed_bytes,
    prefix_key_bits,
    read_ids,
    segment_bits,
    target_rows,
    unpack_numbers,
    unpack_sorted,
    write_ids,
)
from compress.lookup import StoredTable
from compress.methods.prune import frequency_order
from trainer.data.transform import MISSING_ROW, OOV_ROW, RESERVED_ROWS, IdMap, TableInfo, read_arrow, write_arrow


def random_keys(size: int, seed: int = 0) -> np.ndarray:
    """Sorted distinct 64-bit keys."""
    keys = np.random.default_rng(seed).integers(0, 2**64, size, dtype=np.uint64)
    keys = np.unique(keys)
    assert len(keys) == size
    return keys


def layout_of(rows: int, cuts: list[float], bands: list[float] | None = None, shared: bool = False) -> Layout:
    """Rows in a random order; cuts and bands are shares of those that are not reserved."""
    order = frequency_order(np.random.default_rng(rows).integers(0, 50, rows))

    def rank(share: float) -> int:
        return RESERVED_ROWS + round(share * (rows - RESERVED_ROWS))

    ends = tuple(rank(c) for c in cuts)
    if bands is None:
        bands = [1.0] if ends[-1] < rows and not shared else []
    return Layout(order, ends, tuple(rank(b) for b in bands), shared)


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
    sizes[0] += len(layout.bands)
    tiers = stored(name, sizes.tolist(), 8, [8] * len(sizes), (name,)).tiers
    return StoredTable(name, 8, 8, tiers, (name,), len(layout.bands))


def naive_rows(trained: IdMap, layout: Layout) -> np.ndarray:
    """Where each training row lies, one by one: reserved rows, centroids, then tier by tier by key or training row."""
    found: dict[int, int] = {0: OOV_ROW, 1: MISSING_ROW}
    keys = None if trained.keys is None else [0, 0, *(int(k) for k in trained.keys_by_row())]
    following = RESERVED_ROWS + len(layout.bands)
    begin = RESERVED_ROWS
    for cut in layout.cuts:
        inside = sorted((int(r) for r in layout.order[begin:cut]), key=lambda r: r if keys is None else keys[r])
        for row in inside:
            found[row] = following
            following += 1
        begin = cut
    for band, end in enumerate(layout.bands):
        for row in layout.order[begin:end]:
            found[int(row)] = RESERVED_ROWS + band
        begin = end
    return np.array([found.get(r, OOV_ROW) for r in range(len(layout.order))])


def bytes_stored(path: Path) -> int:
    """Bytes of packed numbers in the file."""
    return sum(len(packed.as_py()) for packed in read_arrow(path)["packed"])


LAYOUTS = {
    "whole": ([1.0], None, False),
    "cut": ([0.4], None, False),
    "all cut": ([0.0], None, False),
    "tiers": ([0.1, 0.3, 1.0], None, False),
    "tiers, cut": ([0.05, 0.3, 0.31, 0.6], None, False),
    "bands": ([0.2], [0.5, 0.6, 1.0], False),
    "tiers and bands": ([0.1, 0.2], [0.25, 0.9, 1.0], False),
    "forgotten": ([0.5], None, True),
    "tiers, forgotten": ([0.1, 0.4], None, True),
    "all forgotten": ([0.0], None, True),
    "first tier reserved": ([0.0, 0.5], None, False),
}


# -- key bits --------------------------------------------------------------------------------------------------------


def naive_bits(keys: np.ndarray) -> int:
    """The least width, by trying each."""
    for bits in range(MIN_KEY_BITS, 64):
        if len(keys) <= FALSE_KNOWN * 2.0**bits and len(set((keys >> np.uint64(64 - bits)).tolist())) == len(keys):
            return bits
    return 64


@pytest.mark.parametrize("size", [0, 1, 2, 6, 7, 100, 3000])
def test_key_bits_are_the_least_that_keep_keys_apart_and_unknown_ids_unknown(size: int) -> None:
    keys = random_keys(size)
    assert key_bits(keys) == naive_bits(keys)
    spread = np.arange(size, dtype=np.uint64) << np.uint64(50)
    assert key_bits(spread) == naive_bits(spread) == max(16, int(np.ceil(np.log2(max(size, 1) / FALSE_KNOWN))))


@pytest.mark.parametrize("alike", [15, 16, 17, 40, 62, 63])
def test_key_bits_tell_two_keys_apart_and_no_more(alike: int) -> None:
    """Two keys whose first `alike` bits are the same need one bit more."""
    first = np.uint64(0x1122334455667700)
    second = first ^ (np.uint64(1) << np.uint64(63 - alike))
    keys = np.array([5, first, second, 2**63], dtype=np.uint64)
    assert key_bits(np.sort(keys)) == max(alike + 1, 16)


@pytest.mark.parametrize("seed", range(8))
def test_prefix_key_bits_equal_a_search_at_each_count(seed: int) -> None:
    """Keys in any order, some of them alike for many bits, as they are by rank."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 2**64, 60, dtype=np.uint64)
    for _ in range(12):  # near twins of some
        one, other = rng.integers(0, 60, 2)
        keys[one] = keys[other] ^ (np.uint64(1) << np.uint64(rng.integers(0, 50)))
    keys = rng.permutation(np.unique(keys))
    counts = np.unique(rng.integers(0, len(keys) + 1, 20))
    found = prefix_key_bits(keys, counts)
    assert found.tolist() == [naive_bits(keys[:count]) for count in counts]
    assert (np.diff(found) >= 0).all()
    assert found[-1] > 20


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


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 3, 8, 1001])
def test_small_numbers_come_back(bits: int, count: int) -> None:
    numbers = np.random.default_rng(bits).integers(0, 2**bits, count).astype(np.uint8)
    packed = pack_numbers(numbers, bits)
    assert len(packed) == -(-count * bits // 8)
    assert np.array_equal(unpack_numbers(np.frombuffer(packed or b"", dtype=np.uint8), count, bits), numbers)


def test_segment_bits_hold_the_last_segments_number() -> None:
    assert [segment_bits(s) for s in (1, 2, 3, 4, 5, 16, 17, 70, 256)] == [1, 1, 2, 2, 4, 4, 8, 8, 8]


# -- where rows lie --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 50, 997])
@pytest.mark.parametrize("kind", ["vocabulary", "extended", "hash"])
def test_ids_lie_where_a_naive_count_puts_them(tmp_path: Path, name: str, size: int, kind: str) -> None:
    """The packer's rows, the naive ones, and what the id map that was written sends each key to."""
    keys = random_keys(size)
    trained = IdMap(size, keys)
    if kind == "extended":
        keys = np.random.default_rng(3).permutation(keys)
        trained = IdMap.of_rows(keys)
    elif kind == "hash":
        keys = np.arange(size, dtype=np.uint64)
        trained = IdMap(size)
    layout = layout_of(size + RESERVED_ROWS, *LAYOUTS[name])
    target = target_rows(trained, layout)
    assert target.dtype == np.int32
    if kind == "hash" and name == "whole":  # untouched: it keeps its order
        assert target.tolist() == list(range(size + RESERVED_ROWS))
    else:
        assert np.array_equal(target, naive_rows(trained, layout))
    own, path = written(tmp_path, trained, layout)
    assert np.array_equal(own.rows(keys), target[RESERVED_ROWS:])
    assert (own.row(OOV_ROW), own.row(MISSING_ROW)) == (OOV_ROW, MISSING_ROW)
    kept = target[layout.order[: layout.kept]]
    assert len(np.unique(kept)) == layout.kept, "kept rows have rows of their own"
    assert target.max() < table_of("t", layout).rows
    bits = None if trained.keys is None else key_bits(keys[layout.order[RESERVED_ROWS:] - RESERVED_ROWS])
    if bits is not None and layout.shared:
        by_row = trained.keys_by_row()
        bits = key_bits(by_row[layout.order[RESERVED_ROWS : layout.kept] - RESERVED_ROWS])
    assert id_map_bytes(size + RESERVED_ROWS, layout, bits) == bytes_stored(path)


def test_rows_of_a_sample_that_are_all_kept_lie_behind_the_centroids() -> None:
    """A trial's layout: no row of the sample is cut, and its table has centroids all the same."""
    layout = Layout(np.arange(6), (6,), (6, 6))
    assert target_rows(IdMap(0), layout).tolist() == [0, 1, 4, 5, 6, 7]


def test_ids_of_an_untouched_hash_table_cost_nothing(tmp_path: Path) -> None:
    trained = IdMap(100)
    own, path = written(tmp_path, trained, layout_of(102, [1.0]))
    assert own.remap is None
    assert bytes_stored(path) == 0


def test_ids_of_an_empty_vocabulary_are_all_unknown(tmp_path: Path) -> None:
    own, path = written(tmp_path, IdMap(0, np.zeros(0, dtype=np.uint64)), Layout(np.arange(2), (2,)))
    assert own.rows(random_keys(10)).tolist() == [0] * 10
    assert (own.row(OOV_ROW), own.row(MISSING_ROW)) == (0, 1)
    assert bytes_stored(path) == 0


def test_ids_of_adjacent_hashes_stay_apart(tmp_path: Path) -> None:
    """Full-width keys: a neighbour of a known key by one is unknown."""
    keys = np.array([7, 8, 9, 2**63, 2**64 - 1], dtype=np.uint64)
    layout = layout_of(7, [0.4, 1.0])
    own, _ = written(tmp_path, IdMap(5, keys), layout)
    assert np.array_equal(own.rows(keys), naive_rows(IdMap(5, keys), layout)[2:])
    assert own.rows(np.array([0, 6, 10, 11, 2**63 + 1, 2**64 - 2], dtype=np.uint64)).tolist() == [0] * 6


@pytest.mark.parametrize("name", ["whole", "tiers and bands", "tiers, forgotten"])
def test_unknown_ids_are_taken_for_known_ones_as_rarely_as_told(tmp_path: Path, name: str) -> None:
    """Of a million strange ids: within five standard deviations of the expected, and no more than is allowed."""
    keys = random_keys(2000)
    layout = layout_of(2002, *LAYOUTS[name])
    own, path = written(tmp_path, IdMap(2000, keys), layout)
    strange = np.random.default_rng(9).integers(0, 2**64, 1_000_000, dtype=np.uint64)
    mistaken = int((own.rows(strange) != OOV_ROW).sum())
    known = layout.kept - RESERVED_ROWS if layout.shared else 2000
    expected = 1e6 * known / 2.0 ** read_arrow(path)["bits"][0].as_py()
    assert expected <= 1e6 * FALSE_KNOWN
    assert abs(mistaken - expected) < 5 * np.sqrt(expected) + 1


def test_forgotten_ids_are_taken_for_kept_ones_as_rarely_as_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are unknown ids: a shortened hash may be a kept one's. Kept ids are never mistaken."""
    monkeypatch.setattr(compress.ids, "FALSE_KNOWN", 0.02)
    monkeypatch.setattr(compress.ids, "MIN_KEY_BITS", 4)
    keys = random_keys(20_000)
    trained, layout = IdMap(20_000, keys), layout_of(20_002, [0.1], shared=True)
    own, _ = written(tmp_path, trained, layout)
    target, found = target_rows(trained, layout)[RESERVED_ROWS:], own.rows(keys)
    forgotten = target == OOV_ROW
    assert forgotten.sum() == 18_000
    assert np.array_equal(found[~forgotten], target[~forgotten])
    assert (found[forgotten] != OOV_ROW).mean() < 0.03


def test_ids_of_several_tables_share_a_file(tmp_path: Path) -> None:
    trained = {"a": IdMap(30, random_keys(30, 1)), "h": IdMap(9), "b": IdMap(40, random_keys(40, 2)), "p": IdMap(9)}
    names = {"a": "tiers", "h": "whole", "b": "forgotten", "p": "tiers and bands"}
    layouts = {n: layout_of(m.size + 2, *LAYOUTS[names[n]]) for n, m in trained.items()}
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
    layout = layout_of(22, [0.2, 0.8])
    _, path = written(tmp_path, trained, layout)
    table = read_arrow(path)
    assert table["rows"].to_pylist() == [[4, 12, 4]]
    column = table.schema.get_field_index("rows")
    changed = table.set_column(column, table.schema.field(column), pa.array([rows], pa.list_(pa.int64())))
    write_arrow(changed, tmp_path / "changed.arrow")
    with pytest.raises(ArtifactError, match=r"changed\.arrow: table t: .*restore the file"):
        read_ids(tmp_path / "changed.arrow", {"t": info_of(trained)}, [table_of("t", layout)])


def test_ids_of_other_tables_are_refused(tmp_path: Path) -> None:
    layout = layout_of(22, [1.0])
    _, path = written(tmp_path, IdMap(20), layout)
    with pytest.raises(ArtifactError, match=r"holds the ids of \['t'\], the tables are \['u'\]"):
        read_ids(path, {"u": info_of(IdMap(20), "u")}, [table_of("u", layout)])
