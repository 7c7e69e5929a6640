"""compress/ids.py: key widths, and what a raw key becomes after writing and reading an id map.

Legend: N training rows, K kept rows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compress.ids import FALSE_KNOWN, MIN_KEY_BYTES, artifact_rows, id_map_bytes, key_bytes, read_ids, write_ids
from compress.methods.prune import frequency_order
from trainer.data.transform import MISSING_ROW, OOV_ROW, RESERVED_ROWS, IdMap, TableInfo, read_arrow


def random_keys(size: int, seed: int = 0) -> np.ndarray:
    """Sorted distinct 64-bit keys."""
    keys = np.random.default_rng(seed).integers(0, 2**64, size, dtype=np.uint64)
    keys = np.unique(keys)
    assert len(keys) == size
    return keys


def stored(
    tmp_path: Path, trained: IdMap, cut: int | None = None, seed: int = 0
) -> tuple[IdMap, np.ndarray, Path, TableInfo]:
    """One id map written and read: the map read, the order, the file, the table."""
    rows = trained.size + RESERVED_ROWS
    order = frequency_order(np.random.default_rng(seed).integers(0, 50, rows))
    kind = "hash" if trained.keys is None else "vocabulary"
    info = TableInfo("t", kind, rows, 8, ("t",))
    path = tmp_path / f"ids-{cut}-{rows}.arrow"
    write_ids(path, {"t": trained}, {"t": order}, {"t": rows if cut is None else cut})
    return read_ids(path, {"t": info}, {"t": rows if cut is None else cut})["t"], order, path, info


def bytes_stored(path: Path) -> int:
    """Bytes of keys and remap in the file."""
    table = read_arrow(path)
    return sum(len(table[c][i].as_py()) for c in ("keys", "remap") for i in range(len(table)))


# -- key_bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2, 100, 1677])
def test_key_bytes_of_a_small_vocabulary_is_the_least(size: int) -> None:
    spread = np.arange(size, dtype=np.uint64) << np.uint64(40)  # the third byte tells them apart
    assert key_bytes(spread) == MIN_KEY_BYTES


def test_key_bytes_grow_with_the_vocabulary_so_that_unknown_ids_stay_unknown() -> None:
    spread = np.arange(1700, dtype=np.uint64) << np.uint64(40)
    assert 1677 / 2**24 <= FALSE_KNOWN < 1700 / 2**24
    assert key_bytes(spread) == 4


@pytest.mark.parametrize("shared", [3, 4, 5, 6, 7])
def test_key_bytes_tell_keys_apart_and_no_more(shared: int) -> None:
    """Two keys whose first `shared` bytes are the same need one byte more."""
    first = np.uint64(0x1122334455667700)
    second = first + (np.uint64(1) << np.uint64(64 - 8 * (shared + 1)))
    keys = np.array([5, first, second, 2**63], dtype=np.uint64)
    assert key_bytes(np.sort(keys)) == shared + 1


@pytest.mark.parametrize("size", [10, 3000, 20_000])
def test_key_bytes_of_random_keys_are_minimal_and_collision_free(size: int) -> None:
    keys = random_keys(size)
    width = key_bytes(keys)

    def good(bytes_: int) -> bool:
        short = keys >> np.uint64(64 - 8 * bytes_)
        return len(np.unique(short)) == size and size / 2.0 ** (8 * bytes_) <= FALSE_KNOWN

    assert good(width)
    assert width == MIN_KEY_BYTES or not good(width - 1)


# -- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 50, 5000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_ids_of_a_vocabulary_map_to_rank_centroid_oov_and_missing(tmp_path: Path, size: int, share: float) -> None:
    keys = random_keys(size)
    rows = size + RESERVED_ROWS
    cut = RESERVED_ROWS + int(share * size)
    own, order, _, _ = stored(tmp_path, IdMap(size, keys), cut)
    rank = np.empty(rows, dtype=np.int64)
    rank[order] = np.arange(rows)
    found = own.rows(keys)
    expected = rank[RESERVED_ROWS:]
    kept = expected < cut
    assert np.array_equal(found[kept], expected[kept])
    assert (found[~kept] == cut).all()
    assert int(kept.sum()) == cut - RESERVED_ROWS
    assert own.row(OOV_ROW) == 0
    assert own.row(MISSING_ROW) == 1


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_ids_of_an_extended_vocabulary_map_to_the_ranks_of_their_rows(tmp_path: Path, share: float) -> None:
    keys = np.concatenate([random_keys(300), random_keys(80, seed=5), random_keys(7, seed=6)])  # extended twice
    trained = IdMap.of_rows(keys)
    cut = RESERVED_ROWS + int(share * len(keys))
    own, order, _, _ = stored(tmp_path, trained, cut)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    assert np.array_equal(own.rows(keys), np.minimum(rank[RESERVED_ROWS:], cut))
    assert np.array_equal(artifact_rows(trained, order, cut)[RESERVED_ROWS:], own.rows(keys))


def test_ids_unknown_to_a_vocabulary_go_to_row_0(tmp_path: Path) -> None:
    keys = random_keys(2000)
    own, *_ = stored(tmp_path, IdMap(2000, keys), 500)
    strange = np.setdiff1d(random_keys(50_000, seed=9), keys)
    found = own.rows(strange)
    assert set(np.unique(found)) <= set(range(501))
    assert (found != OOV_ROW).mean() <= 3 * FALSE_KNOWN  # shortened hashes may take a few for known


def test_ids_of_adjacent_hashes_stay_apart(tmp_path: Path) -> None:
    """Full-width keys: a neighbour of a known key by one is unknown."""
    keys = np.array([7, 8, 10, 2**63, 2**64 - 1], dtype=np.uint64)
    own, order, _, _ = stored(tmp_path, IdMap(5, keys))
    rank = np.empty(7, dtype=np.int64)
    rank[order] = np.arange(7)
    assert np.array_equal(own.rows(keys), rank[2:])
    assert own.rows(np.array([0, 6, 9, 11, 2**63 + 1, 2**64 - 2], dtype=np.uint64)).tolist() == [0] * 6


def test_ids_of_an_empty_vocabulary_are_all_unknown(tmp_path: Path) -> None:
    own, _, path, _ = stored(tmp_path, IdMap(0, np.zeros(0, dtype=np.uint64)))
    assert own.rows(random_keys(10)).tolist() == [0] * 10
    assert (own.row(OOV_ROW), own.row(MISSING_ROW)) == (0, 1)
    assert bytes_stored(path) == 0


def test_ids_of_an_unpruned_hash_table_stay_where_they_are(tmp_path: Path) -> None:
    trained = IdMap(100)
    own, _, path, _ = stored(tmp_path, trained)
    keys = random_keys(500)
    assert np.array_equal(own.rows(keys), trained.rows(keys))
    assert own.remap is None
    assert bytes_stored(path) == 0


@pytest.mark.parametrize("cut", [2, 3, 40, 101])
def test_ids_of_a_pruned_hash_table_map_to_rank_or_centroid(tmp_path: Path, cut: int) -> None:
    trained = IdMap(100)
    own, order, _, _ = stored(tmp_path, trained, cut)
    rank = np.empty(102, dtype=np.int64)
    rank[order] = np.arange(102)
    keys = random_keys(2000)
    assert np.array_equal(own.rows(keys), np.minimum(rank[trained.rows(keys)], cut))
    assert (own.row(OOV_ROW), own.row(MISSING_ROW)) == (0, 1)


def test_ids_of_several_tables_share_a_file(tmp_path: Path) -> None:
    first, second = random_keys(30, 1), random_keys(40, 2)
    trained = {"a": IdMap(30, first), "h": IdMap(9), "b": IdMap(40, second), "p": IdMap(9)}
    orders = {n: frequency_order(np.arange(m.size + 2)) for n, m in trained.items()}
    cuts = {"a": 32, "h": 11, "b": 12, "p": 4}
    infos = {n: TableInfo(n, "hash", m.size + 2, 8, (n,)) for n, m in trained.items()}
    write_ids(tmp_path / "ids.arrow", trained, orders, cuts)
    own = read_ids(tmp_path / "ids.arrow", infos, cuts)
    assert list(own) == list(trained)
    for name, keys in {"a": first, "b": second}.items():
        rows = len(orders[name])
        assert np.array_equal(own[name].rows(keys), np.minimum(np.arange(rows - 1, 1, -1), cuts[name]))
    nine = np.arange(9, dtype=np.uint64)
    assert np.array_equal(own["h"].rows(nine), np.arange(2, 11))
    assert np.array_equal(own["p"].rows(nine), np.minimum(np.arange(10, 1, -1), 4))


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 300, 5000])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["vocabulary", "hash"])
def test_id_map_bytes_are_those_stored(tmp_path: Path, size: int, share: float, kind: str) -> None:
    if kind == "hash" and size == 0:
        size = 2
    trained = IdMap(size, random_keys(size) if kind == "vocabulary" else None)
    rows = size + RESERVED_ROWS
    cut = RESERVED_ROWS + int(share * size)
    _, _, path, _ = stored(tmp_path, trained, cut)
    assert id_map_bytes(trained, rows, cut) == bytes_stored(path)


# -- artifact_rows ---------------------------------------------------------------------------------------------------


def test_artifact_rows_agree_with_the_map_that_is_read(tmp_path: Path) -> None:
    """Where the packer puts a training row is where the id map sends its key."""
    keys = random_keys(200)
    for trained, cut in ((IdMap(200, keys), 60), (IdMap(200, keys), 202), (IdMap(200), 60), (IdMap(200), 202)):
        own, order, _, _ = stored(tmp_path, trained, cut)
        target = artifact_rows(trained, order, cut)
        assert target.dtype == np.int32
        assert np.array_equal(own.rows(keys), target[trained.rows(keys)])
        assert target[:RESERVED_ROWS].tolist() == [0, 1]
        assert len(np.unique(target)) == min(cut + 1, 202)
