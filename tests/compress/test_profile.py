"""compress/search/profile.py: cuts and centroids of a real checkpoint's tables, against naive sums."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from compress_builders import World

from compress.config import TablePlan
from compress.search.profile import UNSEEN_WEIGHT, TableProfile, profile_tables
from trainer.data.transform import RESERVED_ROWS

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
