"""Sequences: the last ids are kept, pooled as embedding_bag does, or by attention as a slow twin of DIN does."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from trainer_builders import data_of, fitted, make_run, prepare_here

from trainer.data.batch import feature_of, lookup_names, to_batch
from trainer.data.encoded import Encoded, Ragged
from trainer.data.reader import Reader, read_split
from trainer.data.transform import MISSING_ROW, OOV_ROW, Transform
from trainer.errors import ConfigError
from trainer.models import build_ranker, head_shape
from trainer.models.attention import AttentionPooling, SequenceHead
from trainer.models.ranker import Ranker

ITEM = {"name": "item", "kind": "categorical", "min_count": 1, "dim": 4}
LIST = pa.list_(pa.string())


def history(pooling: str = "attention", **more) -> dict:
    return {"name": "history", "kind": "sequence", "table": "item", "pooling": pooling, "max_length": 3, **more}


def log(histories: list, kind: pa.DataType = LIST) -> pa.Table:
    """A log whose items are a..f, so that each has a row of its own, and these histories."""
    items = [*"abcdef"] * (len(histories) // 6 + 1)
    return pa.table({"item": items[: len(histories)], "history": pa.array(histories, kind)})


KNOWN = fitted(log([[]] * 6), data_of(ITEM, history()))
ROW = {item: int(KNOWN.encode_sparse("item", pa.table({"item": [item]})).values[0]) for item in "abcdef"}


def rows_of(ragged: Ragged) -> list[list[int]]:
    lengths = np.ones(len(ragged), dtype=int) if ragged.lengths is None else ragged.lengths
    return [part.tolist() for part in np.split(ragged.values, np.cumsum(lengths)[:-1])]


def fitted_with(feature: dict) -> Transform:
    return fitted(log([[]] * 6, LIST), data_of(ITEM, feature))


def ranker_of(transform: Transform, **model) -> Ranker:
    run = make_run(model={"top_mlp": [6], **model})
    torch.manual_seed(0)
    return build_ranker(run.model.model_copy(update={"table_init": 0.5}), transform, "cpu")


# -- encoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "sum", "attention"])
def test_sequence_keeps_its_last_ids_newest_last(pooling):
    raw = log([[*"abcdef"], [*"abc"], [*"fa"], ["b"], [*"abcd"]])
    found = fitted_with(history(pooling)).encode_sparse("history", raw)
    expected = ["def", "abc", "fa", "b", "bcd"]
    assert rows_of(found) == [[ROW[i] for i in row] for row in expected]


def test_bag_keeps_its_first_ids():
    bag = {"name": "history", "kind": "multi", "table": "item", "max_length": 3}
    assert rows_of(fitted_with(bag).encode_sparse("history", log([[*"abcdef"]]))) == [[ROW[i] for i in "abc"]]


@pytest.mark.parametrize("pooling", ["mean", "sum", "attention"])
def test_sequence_that_is_empty_or_null_reads_the_missing_row(pooling):
    raw = log([[], None, ["a", None, "strange", ""], [None] * 5])
    found = fitted_with(history(pooling)).encode_sparse("history", raw)
    assert rows_of(found) == [
        [MISSING_ROW],
        [MISSING_ROW],
        [MISSING_ROW, OOV_ROW, MISSING_ROW],
        [MISSING_ROW] * 3,
    ]
    absent = fitted_with(history(pooling)).encode_sparse("history", pa.table({"item": ["a", "b"]}))
    assert rows_of(absent) == [[MISSING_ROW]] * 2


def test_sequence_of_text_is_cut_at_its_separator():
    feature = history("attention", separator=" ")
    found = fitted_with(feature).encode_sparse("history", log(["a b c d", "", None, "e"], pa.string()))
    assert rows_of(found) == [[ROW[i] for i in "bcd"], [MISSING_ROW], [MISSING_ROW], [ROW["e"]]]


def test_sequence_shares_the_targets_table():
    assert list(KNOWN.tables) == ["item"]
    assert KNOWN.tables["item"].features == ("item", "history")
    assert (KNOWN.positions("item"), KNOWN.positions("history")) == (None, 3)
    shape = head_shape(KNOWN)
    assert (shape.positions, shape.targets, shape.dims) == ((None, 3), (None, 0), (4, 4))
    ids_of_both = fitted(log([["x"] * 2] * 6), data_of(ITEM, history()))
    assert ids_of_both.tables["item"].num_embeddings == KNOWN.tables["item"].num_embeddings + 1, "its ids count too"


def test_attention_needs_a_target_that_is_no_sequence():
    with pytest.raises(ConfigError, match="pooling: attention needs table: the feature it attends to"):
        data_of(ITEM, {"name": "history", "kind": "sequence", "pooling": "attention"})
    with pytest.raises(ConfigError, match=r"must be a feature with its own table"):
        data_of(ITEM, history(), {**history(), "name": "other", "table": "history"})


# -- lookups ---------------------------------------------------------------------------------------------------------


def test_batch_looks_positions_up_one_by_one():
    """Every way three rows can hold 1 to 3 ids: lookup p holds just the p-th id of the rows that have one."""
    for lengths in itertools.product([1, 2, 3], repeat=3):
        values = np.arange(100, 100 + sum(lengths))
        rows = np.split(values, np.cumsum(lengths)[:-1])
        ragged = Ragged(values, np.array(lengths, dtype=np.int32), positions=3)
        other = Ragged(np.array([7, 8, 9]))
        batch = to_batch(Encoded({"history": ragged, "item": other}, np.zeros((3, 0), np.float32)))
        assert batch.sparse.keys() == ["history@0", "history@1", "history@2", "item"]
        for p in range(3):
            jagged = batch.sparse[f"history@{p}"]
            assert jagged.lengths().tolist() == [int(n > p) for n in lengths]
            assert jagged.values().tolist() == [row[p] for row in rows if len(row) > p]
        assert batch.sparse["item"].values().tolist() == [7, 8, 9]


def test_batch_looks_up_sequences_of_one_id_each():
    batch = to_batch(Encoded({"h": Ragged(np.array([5, 6]), positions=2)}, np.zeros((2, 0), np.float32)))
    assert batch.sparse["h@0"].values().tolist() == [5, 6]
    assert batch.sparse["h@1"].lengths().tolist() == [0, 0]


def test_lookup_names_lead_back_to_their_feature():
    assert lookup_names("history", None) == ["history"]
    assert lookup_names("history", 2) == ["history@0", "history@1"]
    assert [feature_of(n) for n in ("history", "history@0", "history@11")] == ["history"] * 3


# -- pooling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_pooled_sequences_equal_embedding_bag(pooling):
    transform = fitted_with(history(pooling))
    ranker = ranker_of(transform)
    encoded = transform.encode(log([[*"abcdef"], [*"ab"], [], ["e"], None, [*"aab"]]))
    looked_up = ranker(to_batch(encoded))[1]
    ragged = encoded.sparse["history"]
    offsets = torch.from_numpy(np.cumsum(ragged.lengths) - ragged.lengths).long()
    weight = ranker.embeddings.embedding_bags["t_item"].weight
    expected = torch.nn.functional.embedding_bag(torch.from_numpy(ragged.values), weight, offsets, mode=pooling)
    torch.testing.assert_close(looked_up[:, 4:], expected)


def din(pool: AttentionPooling, events: Tensor, target: Tensor) -> Tensor:
    """Slow twin: each event of one row by itself (S, W), (W,) -> (W,). No padding in it."""
    total = torch.zeros_like(target)
    for event in events:
        hidden = torch.cat([event, target, event - target, event * target])
        for layer in (pool.score[0][0], pool.score[0][2]):
            hidden = torch.relu(layer.weight @ hidden + layer.bias)
        total = total + (pool.score[1].weight @ hidden + pool.score[1].bias) * event
    return total


@pytest.mark.parametrize("arch", ["dcn", "deepfm", "dlrm", "mmoe"])
def test_attention_equals_a_slow_twin_of_din(arch):
    """Row by row, from the rows' own ids, whatever the positions they are padded to."""
    transform = fitted_with(history())
    ranker = ranker_of(transform, arch=arch)
    head = ranker.head
    assert isinstance(head, SequenceHead)
    raw = log([[*"abcdef"], [*"ab"], [], ["e"], None, [*"aab"]])
    encoded = transform.encode(raw)
    logits, looked_up = ranker(to_batch(encoded))
    assert looked_up.shape == (6, 4 + 3 * 4)
    weight = ranker.embeddings.embedding_bags["t_item"].weight
    expected = []
    for item, ids in zip(encoded.sparse["item"].values, rows_of(encoded.sparse["history"]), strict=True):
        pooled = din(head.pools["1"], weight[ids], weight[item])
        expected.append(head.inner(torch.zeros(1, 0), torch.cat([weight[item], pooled])[None])[0])
    torch.testing.assert_close(logits, torch.stack(expected))
    logits.sum().backward()
    assert [n for n, p in ranker.named_parameters() if p.grad is None] == []


def test_padding_adds_exactly_nothing():
    """The same rows with room for 3 and for 9 ids: the same scores to the last bit."""
    short, long = fitted_with(history()), fitted_with(history(max_length=9))
    raw = log([[*"abc"], [*"ab"], [], ["e"]])
    scores = []
    for transform in (short, long):
        ranker = ranker_of(transform)
        scores.append(ranker(to_batch(transform.encode(raw)))[0])
    torch.testing.assert_close(*scores, rtol=0, atol=0)


def test_absent_positions_get_no_gradient():
    pool = AttentionPooling(4)
    events = torch.randn(2, 3, 4)
    events[0, 1:] = 0
    cut = events[:1, :1].clone()
    target = torch.randn(2, 4)
    pool(events, target)[0].sum().backward()
    padded = [p.grad.clone() for p in pool.parameters()]
    pool.zero_grad()
    pool(cut, target[:1])[0].sum().backward()
    for got, want in zip(padded, [p.grad for p in pool.parameters()], strict=True):
        torch.testing.assert_close(got, want)


def test_attention_depends_on_the_target():
    transform = fitted_with(history())
    ranker = ranker_of(transform)
    raw = pa.table({"item": [*"abc"], "history": pa.array([[*"def"]] * 3, LIST)})
    looked_up = ranker(to_batch(transform.encode(raw)))[1]
    pool, events = ranker.head.pools["1"], looked_up[:, 4:].unflatten(1, (3, 4))
    pooled = pool(events, looked_up[:, :4])
    assert not torch.allclose(pooled[0], pooled[1])


def test_order_of_features_does_not_matter_to_attention():
    """The sequence may stand before the feature it attends to."""
    transform = fitted(log([[]] * 6), data_of(history(), ITEM))
    ranker = ranker_of(transform)
    encoded = transform.encode(log([[*"ab"], ["c"], []]))
    logits, _ = ranker(to_batch(encoded))
    weight = ranker.embeddings.embedding_bags["t_item"].weight
    for at, (item, ids) in enumerate(
        zip(encoded.sparse["item"].values, rows_of(encoded.sparse["history"]), strict=True)
    ):
        pooled = din(ranker.head.pools["0"], weight[ids], weight[item])
        expected = ranker.head.inner(torch.zeros(1, 0), torch.cat([pooled, weight[item]])[None])[0]
        torch.testing.assert_close(logits[at], expected)


# -- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_sequences_survive_prepare_and_reader(tmp_path, pooling):
    rng = np.random.default_rng(0)
    rows = 60
    histories = [None if n == 6 else [*rng.choice([*"abcdef"], n)] for n in rng.integers(0, 7, rows)]
    raw = log(histories)
    raw = raw.append_column("label", pa.array(rng.integers(0, 2, rows)))
    raw = raw.append_column("split", pa.array(["train"] * 40 + ["val"] * 10 + ["test"] * 10))
    pq.write_table(raw, tmp_path / "log.parquet")
    run = make_run(features=[ITEM, history(pooling)], input=str(tmp_path / "log.parquet"), split={"column": "split"})
    dataset = prepare_here(tmp_path / "prepared", run, row_group_rows=7)
    want = dataset.transform.encode(raw.slice(0, 40)).sparse["history"]
    got = read_split(dataset, "train").encoded.sparse["history"]
    assert got.positions == want.positions == (3 if pooling == "attention" else None)
    assert rows_of(got) == rows_of(want)
    batches = [batch for batch, _ in Reader(dataset, "train", 16).batches()]
    keys = ["item", "history@0", "history@1", "history@2"] if pooling == "attention" else ["item", "history"]
    assert {tuple(b.sparse.keys()) for b in batches} == {tuple(keys)}
    if pooling == "attention":
        first = [v for b in batches for v in b.sparse["history@0"].values().tolist()]
        assert first == [row[0] for row in rows_of(want)]
        third = [v for b in batches for v in b.sparse["history@2"].values().tolist()]
        assert third == [row[2] for row in rows_of(want) if len(row) > 2]
