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

from compress.config import TablePlan
from compress.errors import PlanError
from compress.ids import key_bits, loose_bits
from compress.methods.codebook import fit_codebook, metric_root
from compress.methods.prune import Score
from compress.search.profile import (
    ROWS_PER_CENTROID,
    UNSEEN_WEIGHT,
    TableProfile,
    class_means,
    make_codebooks,
    profile_table,
    profile_tables,
    same_class,
    unknown_lookups,
)
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
    grown = {f.name for f in dataclasses.fields(TableProfile)} - {
        *("info", "order", "counts", "unknown", "fisher", "key_bits", "codebooks", "foldable")
    }
    assert all(getattr(slim, name).shape[0] <= 98 for name in grown)
    assert len(slim.counts) == 0
    booked = books_of(world, "user_id", "frequency")
    assert all(len(book.numbers) == 182 for book in booked.codebooks.values())
    assert [len(book.numbers) for book in booked.slim().codebooks.values()] == [0, 0]
    assert booked.slim().codebook(4).sizes is booked.codebooks[4].sizes  # type: ignore[union-attr]


# -- orders ----------------------------------------------------------------------------------------------------------


@functools.cache
def fisher_of(table: str, dim: int) -> np.ndarray:
    """Some positive definite matrix (D, D)."""
    root = np.random.default_rng(len(table)).normal(size=(dim, dim))
    return root @ root.T


def ranked(world: World, table: str, order: Score, codebooks: tuple[int, ...] = ()) -> TableProfile:
    info = world.dataset.transform.tables[table]
    return profile_table(
        world.checkpoint,
        info,
        world.dataset.counts(table),
        world.dataset.transform.id_maps[table],
        unknown_lookups(world.dataset, info),
        order,
        fisher_of(table, info.embedding_dim) if order == "fisher" else None,
        codebooks,
    )


def books_of(world: World, table: str, order: Score) -> TableProfile:
    """A table's profile with codebooks of 4 and 16 centroids."""
    return ranked(world, table, order, (16, 4))


def naive_scores(world: World, table: str, order: Score) -> np.ndarray:
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
@pytest.mark.parametrize("order", get_args(Score))
def test_profile_ranks_rows_by_the_order_asked(world: World, table: str, order: Score) -> None:
    profile = ranked(world, table, order)
    scores = naive_scores(world, table, order)[profile.order]
    assert profile.order[:RESERVED_ROWS].tolist() == [0, 1]
    assert np.array_equal(np.sort(profile.order), np.arange(len(scores)))
    falling = scores[RESERVED_ROWS:]
    assert (falling[1:] <= falling[:-1] * (1 + 1e-5)).all()
    counts = world.dataset.counts(table)[profile.order]
    assert profile.lookups.tolist() == [int(counts[:e].sum()) for e in profile.edges]


def test_orders_differ(world: World) -> None:
    """What makes the test above worth something."""
    orders = [ranked(world, "user_id", order).order for order in get_args(Score)]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(orders, 2))


def test_order_by_fisher_needs_the_sensitivity(world: World) -> None:
    with pytest.raises(PlanError, match="score fisher: needs the centroid and the Fisher matrix"):
        profile_tables(world.checkpoint, world.dataset, lambda *_: None, "fisher")


def test_profile_moment_is_the_weighted_sum_of_outer_products(world: World) -> None:
    rows = world.checkpoint.read("tables/city/weight").double().numpy()
    weights = np.maximum(world.dataset.counts("city"), UNSEEN_WEIGHT)
    expected = sum(n * np.outer(w, w) for w, n in zip(rows, weights, strict=True))
    np.testing.assert_allclose(world.profiles["city"].moment, expected, rtol=1e-9, atol=1e-9)


# -- parts of the cut rows, the shared row, keys ---------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
def test_centroid_of_some_ranks_is_the_weighted_mean_of_their_rows(world: World, table: str) -> None:
    profile = world.profiles[table]
    rows = world.checkpoint.read(f"tables/{table}/weight").double().numpy()[profile.order]
    weights = np.maximum(world.dataset.counts(table)[profile.order], UNSEEN_WEIGHT)
    edges = profile.edges[[0, len(profile.edges) // 3, len(profile.edges) // 2, -1]].tolist()
    for first, last in itertools.pairwise(edges):
        expected = weights[first:last] @ rows[first:last] / weights[first:last].sum()
        np.testing.assert_allclose(profile.centroid(first, last), expected, rtol=1e-5, atol=1e-6)
    if edges[1] + 1 not in profile.edges:
        with pytest.raises(AssertionError, match=f"{edges[1] + 1} is no edge of {table}"):
            profile.centroid(edges[0], edges[1] + 1)


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
def test_key_bits_are_those_of_all_ids(world: World, table: str) -> None:
    profile, id_map = world.profiles[table], world.dataset.transform.id_maps[table]
    assert profile.key_bits == (None if id_map.keys is None else key_bits(id_map.keys))


# -- codebooks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("order", ["frequency", "fisher"])
def test_codebook_numbers_are_the_nearest_centroids(world: World, table: str, order: Score) -> None:
    """In what the loss minds, where that is known. Ids of one class read what is nearest to their mean: see below."""
    profile = books_of(world, table, order)
    rows = world.checkpoint.read(f"tables/{table}/weight").double().numpy()
    assert list(profile.codebooks) == [c for c in (16, 4) if c * ROWS_PER_CENTROID <= len(rows) - RESERVED_ROWS]
    metric = fisher_of(table, rows.shape[1]) if order == "fisher" else np.eye(rows.shape[1])
    alone = np.ones(len(rows), dtype=bool)
    id_map = world.dataset.transform.id_maps[table]
    if id_map.keys is not None:
        alone[same_class(id_map.keys_by_row(), loose_bits(len(rows)))[0]] = False
    assert alone.mean() > 0.9
    for count, book in profile.codebooks.items():
        assert book.centroids.shape == (count, rows.shape[1])
        off = rows[:, None] - book.centroids[None]
        far = np.einsum("ncd,de,nce->nc", off, metric, off)
        best, found = far.min(1), far[np.arange(len(rows)), book.numbers]
        assert (found <= best * (1 + 1e-4) + 1e-6)[alone].all()
        assert len(np.unique(book.numbers)) > 1


@pytest.mark.parametrize("table", ["user_id", "item_id", "city"])
def test_codebook_sizes_count_the_rows_of_each_bucket(world: World, table: str) -> None:
    profile = books_of(world, table, "norm")
    for count, book in profile.codebooks.items():
        assert book.sizes.shape == (len(profile.edges) - 1, count)
        for bucket, (first, last) in enumerate(itertools.pairwise(profile.edges)):
            numbers = book.numbers[profile.order[first:last]]
            assert book.sizes[bucket].tolist() == [int((numbers == c).sum()) for c in range(count)]


def test_codebook_is_the_largest_of_so_many_centroids_at_most(world: World) -> None:
    profile = books_of(world, "user_id", "frequency")
    found = [profile.codebook(c) for c in (1, 3, 4, 15, 16, 256)]
    assert [None if b is None else len(b.centroids) for b in found] == [None, None, 4, 4, 16, 16]
    assert books_of(world, "income", "frequency").codebooks == {}


def test_codebooks_of_a_table_in_a_checkpoint_read_in_chunks_are_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = books_of(world, "user_id", "fisher")
    monkeypatch.setattr("trainer.checkpoint.READ_ROWS", 13)
    chunked = books_of(world, "user_id", "fisher")
    for count, book in whole.codebooks.items():
        np.testing.assert_allclose(chunked.codebooks[count].centroids, book.centroids, rtol=1e-6)
        assert np.array_equal(chunked.codebooks[count].numbers, book.numbers)


def test_codebook_is_fitted_to_the_tail_by_lookups(world: World) -> None:
    """Rows past the head, weighted by how often they are looked up."""
    profile, rows = books_of(world, "user_id", "frequency"), world.checkpoint.read("tables/user_id/weight")
    tail = np.sort(profile.order[max(RESERVED_ROWS, int(0.02 * len(rows))) :])
    weight = torch.from_numpy(np.maximum(world.dataset.counts("user_id")[tail].astype(np.float64), UNSEEN_WEIGHT))
    expected = fit_codebook(rows[tail], weight, 16, metric_root(None, 16))
    assert np.array_equal(profile.codebooks[16].centroids, expected.numpy())


def test_rows_of_one_class_read_the_centroid_nearest_to_their_mean(world: World) -> None:
    """Ids whose loose keys are the same, put side by side on purpose: a trial could not tell them apart otherwise."""
    info, counts = world.dataset.transform.tables["user_id"], world.dataset.counts("user_id")
    rows = world.checkpoint.read("tables/user_id/weight")
    keys = np.arange(len(rows) - RESERVED_ROWS, dtype=np.uint64) // np.uint64(3) << np.uint64(64 - loose_bits(182))
    profile = world.profiles["user_id"]
    args = (world.checkpoint, info, profile.order, profile.edges, counts)
    (book,) = make_codebooks(*args, keys, None, [8]).values()
    (free,) = make_codebooks(*args, None, None, [8]).values()
    assert np.array_equal(book.centroids, free.centroids)
    moved = 0
    for first in range(RESERVED_ROWS, len(rows), 3):
        own = slice(first, first + 3)
        weight = np.maximum(counts[own], UNSEEN_WEIGHT)
        mean = weight @ rows[own].double().numpy() / weight.sum()
        nearest = np.linalg.norm(book.centroids - mean, axis=1).argmin()
        assert book.numbers[own].tolist() == [nearest] * 3
        moved += free.numbers[own].tolist() != [nearest] * 3
    assert moved > 10
    assert book.sizes.sum() == len(rows) - RESERVED_ROWS


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [4, 12, 64])
def test_same_class_finds_every_row_that_is_not_alone(seed: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 2**64, 60 if bits < 64 else 10, dtype=np.uint64)
    if bits == 12:
        keys &= np.uint64(0xF0FF << 48 | 1)
    keys[rng.integers(0, len(keys))] = keys[0]
    classes = [int(k) >> (64 - bits) for k in keys]
    expected = [row + RESERVED_ROWS for row, c in enumerate(classes) if classes.count(c) > 1]
    rows, found = same_class(keys, bits)
    assert rows.tolist() == expected
    for one, other in itertools.combinations(range(len(rows)), 2):
        same = classes[rows[one] - RESERVED_ROWS] == classes[rows[other] - RESERVED_ROWS]
        assert (found[one] == found[other]) == same
    assert found.tolist() == np.unique(found, return_inverse=True)[1].tolist(), "numbered from 0 on"


def test_same_class_of_keys_apart_is_none() -> None:
    rows, classes = same_class(np.arange(5, dtype=np.uint64) << np.uint64(60), 4)
    assert (len(rows), len(classes)) == (0, 0)
    assert class_means(torch.zeros((0, 3)), classes, np.zeros(0)).shape == (0, 3)


def test_class_means_weigh_rows_by_lookups() -> None:
    rng = np.random.default_rng(0)
    rows, classes = rng.normal(size=(30, 4)), rng.permutation(np.arange(30) % 7)
    counts = rng.integers(0, 5, 30)
    counts[classes == 3] = 0  # never looked up: each counts alike
    found = class_means(torch.from_numpy(rows).float(), classes, counts)
    for each in range(7):
        own = classes == each
        expected = np.average(rows[own], axis=0, weights=np.maximum(counts[own], UNSEEN_WEIGHT))
        np.testing.assert_allclose(found[each], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("order", ["frequency", "fisher"])
def test_profile_refuses_a_table_that_is_not_finite(
    world: World, order: Score, value: float, monkeypatch: pytest.MonkeyPatch
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
