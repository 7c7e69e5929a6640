"""Weights of a bag's ids: read from their column, pooled by sum and by mean, and what is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from trainer_builders import data_of, fitted, make_run, prepare_here

from trainer.data.batch import to_batch
from trainer.data.encoded import Ragged
from trainer.data.reader import Reader, read_split
from trainer.data.transform import MISSING_ROW, Transform
from trainer.errors import DataError
from trainer.models import build_ranker

IDS = pa.list_(pa.string())
NUMBERS = pa.list_(pa.float64())
BAGS = [["a", "b", "c"], ["b"], [], ["c", "a"], None]
WEIGHTS = [[0.5, 2.0, 0.0], [3.0], [], [1.5, 0.25], None]


def tags(pooling: str = "sum", **more) -> dict:
    return {"name": "tags", "kind": "multi", "weights": "how", "pooling": pooling, "min_count": 1, **more}


def table(bags: list, weights: list | None, ids: pa.DataType = IDS, numbers: pa.DataType = NUMBERS) -> pa.Table:
    columns = {"tags": pa.array(bags, ids)}
    return pa.table(columns if weights is None else columns | {"how": pa.array(weights, numbers)})


def transform_of(*features: dict) -> Transform:
    raw = table([["a", "b", "c"]] * 3, [[1.0, 1.0, 1.0]] * 3)
    if len(features) > 1:
        raw = raw.append_column("others", raw["tags"])
    return fitted(raw, data_of(*features))


def weights_of(ragged: Ragged) -> list[list[float]]:
    assert ragged.weights is not None
    assert ragged.lengths is not None
    assert len(ragged.weights) == len(ragged.values)
    return [part.tolist() for part in np.split(ragged.weights, np.cumsum(ragged.lengths)[:-1])]


# -- reading ---------------------------------------------------------------------------------------------------------


def test_sum_takes_weights_as_they_are():
    found = transform_of(tags()).encode_sparse("tags", table(BAGS, WEIGHTS))
    assert weights_of(found) == [[0.5, 2.0, 0.0], [3.0], [1.0], [1.5, 0.25], [1.0]]
    assert found.values[4] == MISSING_ROW, "an empty bag reads the missing row once"


def test_mean_takes_shares_of_the_bags_weights():
    found = transform_of(tags("mean")).encode_sparse("tags", table(BAGS, WEIGHTS))
    for got, want in zip(weights_of(found), [[0.2, 0.8, 0], [1], [1], [6 / 7, 1 / 7], [1]], strict=True):
        assert got == pytest.approx(want)


def test_weights_of_text_are_cut_as_their_ids():
    found = transform_of(tags(separator="|")).encode_sparse(
        "tags", table(["a|b|c", "b", "", None], ["0.5|2|1e-1", " 3 ", "", None], pa.string(), pa.string())
    )
    for got, want in zip(weights_of(found), [[0.5, 2, 0.1], [3], [1], [1]], strict=True):
        assert got == pytest.approx(want)


def test_weights_are_cut_with_their_ids():
    found = transform_of(tags(max_length=2)).encode_sparse("tags", table(BAGS, WEIGHTS))
    assert weights_of(found) == [[0.5, 2.0], [3.0], [1.0], [1.5, 0.25], [1.0]]


@pytest.mark.parametrize("pooling", ["mean", "sum"])
@pytest.mark.parametrize("how", ["no column", "all null", "null values"])
def test_weights_that_are_missing_count_one(pooling, how):
    weights = {"no column": None, "all null": [None] * 5, "null values": [[None] * len(b or []) for b in BAGS]}[how]
    found = transform_of(tags(pooling)).encode_sparse("tags", table(BAGS, weights))
    lengths = [3, 1, 1, 2, 1]
    for got, n in zip(weights_of(found), lengths, strict=True):
        assert got == pytest.approx([1 / n if pooling == "mean" else 1.0] * n)


def test_mean_of_weights_that_are_all_zero_is_zero():
    found = transform_of(tags("mean")).encode_sparse("tags", table([["a", "b"]], [[0.0, 0.0]]))
    assert weights_of(found) == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("bags", "weights", "says"),
    [
        ([["a"], ["a", "b"]], [[1.0], [1.0]], r"feature 'tags': row 1 has 2 ids in 'tags' and 1 weights in 'how'"),
        ([["a"]], [[1.0, 2.0]], r"row 0 has 1 ids in 'tags' and 2 weights in 'how': give each id one weight"),
        ([["a"], ["b"]], [[1.0], [-0.5]], r"column 'how': holds weight -0\.5: weights are 0 or more"),
    ],
)
def test_weights_that_do_not_fit_are_refused(bags, weights, says):
    with pytest.raises(DataError, match=says):
        transform_of(tags()).encode(table(bags, weights))


def test_weights_that_are_no_numbers_are_refused():
    with pytest.raises(DataError, match="column 'how': string cannot be read as numbers"):
        transform_of(tags()).encode(table([["a"]], [["many"]], numbers=IDS))


# -- pooling ---------------------------------------------------------------------------------------------------------


def looked_up(transform: Transform, raw: pa.Table) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model looks up, and the table."""
    run = make_run(model={"top_mlp": [6]})
    ranker = build_ranker(run.model.model_copy(update={"table_init": 0.5}), transform, "cpu")
    return ranker(to_batch(transform.encode(raw)))[1].detach(), ranker.embeddings.embedding_bags["t_tags"].weight


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_weighted_pooling_equals_its_formula(pooling):
    transform = transform_of(tags(pooling))
    found, weight = looked_up(transform, table(BAGS, WEIGHTS))
    row = {t: int(transform.encode_sparse("tags", table([[t]], [[1.0]])).values[0]) for t in "abc"}
    for got, bag, weights in zip(found, BAGS, WEIGHTS, strict=True):
        if not bag:
            expected = weight[MISSING_ROW]
        else:
            expected = sum(w * weight[row[t]] for t, w in zip(bag, weights, strict=True))
            expected = expected / sum(weights) if pooling == "mean" else expected
        torch.testing.assert_close(got, expected.detach())


def test_two_poolings_on_one_table_read_it_each_in_its_way():
    """No weights column at all: mean and sum of the same bags, from the same rows."""
    mean = {"name": "tags", "kind": "multi", "pooling": "mean", "min_count": 1}
    total = {"name": "others", "kind": "multi", "pooling": "sum", "table": "tags"}
    transform = transform_of(mean, total)
    assert transform.weighted
    raw = table(BAGS, None).append_column("others", pa.array(BAGS, IDS))
    found, _ = looked_up(transform, raw)
    lengths = torch.tensor([3.0, 1.0, 1.0, 2.0, 1.0])
    torch.testing.assert_close(found[:, :8] * lengths[:, None], found[:, 8:])
    assert not torch.allclose(found[0, :8], found[0, 8:])


def test_weights_leave_other_features_alone():
    """A categorical feature and a bag without weights beside a weighted bag: they pool as they would without it."""
    user = {"name": "user", "kind": "categorical", "min_count": 1}
    plain = {"name": "others", "kind": "multi", "pooling": "mean", "min_count": 1}
    raw = table(BAGS, WEIGHTS).append_column("others", pa.array(BAGS, IDS)).append_column("user", pa.array([*"xyzxy"]))
    data = data_of(user, plain, tags())
    transform = fitted(raw, data)
    run = make_run(model={"top_mlp": [6]})
    ranker = build_ranker(run.model, transform, "cpu")
    found = ranker(to_batch(transform.encode(raw)))[1]
    bags = ranker.embeddings.embedding_bags
    encoded = transform.encode(raw)
    torch.testing.assert_close(found[:, :8], bags["t_user"].weight[encoded.sparse["user"].values])
    others = encoded.sparse["others"]
    for got, ids in zip(found[:, 8:16], np.split(others.values, np.cumsum(others.lengths)[:-1]), strict=True):
        torch.testing.assert_close(got, bags["t_others"].weight[ids].mean(0))


# -- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_weights_survive_prepare_and_reader(tmp_path, pooling):
    rng = np.random.default_rng(0)
    rows = 60
    bags = [[*rng.choice([*"abc"], n)] for n in rng.integers(0, 4, rows)]
    weights = [np.round(rng.random(len(b)) * 3, 2).tolist() for b in bags]
    raw = table(bags, weights).append_column("label", pa.array(rng.integers(0, 2, rows)))
    raw = raw.append_column("split", pa.array(["train"] * 40 + ["val"] * 10 + ["test"] * 10))
    pq.write_table(raw, tmp_path / "log.parquet")
    run = make_run(features=[tags(pooling)], input=str(tmp_path / "log.parquet"), split={"column": "split"})
    dataset = prepare_here(tmp_path / "prepared", run, row_group_rows=7)
    want = dataset.transform.encode(raw.slice(0, 40)).sparse["tags"]
    got = read_split(dataset, "train").encoded.sparse["tags"]
    assert weights_of(got) == weights_of(want)
    batches = [batch for batch, _ in Reader(dataset, "train", 16).batches()]
    found = [w for b in batches for w in b.sparse["tags"].weights().tolist()]
    assert found == want.weights.tolist()
    one, two = want.take(np.array([3, 1])), want.take(np.array([3])).repeat(2)
    assert weights_of(one) == [weights_of(want)[3], weights_of(want)[1]]
    assert weights_of(two) == [weights_of(want)[3]] * 2
