"""trainer/data/fit.py: what fragments say adds up to what the whole log says, in any order."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
from trainer_builders import data_of, make_run, random_log

from trainer.data import fit
from trainer.data.fit import FitStats, fit_transform, observe, sum_counts

PIECES = [(0, 10), (10, 25), (35, 1), (36, 0), (36, 44)]  # first row and rows; one piece is empty


def merged(raw: pa.Table, order) -> FitStats:
    data = make_run().data
    stats = FitStats()
    for piece in order:
        stats.merge(observe(raw.slice(*PIECES[piece]), data, seed=piece))
    return stats


def test_fragments_in_any_order_fit_as_the_whole():
    raw, data = random_log(80), make_run().data
    expected = fit_transform(observe(raw, data, 0), data, 8)
    orders = list(itertools.permutations(range(5)))
    for order in orders[:: len(orders) // 12]:
        got = fit_transform(merged(raw, order), data, 8)
        assert got.tables == expected.tables
        for name, id_map in expected.id_maps.items():
            np.testing.assert_array_equal(got.id_maps[name].keys, id_map.keys)
        for name, numbers in expected.numerics.items():
            other = got.numerics[name]
            assert (other.low, other.high, other.has_missing) == (numbers.low, numbers.high, numbers.has_missing)
            assert other.boundaries == numbers.boundaries
            np.testing.assert_allclose([other.mean, other.std], [numbers.mean, numbers.std], rtol=1e-12)


def test_merging_leaves_the_merged_unchanged():
    raw, data = random_log(80), make_run().data
    part = observe(raw.slice(0, 40), data, 0)
    before = sum_counts(part.ids["user"])[1].sum(), part.numbers["price"].count, len(part.numbers["age"].sample)
    stats = FitStats()
    stats.merge(part)
    stats.merge(observe(raw.slice(40), data, 1))
    assert before == (
        sum_counts(part.ids["user"])[1].sum(),
        part.numbers["price"].count,
        len(part.numbers["age"].sample),
    )
    assert stats.rows == 80


def test_merging_many_fragments_sums_their_counts():
    data = data_of({"name": "a", "kind": "categorical"})
    stats = FitStats()
    for part in range(40):
        stats.merge(observe(pa.table({"a": ["x", f"only{part}"]}), data, part))
    assert len(stats.ids["a"]) <= 17, "counts are summed on the way, not held per fragment"
    _, counts = sum_counts(stats.ids["a"])
    assert sorted(counts)[-2:] == [1, 40]


def test_sum_counts_of_nothing_is_empty():
    keys, counts = sum_counts([])
    assert (len(keys), len(counts), keys.dtype, counts.dtype) == (0, 0, np.uint64, np.int64)


def test_quantiles_of_large_fragments_come_from_a_sample(monkeypatch):
    monkeypatch.setattr(fit, "QUANTILE_SAMPLE", 300)
    data = data_of({"name": "n", "kind": "numeric", "transform": "bucketize", "buckets": 4})
    values = np.random.default_rng(0).random(3000)
    stats = observe(pa.table({"n": values}), data, seed=1)
    assert [len(s) for s in stats.numbers["n"].sample] == [300]
    boundaries = fit_transform(stats, data, 8).numerics["n"].boundaries
    np.testing.assert_allclose(boundaries, [0.25, 0.5, 0.75], atol=0.1)
    again = fit_transform(observe(pa.table({"n": values}), data, seed=1), data, 8)
    assert again.numerics["n"].boundaries == boundaries


def test_quantiles_of_many_fragments_come_from_one_bounded_sample(monkeypatch):
    monkeypatch.setattr(fit, "QUANTILE_SAMPLE", 400)
    data = data_of({"name": "n", "kind": "numeric", "transform": "bucketize", "buckets": 4})
    values = np.sort(np.random.default_rng(0).random(6000))  # fragments of very different values
    parts = [observe(pa.table({"n": v}), data, seed=i) for i, v in enumerate(np.array_split(values, 50))]
    found = []
    for order in (range(50), reversed(range(50))):
        stats = FitStats()
        for part in order:
            stats.merge(parts[part])
            assert sum(map(len, stats.numbers["n"].sample)) <= 2 * 400 + 120
        found.append(fit_transform(stats, data, 8).numerics["n"].boundaries)
    assert found[0] == found[1]
    np.testing.assert_allclose(found[0], [0.25, 0.5, 0.75], atol=0.1)


def test_fit_takes_the_dim_of_the_feature_or_the_models():
    data = data_of({"name": "a", "kind": "categorical", "dim": 4}, {"name": "b", "kind": "categorical"})
    tables = fit_transform(observe(pa.table({"a": ["x"], "b": ["y"]}), data, 0), data, 12).tables
    assert (tables["a"].embedding_dim, tables["b"].embedding_dim) == (4, 12)
    assert tables["a"].fp32_bytes == tables["a"].num_embeddings * 16


def test_spread_of_numbers_far_from_zero_is_right():
    values = 1.7e12 + np.random.default_rng(0).normal(size=1000) * 1e3
    data = data_of({"name": "n", "kind": "numeric"})
    stats = observe(pa.table({"n": values, "any": ["x"] * 1000}), data, 0)
    assert fit_transform(stats, data, 8).numerics["n"].std == pytest.approx(values.std(), rel=1e-3)
