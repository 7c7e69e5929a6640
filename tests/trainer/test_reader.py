"""trainer/data/reader.py: each row once an epoch, in an order of seed and epoch alone."""

from __future__ import annotations

import threading
import time
from functools import partial

import numpy as np
import pytest
from trainer_builders import make_dataset

from trainer.data import reader as reader_module
from trainer.data.reader import Reader, read_split
from trainer.data.transform import OOV_ROW
from trainer.errors import DataError

ROW = -1  # the dense column that numbers the rows


@pytest.fixture(scope="module", params=[1 << 20, 30], ids=["one window", "small windows"])
def window_rows(request):
    """A split that fits one window, and one of many windows, each a few row groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "WINDOW_ROWS", request.param)
        yield request.param


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
    assert [len(b) for b in alone] == [20] * 10 + ([17] if rows == 217 else [])


def test_reader_joins_a_remainder_smaller_than_the_workers_to_the_batch_before(datasets):
    sizes = {w: [len(b) for b in epoch_of(datasets(203), w)] for w in (3, 4)}
    assert sizes == {3: [20] * 10 + [3], 4: [20] * 9 + [23]}


def test_reader_of_a_split_smaller_than_a_batch_gives_one(datasets):
    batches = epoch_of(datasets(200), 3, batch_size=4096)
    assert [len(b) for b in batches] == [200]


def test_reader_slices_differ_by_one_row_at_most(datasets):
    sizes = [len(next(Reader(datasets(217), "train", 20, rank=r, world_size=3).batches())[0]) for r in range(3)]
    assert sum(sizes) == 20
    assert max(sizes) - min(sizes) <= 1


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
    for world_size in (1, 3):
        batches = epoch_of(datasets(217), world_size, epoch=5)
        assert [n for b in batches for n in b] == list(range(217))


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
