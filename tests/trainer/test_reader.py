"""trainer/data/reader.py: each row once an epoch, in an order of seed and epoch alone."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trainer_builders import make_dataset

from trainer.data import digest
from trainer.data import reader as reader_module
from trainer.data.digest import epoch_digest, row_digest
from trainer.data.reader import Reader, read_split
from trainer.data.transform import OOV_ROW
from trainer.errors import ConfigError, DataError

ROW = -1  # the dense column that numbers the rows


@pytest.fixture(
    scope="module", params=[(1 << 20, 1 << 20), (1 << 20, 0), (30, 0)], ids=["whole", "one window", "small windows"]
)
def window_rows(request):
    """A split shuffled whole, one that fits one window, and one of many windows, each a few row groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "WINDOW_ROWS", request.param[0])
        patch.setattr(reader_module, "WHOLE_ROWS", request.param[1])
        yield request.param[0]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Data sets by their training rows, made when first asked for."""
    made = {}

    def get(rows: int):
        if rows not in made:
            made[rows] = make_dataset(tmp_path_factory.mktemp(f"rows{rows}"), rows, files=3, row_group_rows=9)
        return made[rows]

    return get


def numbers(batch) -> list[int]:
    return [int(x) for x in batch.dense[:, ROW]]


def epoch_of(dataset, world_size: int, batch_size: int = 20, epoch: int = 0, start: int = 0, **options):
    """Global batches of an epoch, each as its ranks' row numbers in rank order."""
    make = partial(Reader, dataset, "train", batch_size, world_size=world_size, **options)
    ranks = [list(make(rank=r).batches(epoch, start)) for r in range(world_size)]
    assert len({len(r) for r in ranks}) == 1, "every rank takes as many steps"
    batches = []
    for slices in zip(*ranks, strict=True):
        rows = [n for batch, _ in slices for n in numbers(batch)]
        assert {size for _, size in slices} == {len(rows)}, "the size told is the global batch's"
        batches.append(rows)
    return batches


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [201, 203, 217])
@pytest.mark.parametrize("shuffle", [False, True])
def test_reader_gives_every_row_once_over_the_ranks(datasets, window_rows, rows, world_size, shuffle):
    batches = epoch_of(datasets(rows), world_size, shuffle=shuffle)
    assert sorted(n for b in batches for n in b) == list(range(rows))


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("rows", [200, 217])
def test_reader_gives_the_same_global_batches_to_any_number_of_workers(datasets, window_rows, rows, world_size):
    alone = epoch_of(datasets(rows), 1, shuffle=True, seed=3)
    assert epoch_of(datasets(rows), world_size, shuffle=True, seed=3) == alone
    assert epoch_of(datasets(rows), world_size, lanes=12) == epoch_of(datasets(rows), 1, lanes=12)
    mean = rows / len(alone)
    assert len(alone) == (10 if rows == 200 else 11)
    assert all(abs(len(b) - mean) < 2 for b in alone)


@pytest.mark.parametrize("shuffle", [False, True])
def test_reader_of_tiny_data_gives_each_rank_a_row_of_each_batch(tmp_path, shuffle):
    """Rows 1..60 with batches from one row to all: whatever fits gives each row once, and the same batches."""
    dataset = make_dataset(tmp_path, 60, files=2, row_group_rows=7)
    files = dataset.files["train"]
    for rows in range(1, 61):
        dataset.files["train"] = cut_files(files, rows)
        for batch_size in {1, 2, 3, 4, 5, 11, 12, 13, 20, 23, rows, 100}:
            seen = set()
            for world_size in range(1, 5):
                make = partial(Reader, dataset, "train", batch_size, world_size=world_size, shuffle=shuffle, lanes=12)
                if world_size > min(rows, batch_size):
                    with pytest.raises(ConfigError, match=f"fewer than {world_size} workers"):
                        make()
                    continue
                readers = [make(rank=r) for r in range(world_size)]
                shares = [
                    [[range(*reader._share(lane.number, b)) for lane in reader._lanes(0, 0)] for b in range(n)]
                    for reader in readers
                    for n in [reader.num_batches()]
                ]
                assert all(sum(map(len, batch)) for rank in shares for batch in rank), "a rank without a row"
                sizes = [sum(sum(map(len, rank[b])) for rank in shares) for b in range(len(shares[0]))]
                assert sum(sizes) == rows
                assert sizes == [readers[0].batch_rows(b) for b in range(len(sizes))]
                assert len(sizes) * batch_size >= rows or len(sizes) == rows // readers[0].lanes
                seen.add(tuple(sizes))
            assert len(seen) == 1, "the same batches for any number of workers"


def cut_files(files, rows: int):
    """The first `rows` rows of some files, as their row groups' sizes would say."""
    cut = []
    for file in files:
        groups = []
        for size in file.row_groups:
            groups.append(min(size, rows))
            rows -= groups[-1]
        cut.append(replace(file, row_groups=tuple(g for g in groups if g)))
    return cut


@pytest.mark.parametrize("rows", [2, 5, 11, 12, 13, 25, 40])
@pytest.mark.parametrize("batch_size", [1, 3, 12, 13, 64])
def test_reader_of_tiny_data_gives_every_row_once(datasets, rows, batch_size):
    dataset = datasets(rows)
    alone = epoch_of(dataset, 1, batch_size, shuffle=True)
    assert sorted(n for b in alone for n in b) == list(range(rows))
    for world_size in range(2, min(rows, batch_size, 4) + 1):
        assert epoch_of(dataset, world_size, batch_size, shuffle=True) == alone


def test_reader_for_more_workers_than_lanes_is_refused(datasets):
    with pytest.raises(ConfigError, match="lanes 12: fewer than 13 workers .*: use 12 workers at most, or .*lanes 13"):
        Reader(datasets(203), "train", 64, world_size=13, shuffle=True)
    Reader(datasets(203), "train", 64, world_size=13, shuffle=True, lanes=13)
    with pytest.raises(ConfigError, match="batch_size 2: fewer than 3 workers"):
        Reader(datasets(203), "train", 2, world_size=3)


# -- what is decoded -------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """Row groups in the order they are decoded, as (file, row group)."""
    seen: list[tuple[str, int]] = []
    original = reader_module.read_chunk

    def counted(dataset, chunk):
        seen.append((chunk.path, chunk.row_group))
        return original(dataset, chunk)

    monkeypatch.setattr(reader_module, "read_chunk", counted)
    monkeypatch.setattr(reader_module, "WHOLE_ROWS", 0)
    return seen


@pytest.mark.parametrize("options", [{"shuffle": True}, {"shuffle": True, "lanes": 24}, {}, {"lanes": 12}], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_reader_decodes_only_its_ranks_row_groups_and_each_once(datasets, window_rows, decoded, world_size, options):
    dataset = datasets(217)
    groups = {(f.path, g) for f in dataset.files["train"] for g in range(len(f.row_groups))}
    by_rank = []
    for rank in range(world_size):
        decoded.clear()
        list(Reader(dataset, "train", 20, rank=rank, world_size=world_size, **options).slices())
        assert len(set(decoded)) == len(decoded), "decoded once by a rank"
        by_rank.append(set(decoded))
    assert set.union(*by_rank) == groups
    # a row group across the cut between two ranks is read by both: one at most for each cut
    assert sum(map(len, by_rank)) - len(groups) <= world_size - 1


def test_reader_of_a_small_split_shuffles_it_whole_and_reads_it_once(datasets, decoded, monkeypatch):
    monkeypatch.setattr(reader_module, "WHOLE_ROWS", 217)
    reader = Reader(datasets(217), "train", 20, rank=1, world_size=2, shuffle=True)
    orders = [np.concatenate([rows.index for rows, _ in reader.slices(epoch)]) for epoch in (0, 1)]
    assert len(decoded) == len(set(decoded)) == sum(len(f.row_groups) for f in reader.dataset.files["train"])
    assert not np.array_equal(*orders)
    # a rank's rows come from everywhere, which lanes cut from a line of row groups could not give it
    assert len({int(n) * 12 // 217 for n in orders[0]}) == 12


def test_reader_whose_row_groups_fit_the_lanes_decodes_each_by_one_rank(tmp_path, decoded):
    dataset = make_dataset(tmp_path, 12 * 8, files=1, row_group_rows=4)  # two row groups a lane
    for world_size in (2, 3, 4):
        decoded.clear()
        for rank in range(world_size):
            list(Reader(dataset, "train", 24, rank=rank, world_size=world_size, shuffle=True).slices())
        assert len(decoded) == len(set(decoded)) == 24


def test_reader_resumes_without_decoding_what_is_behind(datasets, decoded, monkeypatch):
    monkeypatch.setattr(reader_module, "WINDOW_ROWS", 1)
    list(Reader(datasets(217), "train", 20, shuffle=True).slices(start=10))
    assert 0 < len(decoded) <= 12


def test_reader_holds_no_more_than_its_windows(datasets, monkeypatch):
    monkeypatch.setattr(reader_module, "WINDOW_ROWS", 12 * 9)
    lanes = Reader(datasets(217), "train", 20, shuffle=True)._lanes(0, 0)
    assert all(sum(p.rows for p in w.pieces) <= 9 for lane in lanes for w in lane.ahead)
    assert sum(w.end - w.first for lane in lanes for w in lane.ahead) == 217


# -- row numbers, digests, parts of an epoch -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"shuffle": True}, {}], ids=str)
def test_reader_rows_carry_their_number(datasets, window_rows, options):
    for rows, _ in Reader(datasets(203), "train", 20, rank=1, world_size=2, **options).slices():
        np.testing.assert_array_equal(rows.index, rows.encoded.dense[:, ROW].astype(np.int64))
        assert rows.index.dtype == np.int64
        assert rows.take(np.array([2, 0])).index.tolist() == rows.index[[2, 0]].tolist()
    np.testing.assert_array_equal(read_split(datasets(203), "train", 50).index, np.arange(50))


def test_digests_of_the_parts_add_up_to_the_epochs(datasets):
    for epoch in (0, 3):
        parts = [
            row_digest(rows.index, epoch)
            for rank in range(3)
            for rows, _ in Reader(datasets(203), "train", 20, rank=rank, world_size=3, shuffle=True).slices(epoch)
        ]
        assert sum(parts) % 2**64 == epoch_digest(203, epoch)


def test_digest_tells_a_row_lost_doubled_swapped_or_of_another_epoch():
    whole = np.arange(1000)
    assert row_digest(whole[::-1], 2) == epoch_digest(1000, 2) != epoch_digest(1000, 1)
    for other in (whole[1:], np.append(whole, 7), np.where(whole == 7, 8, whole), whole + 1):
        assert row_digest(other, 2) != epoch_digest(1000, 2)
    assert row_digest(np.array([1]), 2) != row_digest(np.array([2]), 1)
    assert row_digest(whole[:0], 0) == epoch_digest(0, 0) == 0


def test_epoch_digest_is_taken_in_parts(monkeypatch):
    expected = epoch_digest(1000, 5)
    monkeypatch.setattr(digest, "DIGEST_ROWS", 77)
    assert epoch_digest(1000, 5) == expected


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("world_size", [1, 3])
def test_reader_of_a_fraction_gives_the_first_batches_of_the_epoch(datasets, window_rows, fraction, world_size):
    whole = epoch_of(datasets(217), 1, epoch=4, shuffle=True)
    part = epoch_of(datasets(217), world_size, epoch=4, shuffle=True, fraction=fraction)
    assert part == whole[: max(round(11 * fraction), 1)]
    reader = Reader(datasets(217), "train", 20, shuffle=True, fraction=fraction)
    assert reader.num_batches() == len(part)
    assert reader.epoch_rows() == sum(map(len, part))


def test_reader_of_a_fraction_takes_rows_from_all_over(datasets):
    (rows,) = epoch_of(datasets(200), 1, shuffle=True, fraction=0.1)
    assert max(rows) - min(rows) > 100


# -- a teacher -------------------------------------------------------------------------------------------------------


def write_teacher(dataset, folder, width: int = 1, groups: int = 9):
    """Log-odds row by row: a tenth of the row's number."""
    at = 0
    (folder / "train").mkdir(parents=True)
    for file in dataset.files["train"]:
        rows = sum(file.row_groups)
        logits = np.repeat(np.arange(at, at + rows, dtype=np.float32) / 10, width)
        table = pa.table({"logits": pa.FixedSizeListArray.from_arrays(pa.array(logits), width)})
        pq.write_table(table, folder / "train" / Path(file.path).name, row_group_size=groups)
        at += rows
    return folder


def test_reader_gives_the_teachers_logits_of_its_rows(datasets, tmp_path):
    dataset = datasets(203)
    folder = write_teacher(dataset, tmp_path / "teacher")
    for options in ({"shuffle": True}, {}):
        reader = Reader(dataset, "train", 20, rank=1, world_size=2, teacher=folder, **options)
        for rows, _ in reader.slices(epoch=1):
            np.testing.assert_allclose(rows.teacher, rows.index[:, None] / 10)
    assert next(Reader(dataset, "train", 20).slices())[0].teacher is None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"groups": 8}, "teacher has row groups"), ({"width": 2}, "teacher's column 'logits' is .*, it must be")],
)
def test_teacher_of_other_rows_or_tasks_is_refused(datasets, tmp_path, options, message):
    folder = write_teacher(datasets(203), tmp_path / "teacher", **options)
    with pytest.raises(DataError, match=message):
        Reader(datasets(203), "train", 20, teacher=folder)


def test_teacher_that_is_absent_is_refused(datasets, tmp_path):
    folder = write_teacher(datasets(203), tmp_path / "teacher")
    next((folder / "train").iterdir()).unlink()
    with pytest.raises(DataError, match="part-0.*: teacher cannot be read"):
        Reader(datasets(203), "train", 20, teacher=folder)


# -- resuming --------------------------------------------------------------------------------------------------------


def test_reader_of_a_split_smaller_than_a_batch_gives_one(datasets):
    batches = epoch_of(datasets(200), 3, batch_size=4096)
    assert [len(b) for b in batches] == [200]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_reader_ranks_get_about_equal_slices(datasets, world_size, shuffle):
    ranks = [
        Reader(datasets(217), "train", 60, rank=r, world_size=world_size, shuffle=shuffle) for r in range(world_size)
    ]
    for slices in zip(*[r.slices() for r in ranks], strict=True):
        sizes = [len(rows) for rows, _ in slices]
        assert max(sizes) - min(sizes) <= 12 // world_size


@pytest.mark.parametrize("start", [1, 6, 10])
@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 1), (3, 4), (4, 2)])
def test_reader_resumed_by_other_workers_gives_exactly_the_rest(datasets, window_rows, before, after, start):
    options = {"shuffle": True, "seed": 1, "epoch": 2}
    first = epoch_of(datasets(217), before, **options)[:start]
    rest = epoch_of(datasets(217), after, start=start, **options)
    assert sorted(n for b in first + rest for n in b) == list(range(217))


@pytest.mark.parametrize("world_size", [2, 3])
def test_reader_masks_do_not_depend_on_the_workers(datasets, world_size):
    make = partial(Reader, datasets(217), "train", 20, shuffle=True, oov_rate=0.3)
    alone = [rows.encoded.sparse["history"].values.tolist() for rows, _ in make().slices()]
    ranks = [make(rank=r, world_size=world_size).slices() for r in range(world_size)]
    shared = [
        [v for rows, _ in slices for v in rows.encoded.sparse["history"].values.tolist()]
        for slices in zip(*ranks, strict=True)
    ]
    assert shared == alone


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("start", [1, 4, 9, 10, 11])
def test_reader_resumes_with_the_batches_that_would_have_come(datasets, window_rows, world_size, start):
    options = {"shuffle": True, "seed": 1, "epoch": 2}
    assert (
        epoch_of(datasets(217), world_size, start=start, **options)
        == epoch_of(datasets(217), world_size, **options)[start:]
    )


def test_reader_resumes_with_the_same_masks(datasets):
    make = partial(Reader, datasets(217), "train", 20, shuffle=True, oov_rate=0.3)
    whole = [rows.encoded.sparse["history"].values.tolist() for rows, _ in make().slices(epoch=1)]
    resumed = [rows.encoded.sparse["history"].values.tolist() for rows, _ in make().slices(epoch=1, start=5)]
    assert resumed == whole[5:]


def test_reader_epochs_and_seeds_differ(datasets, window_rows):
    orders = [epoch_of(datasets(200), 1, epoch=e, seed=s, shuffle=True) for e, s in [(0, 0), (1, 0), (0, 1), (2, 0)]]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert orders[0] == epoch_of(datasets(200), 1, epoch=0, seed=0, shuffle=True)


def test_reader_epochs_differ_within_a_row_group(tmp_path):
    dataset = make_dataset(tmp_path, 40, files=1, row_group_rows=100)
    orders = [epoch_of(dataset, 1, batch_size=40, epoch=e, shuffle=True)[0] for e in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_reader_shuffles_across_the_split(datasets):
    first = epoch_of(datasets(200), 1, shuffle=True)[0]
    assert first != sorted(first)
    assert max(first) - min(first) > 100


def test_reader_without_shuffle_keeps_the_order(datasets, window_rows):
    batches = epoch_of(datasets(217), 1, epoch=5)
    assert [n for b in batches for n in b] == list(range(217))
    for rank in range(3):  # a rank's share is its own third of the split
        slices = list(Reader(datasets(217), "train", 20, rank=rank, world_size=3).batches(5))
        assert [n for b, _ in slices for n in numbers(b)] == list(range(217 * rank // 3, 217 * (rank + 1) // 3))


@pytest.mark.parametrize("shuffle", [False, True])
def test_reader_rows_keep_all_that_belongs_to_them(datasets, window_rows, shuffle):
    dataset = datasets(203)
    expected = read_split(dataset, "train")
    for rows, _ in Reader(dataset, "train", 20, rank=1, world_size=2, shuffle=shuffle).slices():
        index = rows.encoded.dense[:, ROW].astype(int)
        want = expected.take(index)
        np.testing.assert_array_equal(rows.labels, want.labels)
        np.testing.assert_array_equal(rows.encoded.dense, want.encoded.dense)
        for name, ragged in want.encoded.sparse.items():
            np.testing.assert_array_equal(rows.encoded.sparse[name].values, ragged.values, err_msg=name)
            np.testing.assert_array_equal(rows.encoded.sparse[name].lengths, ragged.lengths, err_msg=name)


def test_reader_batches_hold_what_its_slices_hold(datasets):
    make = partial(Reader, datasets(203), "train", 20, shuffle=True)
    for (batch, size), (rows, same) in zip(make().batches(), make().slices(), strict=True):
        assert size == same
        assert batch.labels.tolist() == rows.labels.tolist()
        assert batch.sparse["tags"].values().tolist() == rows.encoded.sparse["tags"].values.tolist()


def test_reader_masks_about_the_share_asked_for(datasets):
    dataset = datasets(217)
    plain = [r for r, _ in Reader(dataset, "train", 20).slices()]
    masked = [r for r, _ in Reader(dataset, "train", 20, oov_rate=0.25).slices()]
    hit = known = 0
    for before, after in zip(plain, masked, strict=True):
        np.testing.assert_array_equal(before.encoded.dense, after.encoded.dense)
        for name, ragged in before.encoded.sparse.items():
            got = after.encoded.sparse[name]
            np.testing.assert_array_equal(got.lengths, ragged.lengths)
            changed = got.values != ragged.values
            assert (got.values[changed] == OOV_ROW).all()
            hit, known = hit + changed.sum(), known + (ragged.values != OOV_ROW).sum()
    assert 0.2 < hit / known < 0.3
    assert known > 1000


def test_read_split_reads_a_part_or_all(datasets):
    dataset = datasets(203)
    for limit, rows in [(None, 203), (9, 9), (50, 50), (203, 203), (9999, 203)]:
        got = read_split(dataset, "train", limit)
        assert got.encoded.dense[:, ROW].astype(int).tolist() == list(range(rows))
        assert len(got) == len(got.encoded) == rows


def test_reader_gives_the_groups(tmp_path):
    dataset = make_dataset(tmp_path, 30, ids={"user": "item"})
    rows = read_split(dataset, "train")
    assert len(rows.groups) == 30
    item = rows.encoded.sparse["item"].values
    for row in np.unique(item[item >= 2]):
        assert len(np.unique(rows.groups[item == row])) == 1
    shuffled, _ = next(Reader(dataset, "train", 30, shuffle=True).slices())
    np.testing.assert_array_equal(shuffled.groups, rows.groups[shuffled.encoded.dense[:, ROW].astype(int)])


def test_reader_of_data_without_numbers_gives_no_dense_inputs(tmp_path):
    dataset = make_dataset(tmp_path, 30, features=[{"name": "user", "kind": "categorical"}])
    batch, size = next(Reader(dataset, "train", 30).batches())
    assert (batch.dense.shape, size) == ((30, 0), 30)


# -- what goes wrong, and what is left behind ------------------------------------------------------------------------


def readers_alive(before: set[threading.Thread], wait_s: float = 2.0) -> int:
    """Reader threads that did not exist before and do not end within some time."""
    until = time.monotonic() + wait_s
    while True:
        new = [t for t in threading.enumerate() if t.name == "slimrank-reader" and t not in before]
        if not new or time.monotonic() > until:
            return len(new)
        time.sleep(0.02)


def test_reader_error_reaches_the_consumer_after_the_good_batches(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path, 60, files=1, row_group_rows=10)
    monkeypatch.setattr(reader_module, "WINDOW_ROWS", 10)
    reader = Reader(dataset, "train", 10)
    original = reader_module.read_chunk

    def fail_late(dataset, chunk):
        if chunk.row_group == 3:
            raise OSError("disk gone")
        return original(dataset, chunk)

    monkeypatch.setattr(reader_module, "read_chunk", fail_late)
    before = set(threading.enumerate())
    batches = reader.batches()
    assert [numbers(next(batches)[0]) for _ in range(3)] == [list(range(a, a + 10)) for a in (0, 10, 20)]
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    assert readers_alive(before) == 0


def test_reader_of_a_vanished_file_raises(tmp_path):
    dataset = make_dataset(tmp_path, 30, files=1)
    (dataset.folder / "train" / "part-00000.parquet").unlink()
    with pytest.raises((OSError, DataError), match="part-00000"):
        next(Reader(dataset, "train", 10).batches())


def test_reader_of_a_damaged_file_names_it_in_one_line(tmp_path):
    dataset = make_dataset(tmp_path, 30, files=1)
    (dataset.folder / "train" / "part-00000.parquet").write_bytes(b"PAR1 and then nothing of use")
    with pytest.raises(DataError, match="part-00000"):
        next(Reader(dataset, "train", 10).batches())


def test_reader_left_early_ends_its_thread(datasets):
    before = set(threading.enumerate())
    batches = Reader(datasets(203), "train", 2).batches()
    next(batches)
    batches.close()
    assert readers_alive(before) == 0


def test_reader_left_early_near_the_end_ends_its_thread(datasets):
    before = set(threading.enumerate())
    batches = Reader(datasets(200), "train", 40).batches()  # five batches: one taken, four fill the queue
    next(batches)
    time.sleep(0.3)  # until the thread stands before its closing put
    batches.close()
    assert readers_alive(before, 1.0) == 0
