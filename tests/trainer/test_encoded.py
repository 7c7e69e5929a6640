"""trainer/data/encoded.py and batch.py: rows in numpy, and the KeyedJaggedTensor made of them."""

from __future__ import annotations

import numpy as np
import torch
from trainer_builders import fitted, make_run, random_log

from trainer.data.batch import to_batch
from trainer.data.encoded import Encoded, Ragged

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
