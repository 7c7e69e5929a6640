"""trainer/data/encoded.py and batch.py: rows in numpy, and the KeyedJaggedTensor made of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from trainer_builders import fitted, make_run, random_log

from trainer.data.batch import to_batch
from trainer.data.encoded import Encoded, Ragged, from_columns, to_columns

BAGS = [[1, 2, 3], [4], [], [5, 6]]
RAGGED = Ragged(np.arange(1, 7), np.array([3, 1, 0, 2], dtype=np.int32))


def bags(ragged: Ragged) -> list[list[int]]:
    return [part.tolist() for part in np.split(ragged.values, np.cumsum(ragged.lengths)[:-1])]


def test_ragged_takes_rows_in_any_order_and_more_than_once():
    index = np.array([3, 0, 0, 2, 1])
    assert bags(RAGGED.take(index)) == [BAGS[i] for i in index]
    assert len(RAGGED.take(np.zeros(0, dtype=np.int64))) == 0


def test_ragged_of_single_ids_takes_rows():
    assert Ragged(np.array([7, 8, 9])).take(np.array([2, 0])).values.tolist() == [9, 7]


def test_ragged_repeats_a_single_row():
    one = RAGGED.take(np.array([0]))
    assert bags(one.repeat(3)) == [[1, 2, 3]] * 3
    assert Ragged(np.array([5])).repeat(2).values.tolist() == [5, 5]


def test_batch_keeps_features_in_order_with_their_own_ids():
    encoded = fitted(random_log(80), make_run().data).encode(random_log(20, seed=1))
    labels = np.arange(20, dtype=np.float32)[:, None]
    batch = to_batch(encoded, labels)
    assert batch.sparse.keys() == ["user", "item", "history", "hashed", "tags", "age"]
    assert (len(batch), batch.sparse.stride()) == (20, 20)
    for name, ragged in encoded.sparse.items():
        feature = batch.sparse[name]
        assert feature.values().tolist() == ragged.values.tolist()
        assert feature.lengths().tolist() == (np.ones(20) if ragged.lengths is None else ragged.lengths).tolist()
    torch.testing.assert_close(batch.dense, torch.from_numpy(encoded.dense), rtol=0, atol=0)
    assert batch.to(torch.device("cpu")).labels.tolist() == labels.tolist()


def test_batch_without_labels_or_rows():
    batch = to_batch(Encoded({"a": Ragged(np.zeros(0, dtype=np.int64))}, np.zeros((0, 2), dtype=np.float32)))
    assert (len(batch), batch.labels, batch.sparse.stride()) == (0, None, 0)


@pytest.mark.parametrize("positions", [None, 3])
@pytest.mark.parametrize(
    "ragged",
    [
        Ragged(np.array([7, 8, 9])),
        RAGGED,
        replace(RAGGED, weights=np.array([0.5, 1, 0, 2, 3, 4], dtype=np.float32)),
        Ragged(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)),
    ],
    ids=["single", "bags", "weights", "no rows"],
)
def test_columns_hold_what_was_put_into_them(ragged, positions):
    whole = replace(ragged, positions=positions)
    table = pa.table(to_columns("x", whole))
    assert set(table.column_names) == ({"sparse.x", "weights.x"} if ragged.weights is not None else {"sparse.x"})
    parts = pa.concat_tables([table, table.slice(1), table.slice(0, 2)])  # several chunks, some that begin within
    for stored, rows in ((table, np.arange(len(whole))), (table.slice(1), np.arange(1, len(whole)))):
        if len(whole):
            assert_same(from_columns(stored, "x", positions), whole.take(rows))
    if len(whole):
        rows = np.r_[0 : len(whole), 1 : len(whole), 0:2]
        assert_same(from_columns(parts, "x", positions), whole.take(rows))
    else:
        assert_same(from_columns(table, "x", positions), whole)


def assert_same(got: Ragged, want: Ragged) -> None:
    assert got.positions == want.positions
    for part in ("values", "lengths", "weights"):
        a, b = getattr(got, part), getattr(want, part)
        assert (a is None) == (b is None), part
        assert a is None or (a.dtype == b.dtype and np.array_equal(a, b)), part


def test_weights_are_taken_and_repeated_with_their_ids():
    weighted = replace(RAGGED, weights=np.arange(6, dtype=np.float32))
    assert weighted.take(np.array([3, 0])).weights.tolist() == [4, 5, 0, 1, 2]
    assert weighted.take(np.array([0])).repeat(2).weights.tolist() == [0, 1, 2, 0, 1, 2]


def test_batch_gives_ids_without_weights_one_each():
    weighted = replace(RAGGED, weights=np.arange(6, dtype=np.float32))
    encoded = Encoded({"a": Ragged(np.array([5, 6, 7, 8])), "b": weighted}, np.zeros((4, 0), dtype=np.float32))
    batch = to_batch(encoded)
    assert batch.sparse["a"].weights().tolist() == [1, 1, 1, 1]
    assert batch.sparse["b"].weights().tolist() == [0, 1, 2, 3, 4, 5]
    assert to_batch(Encoded({"b": RAGGED}, encoded.dense)).sparse.weights_or_none() is None
