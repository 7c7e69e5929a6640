"""compress/search/profile.py: cuts and centroids of a real checkpoint's tables, against naive sums."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
import torch
from compress_builders import World

from compress.config import Order, TablePlan
from compress.ids import key_bits
from compress.search.profile import UNSEEN_WEIGHT, TableProfile, profile_table, profile_tables, unknown_lookups
from trainer.checkpoint import Checkpoint
from trainer.data.reader import read_split
from trainer.data.transform import OOV_ROW, RESERVED_ROWS
from trainer.errors import CheckpointError

TABLES = ("user_id", "item_id", "genres", "city", "income")


def naive_centroid(world: World, table: str, cut: int) -> np.ndarray:
    """The weighted mean of the rows that a cut drops, one by one."""
    profile = world.profiles[table]
    rows = world.checkpoint.read(f"tables/{table}/weight").double().numpy()
    counts = world.dataset.counts(table)
    total, weight = np.zeros(rows.shape[1]), 0.0
    for row in profile.order[cut:]:
        w = max(float(counts[row]), UNSEEN_WEIGHT)
        total, weight = total + w * rows[row], weight + w
    return total / weight


@pytest.mark.parametrize("table", TABLES)
def test_profile_orders_rows_by_the_training_lookups(world: World, table: str) -> None:
    profile = world.profiles[table]
    counts = world.dataset.counts(table)
    assert profile.order[:RESERVED_ROWS].tolist() == [0, 1]
    assert (np.diff(counts[profile.order[RESERVED_ROWS:]]) <= 0).all()
    assert np.array_equal(profile.ranks()[profile.order], np.arange(len(counts)))


@pytest.mark.parametrize("table", TABLES)
def test_profile_lookups_are_those_before_each_edge(world: World, table: str) -> None:
    profile = world.profiles[table]
    counts = world.dataset.counts(table)[profile.order]
    assert profile.lookups.tolist() == [int(counts[:e].sum()) for e in profile.edges]
    assert profile.lookups[-1] == counts.sum() > 0


@pytest.mark.parametrize("table", TABLES)
def test_centroid_is_the_weighted_mean_of_the_pruned_rows(world: World, table: str) -> None:
    profile = world.profiles[table]
    for cut in {int(profile.edges[i]) for i in (0, 1, len(profile.edges) // 2, -2)}:
        np.testing.assert_allclose(profile.centroid(cut), naive_centroid(world, table, cut), rtol=1e-5, atol=1e-6)
        assert profile.centroid(cut).dtype == np.float32


def test_centroid_of_rows_without_lookups_is_their_mean(world: World) -> None:
    profile = world.profiles["city"]
    counts = world.dataset.counts("city")[profile.order]
    cut = int(profile.edges[np.argmax(counts[np.minimum(profile.edges, len(counts) - 1)] == 0)])
    assert counts[cut:].sum() == 0 < len(counts) - cut
    rows = world.checkpoint.read("tables/city/weight").numpy()[profile.order[cut:]]
    np.testing.assert_allclose(profile.centroid(cut), rows.mean(0), rtol=1e-4, atol=1e-6)


def test_centroid_refuses_a_cut_that_is_no_edge(world: World) -> None:
    profile = world.profiles["user_id"]
    between = next(c for c in range(2, 182) if c not in profile.edges)
    with pytest.raises(AssertionError, match=f"cut {between} is no edge of user_id"):
        profile.centroid(between)
    with pytest.raises(AssertionError, match="no edge"):
        profile.centroid(182)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("plan", [TablePlan(), TablePlan(keep=1.0)])
def test_profile_cut_keeps_all_when_nothing_is_asked(world: World, table: str, plan: TablePlan) -> None:
    assert world.profiles[table].cut(plan) == world.dataset.transform.tables[table].num_embeddings


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9, 0.99])
def test_profile_cut_keeps_at_least_what_was_asked(world: World, table: str, share: float) -> None:
    profile = world.profiles[table]
    rows = profile.info.num_embeddings
    counts = world.dataset.counts(table)[profile.order]
    by_rows, by_lookups = profile.cut(TablePlan(keep=share)), profile.cut(TablePlan(coverage=share))
    assert by_rows >= share * rows
    assert counts[:by_lookups].sum() >= share * counts.sum()
    for cut in (by_rows, by_lookups):
        assert cut in profile.edges
        assert cut == rows or cut + 1 < rows


def test_profile_cut_may_leave_the_reserved_rows_only(world: World) -> None:
    profile = world.profiles["user_id"]
    assert profile.cut(TablePlan(keep=1e-9)) == RESERVED_ROWS
    np.testing.assert_allclose(profile.centroid(2), naive_centroid(world, "user_id", 2), rtol=1e-5)


def test_profile_read_in_chunks_is_the_same(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = world.profiles
    monkeypatch.setattr("trainer.checkpoint.READ_ROWS", 13)
    chunked = profile_tables(world.checkpoint, world.dataset, lambda *_: None)
    assert list(chunked) == list(whole)
    for name, profile in chunked.items():
        np.testing.assert_allclose(profile.sums, whole[name].sums, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(profile.weights, whole[name].weights, rtol=1e-12)
        assert np.array_equal(profile.order, whole[name].order)


def test_profile_reports_each_table(world: World) -> None:
    told: list[tuple[str, int, int]] = []
    profile_tables(world.checkpoint, world.dataset, lambda *step: told.append(step))
    assert told == [("profile", i, 5) for i in range(1, 6)]


def test_slim_profile_cuts_and_centres_alike_without_its_order(world: World) -> None:
    whole = world.profiles["user_id"]
    slim = whole.slim()
    assert len(slim.order) == 0
    plan = TablePlan(coverage=0.7)
    assert slim.cut(plan) == whole.cut(plan) < 182
    assert np.array_equal(slim.centroid(slim.cut(plan)), whole.centroid(whole.cut(plan)))
    grown = {f.name for f in dataclasses.fields(TableProfile)} - {"info", "order", "counts", "unknown", "fisher"}
    assert all(getattr(slim, name).shape[0] <= 98 for name in grown)
    assert len(slim.counts) == 0


# -- orders ----------------------------------------------------------------------------------------------------------


@functools.cache
def fisher_of(table: str, dim: int) -> np.ndarray:
    """Some positive definite matrix (D, D)."""
    root = np.random.default_rng(len(table)).normal(size=(dim, dim))
    return root @ root.T


def ranked(world: World, table: str, order: Order) -> TableProfile:
    info = world.dataset.transform.tables[table]
    return profile_table(
        world.checkpoint,
        info,
        world.dataset.counts(table),
        world.dataset.transform.id_maps[table],
        unknown_lookups(world.dataset, info),
        order,
        fisher_of(table, info.embedding_dim) if order == "fisher" else None,
    )


def naive_scores(world: World, table: str, order: Order) -> np.ndarray:
    """What each training row (N,) is ranked by, one by one."""
    rows = world.checkpoint.read(f"tables/{table}/weight").double().numpy()
    counts = world.dataset.counts(table).astype(np.float64)
    seen = np.maximum(counts, UNSEEN_WEIGHT)
    centre = seen[RESERVED_ROWS:] @ rows[RESERVED_ROWS:] / seen[RESERVED_ROWS:].sum()
    fisher = fisher_of(table, rows.shape[1])
    each = {
        "frequency": lambda w, n: n,
        "norm": lambda w, n: np.linalg.norm(w),
        "frequency_norm": lambda w, n: n * np.linalg.norm(w),
        "fisher": lambda w, n: n * (w - centre) @ fisher @ (w - centre),
    }[order]
    return np.array([each(w, n) for w, n in zip(rows, counts if order == "frequency" else seen, strict=True)])


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("order", get_args(Order))
def test_profile_ranks_rows_by_the_order_asked(world: World, table: str, order: Order) -> None:
    profile = ranked(world, table, order)
    scores = naive_scores(world, table, order)[profile.order]
    assert profile.order[:RESERVED_ROWS].tolist() == [0, 1]
    assert np.array_equal(np.sort(profile.order), np.arange(len(scores)))
    falling = scores[RESERVED_ROWS:]
    assert (falling[1:] <= falling[:-1] * (1 + 1e-6)).all()
    counts = world.dataset.counts(table)[profile.order]
    assert profile.lookups.tolist() == [int(counts[:e].sum()) for e in profile.edges]


def test_orders_differ(world: World) -> None:
    """What makes the test above worth something."""
    orders = [ranked(world, "user_id", order).order for order in get_args(Order)]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(orders, 2))


def test_order_by_fisher_needs_the_sensitivity(world: World) -> None:
    with pytest.raises(AssertionError, match="order fisher needs"):
        profile_tables(world.checkpoint, world.dataset, lambda *_: None, "fisher")


def test_profile_moment_is_the_weighted_sum_of_outer_products(world: World) -> None:
    rows = world.checkpoint.read("tables/city/weight").double().numpy()
    weights = np.maximum(world.dataset.counts("city"), UNSEEN_WEIGHT)
    expected = sum(n * np.outer(w, w) for w, n in zip(rows, weights, strict=True))
    np.testing.assert_allclose(world.profiles["city"].moment, expected, rtol=1e-9, atol=1e-9)


# -- bands, the shared row, keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("order", ["frequency", "norm"])
@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_bands_split_the_cut_rows_by_lookups(world: World, table: str, order: Order, count: int) -> None:
    """Each band ends at the first edge with its share of the lookups; bands without rows are left out."""
    profile = ranked(world, table, order)
    counts = np.maximum(world.dataset.counts(table)[profile.order], UNSEEN_WEIGHT)
    for cut in {int(profile.edges[i]) for i in (0, len(profile.edges) // 2, -2)}:
        later = [int(e) for e in profile.edges if e > cut]
        total = counts[cut:].sum()
        wanted = [
            next(e for e in later if counts[cut:e].sum() >= total * band / count * (1 - 1e-12))
            for band in range(1, count)
        ]
        assert profile.bands(cut, count) == tuple(sorted({*wanted, len(counts)}))


@pytest.mark.parametrize("table", TABLES)
def test_centroid_of_a_band_is_the_weighted_mean_of_its_rows(world: World, table: str) -> None:
    profile = world.profiles[table]
    rows = world.checkpoint.read(f"tables/{table}/weight").double().numpy()[profile.order]
    weights = np.maximum(world.dataset.counts(table)[profile.order], UNSEEN_WEIGHT)
    edges = [int(profile.edges[0]), *profile.bands(int(profile.edges[0]), 3)]
    for first, last in itertools.pairwise(edges):
        expected = weights[first:last] @ rows[first:last] / weights[first:last].sum()
        np.testing.assert_allclose(profile.centroid(first, last), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("unknown", [0.0, 3.5, 1e9])
def test_fallback_is_the_mean_of_cut_rows_and_unknown_ids(world: World, table: str, unknown: float) -> None:
    profile = dataclasses.replace(world.profiles[table], unknown=unknown)
    rows = world.checkpoint.read(f"tables/{table}/weight").double().numpy()
    weights = np.maximum(world.dataset.counts(table)[profile.order], UNSEEN_WEIGHT)
    assert np.array_equal(profile.oov, rows[0].astype(np.float32))
    for cut in {int(profile.edges[0]), int(profile.edges[len(profile.edges) // 2])}:
        total = weights[cut:] @ rows[profile.order[cut:]] + unknown * rows[0]
        expected = total / (weights[cut:].sum() + unknown)
        np.testing.assert_allclose(profile.fallback(cut), expected, rtol=1e-5, atol=1e-6)


def test_unknown_lookups_are_the_validation_splits_scaled_to_training(world: World) -> None:
    """Counted in the prepared rows: ids of the out-of-vocabulary row."""
    info = world.dataset.transform.tables["item_id"]
    sparse = read_split(world.dataset, "val").encoded.sparse
    met = sum(int((sparse[f].values == OOV_ROW).sum()) for f in ("item_id", "recent"))
    assert unknown_lookups(world.dataset, info) == pytest.approx(
        met * world.dataset.rows("train") / world.dataset.rows("val")
    )
    users = world.dataset.transform.tables["user_id"]
    assert unknown_lookups(world.dataset, users) > 0
    assert world.profiles["user_id"].unknown == unknown_lookups(world.dataset, users)


@pytest.mark.parametrize("table", TABLES)
def test_key_bits_are_those_of_the_rows_before_each_edge(world: World, table: str) -> None:
    profile, id_map = world.profiles[table], world.dataset.transform.id_maps[table]
    if id_map.keys is None:
        assert profile.key_bits is None
        return
    keys = id_map.keys_by_row()[profile.order[RESERVED_ROWS:] - RESERVED_ROWS]
    assert profile.key_bits is not None
    assert profile.key_bits.tolist() == [key_bits(keys[: e - RESERVED_ROWS]) for e in profile.edges]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("order", ["frequency", "fisher"])
def test_profile_refuses_a_table_that_is_not_finite(
    world: World, order: Order, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = type(world.checkpoint).table_chunks

    def broken(self: Checkpoint, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        for first, rows in chunks(self, name):
            changed = rows.clone()
            changed[-1, -1] = value if name == "city" else changed[-1, -1]
            yield first, changed

    monkeypatch.setattr(type(world.checkpoint), "table_chunks", broken)
    ranked(world, "user_id", order)
    with pytest.raises(CheckpointError, match="table city holds values that are not finite"):
        ranked(world, "city", order)
