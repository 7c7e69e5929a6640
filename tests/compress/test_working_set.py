"""compress/search/working_set.py: a trial on some rows scores as the whole compressed model does."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compress_builders import World, large_world_in, quiet
from rich_builders import rich_world_in

from compress.artifact import load_artifact
from compress.compressor import ResolvedTable, compress, resolve
from compress.config import CompressionPlan
from compress.ids import loose_bits
from compress.methods.prune import Score
from compress.model import CompressedModel, translate_rows
from compress.search.profile import TableProfile, profile_tables
from compress.search.sensitivity import sensitivities
from compress.search.working_set import WorkingSet, extract, score, trial_model
from trainer.data.reader import Rows, read_split

TWO = [{"bits": 8, "keep": 0.1}, {"bits": 4, "keep": 0.5}]
ZONE = {"tiers": [{"bits": 4, "keep": 0.2}, {"bits": 0, "keep": 0.6}], "unknown": "shared"}
PLANS: dict[str, dict[str, Any]] = {
    "int8": {"default": {"bits": 8}},
    "fp32": {"default": {"bits": 32}},
    "fp16 pruned": {"default": {"bits": 16, "keep": 0.4}},
    "int4 pruned": {"default": {"bits": 4, "coverage": 0.8}},
    "almost all kept": {"default": {"bits": 8, "keep": 0.9, "centroids": 3}},
    "all pruned": {"default": {"bits": 8, "keep": 1e-9}},
    "tiers": {"default": {"tiers": TWO}},
    "tiers of all rows": {"default": {"tiers": [{"bits": 32, "rows": 2}, {"bits": 16, "rows": 9}, {"bits": 4}]}},
    "tiers by coverage": {"default": {"tiers": [{"bits": 8, "coverage": 0.5}, {"bits": 4, "coverage": 0.9}]}},
    "tiers, min-max": {"default": {"tiers": TWO, "clip": "minmax"}},
    "tiers, each its clip": {
        "default": {"tiers": [{"bits": 8, "keep": 0.1, "clip": "minmax"}, {"bits": 4, "keep": 0.6, "clip": "search"}]}
    },
    "four tiers": {
        "default": {"bits": 8},
        "tables": {
            "item_id": {"tiers": [{"bits": b, "keep": k} for b, k in ((32, 0.05), (8, 0.2), (4, 0.4), (2, 0.7))]}
        },
    },
    "centroids": {"default": {"tiers": TWO, "centroids": 5}},
    "many centroids": {"default": {"bits": 4, "keep": 0.2, "centroids": 256}},
    "bits 0": {"default": {"tiers": [*TWO, {"bits": 0}], "centroids": 16}},
    "bits 0, the mean": {"default": {"tiers": [{"bits": 4, "keep": 0.2}, {"bits": 0}]}},
    "bits 0, forgotten": {"order": "norm", "default": {**ZONE, "centroids": 4}},
    "bits 0, mean, forgotten": {"order": "norm", "default": ZONE},
    "bits 0, by fisher, forgotten": {"order": "fisher", "default": {**ZONE, "centroids": 16}},
    "all read centroids": {"default": {"tiers": [{"bits": 0}], "centroids": 4}},
    "all read centroids or are forgotten": {
        "default": {"tiers": [{"bits": 0, "keep": 0.4}], "centroids": 4, "unknown": "shared"}
    },
    "forgotten": {"default": {"bits": 4, "keep": 0.3, "unknown": "shared"}},
    "tiers, forgotten": {"default": {"tiers": TWO, "unknown": "shared"}},
    "all forgotten": {"default": {"bits": 8, "keep": 1e-9, "unknown": "shared"}},
    "by norm": {"order": "norm", "default": {"tiers": TWO, "centroids": 2}},
    "by frequency and norm": {"order": "frequency_norm", "default": {"tiers": TWO, "unknown": "shared"}},
    "by fisher": {"order": "fisher", "default": {"tiers": TWO}},
    "low rank": {"default": {"bits": 8, "rank": 8}},
    "low rank, tiers": {"default": {"tiers": TWO, "rank": 8, "centroids": 2}},
    "low rank, bits 0": {"default": {**ZONE, "rank": 8, "centroids": 4}},
    "energy, by fisher": {"order": "fisher", "default": {"bits": 8, "energy": 0.8, "keep": 0.5, "unknown": "shared"}},
    "columns": {"default": {"bits": 4, "columns": 8, "keep": 0.5}},
    "mixed": {
        "default": {"bits": 8},
        "tables": {
            "user_id": {"bits": 2, "keep": 0.3},
            "item_id": {"bits": 4, "coverage": 0.5},
            "city": {"bits": 32, "coverage": 0.5},
        },
    },
}


@functools.cache
def fisher_of(world: World) -> dict[str, np.ndarray]:
    return sensitivities(world.checkpoint, world.dataset, quiet)


@functools.cache
def profiles_by(world: World, order: Score) -> dict[str, TableProfile]:
    """Profiles of a world's tables, ranked so."""
    fisher = fisher_of(world) if order == "fisher" else None
    return profile_tables(world.checkpoint, world.dataset, quiet, order, fisher, (2, 4, 16))


@functools.cache
def model_of(world: World, name: str) -> CompressedModel:
    """The model of one of PLANS as an artifact holds it."""
    plan = CompressionPlan.model_validate(PLANS[name])
    out = Path(tempfile.mkdtemp(prefix="artifact-", dir=world.folder))
    compress(world.checkpoint, world.dataset, plan, out, profiles_by(world, plan.order), quiet)
    return load_artifact(out).model


def some_rows(world: World, size: int) -> Rows:
    """A few validation rows, spread over the split."""
    rows = read_split(world.dataset, "val")
    return rows.take(np.linspace(0, len(rows) - 1, size).astype(np.int64))


def working_set(world: World, rows: Rows, order: Score = "frequency") -> WorkingSet:
    return extract(world.checkpoint, world.dataset.transform, profiles_by(world, order), rows)


def slim_resolved(world: World, plan: CompressionPlan) -> dict[str, ResolvedTable]:
    """A plan resolved with what a trial has."""
    return resolve(plan, {n: p.slim() for n, p in profiles_by(world, plan.order).items()})


def trial_logits(world: World, rows: Rows, plan: CompressionPlan) -> np.ndarray:
    """What a trial gives these rows."""
    return score(working_set(world, rows, plan.order), slim_resolved(world, plan))


def check_trial(world: World, name: str, rows: Rows) -> None:
    """The trial's scores are the artifact's, bit for bit."""
    model = model_of(world, name)
    expected = model.score_encoded(translate_rows(model, world.dataset, rows.encoded))
    assert np.abs(expected).max() > 0
    assert np.array_equal(trial_logits(world, rows, CompressionPlan.model_validate(PLANS[name])), expected)


def test_working_set_holds_the_touched_rows_only(world: World) -> None:
    rows = some_rows(world, 12)
    working = working_set(world, rows)
    weight = world.checkpoint.read("tables/user_id/weight").numpy()
    touched = np.union1d([0, 1], rows.encoded.sparse["user_id"].values)
    ranks = world.profiles["user_id"].ranks()[touched]
    assert np.array_equal(working.weights["user_id"], weight[touched[np.argsort(ranks)]])
    assert np.array_equal(working.ranks["user_id"], np.sort(ranks))
    assert len(touched) < 0.1 * len(weight)
    shared = {0, 1, *rows.encoded.sparse["item_id"].values, *rows.encoded.sparse["recent"].values}
    assert len(working.weights["item_id"]) == len(shared)
    assert working.bytes == sum(w.nbytes for w in working.weights.values()) < 0.5 * 27040


def test_working_set_sample_points_at_the_same_rows(world: World) -> None:
    rows = some_rows(world, 50)
    working = working_set(world, rows)
    for name, ragged in rows.encoded.sparse.items():
        table = world.dataset.transform.table_of(name).name
        weight = world.checkpoint.read(f"tables/{table}/weight").numpy()
        assert np.array_equal(working.weights[table][working.sample.sparse[name].values], weight[ragged.values])
    assert np.array_equal(working.labels, rows.labels)


def test_trial_without_a_plan_scores_as_the_checkpoint(world: World) -> None:
    rows = some_rows(world, 200)
    working = working_set(world, rows)
    assert np.array_equal(score(working, None), world.fp32.score_encoded(rows.encoded))


def test_trial_of_one_table_leaves_the_others_fp32(world: World) -> None:
    rows = some_rows(world, 100)
    working = working_set(world, rows)
    resolved = slim_resolved(world, CompressionPlan.model_validate(PLANS["tiers"]))
    others = {n: {"bits": 32} for n in resolved if n != "user_id"}
    alone = CompressionPlan.model_validate({"default": {"tiers": TWO}, "tables": others})
    assert np.array_equal(score(working, {"user_id": resolved["user_id"]}), trial_logits(world, rows, alone))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("size", [1, 12, 300])
def test_trial_scores_are_exactly_the_artifacts(world: World, name: str, size: int) -> None:
    check_trial(world, name, some_rows(world, size))


@pytest.mark.parametrize("name", PLANS)
def test_trial_whose_rows_are_all_kept_scores_as_the_artifact(world: World, name: str) -> None:
    """Rows whose users, items and towns are the most frequent: cuts, centroids and late tiers are there, untouched."""
    rows = read_split(world.dataset, "val")
    ranks = {n: profiles_by(world, "frequency")[n].ranks() for n in ("user_id", "item_id", "city")}
    often = [
        np.concatenate([[0], ranks[world.dataset.transform.table_of(f).name][r.values]])
        for f, r in rows.encoded.sparse.items()
        if f in ("user_id", "item_id", "city")
    ]
    index = np.flatnonzero(np.max([o[1:] for o in often], axis=0) < 30)
    assert len(index) > 10
    check_trial(world, name, rows.take(index[:3]))


@pytest.mark.parametrize("name", ["tiers", "tiers, forgotten", "four tiers", "by norm", "bits 0, forgotten"])
@pytest.mark.parametrize("index", [0, 7, 31, 100, 333])
def test_trial_of_a_single_row_scores_as_the_artifact(world: World, name: str, index: int) -> None:
    check_trial(world, name, read_split(world.dataset, "val").take(np.array([index])))


def test_trial_tests_leave_tiers_and_cuts_untouched(world: World) -> None:
    """What makes the tests above worth something: samples without a row of some tier, or with no row that is cut."""
    model, _ = trial_model(
        working_set(world, some_rows(world, 1)),
        slim_resolved(world, CompressionPlan.model_validate(PLANS["four tiers"])),
    )
    trial = {t.name: t for t in model.lookup.tables}
    whole = {t.name: t for t in model_of(world, "four tiers").lookup.tables}
    assert len(trial["item_id"].tiers) < len(whole["item_id"].tiers) == 4
    assert trial["item_id"].rows < 0.1 * whole["item_id"].rows


def test_trial_tests_touch_pruned_rows_and_move_scores(world: World) -> None:
    """What makes the tests above worth something: rows are pruned in the sample, and scores change."""
    plan = CompressionPlan.model_validate(PLANS["mixed"])
    rows = some_rows(world, 12)
    working = working_set(world, rows)
    resolved = resolve(plan, world.profiles)
    for table in ("user_id", "item_id"):
        dropped = working.ranks[table] >= resolved[table].layout.kept
        assert 0 < dropped.sum() < len(dropped)
    fp32 = world.fp32.score_encoded(rows.encoded)
    assert np.abs(trial_logits(world, rows, plan) - fp32).max() > 0.05


@pytest.mark.parametrize("name", PLANS)
def test_trial_of_two_tasks_scores_as_its_artifact(two_tasks: World, name: str) -> None:
    rows = some_rows(two_tasks, 60)
    assert model_of(two_tasks, name).score_encoded(
        translate_rows(model_of(two_tasks, name), two_tasks.dataset, rows.encoded)
    ).shape == (60, 2)
    check_trial(two_tasks, name, rows)


@pytest.mark.parametrize(
    "name",
    [
        "int4 pruned",
        "tiers",
        "centroids",
        "tiers, forgotten",
        "by frequency and norm",
        "all forgotten",
        "bits 0, forgotten",
    ],
)
@pytest.mark.parametrize("size", [2, 50])
def test_trial_of_sequences_scores_as_its_artifact(
    tmp_path_factory: pytest.TempPathFactory, name: str, size: int
) -> None:
    """Attention, weighted bags, two poolings on one table."""
    world = rich_world_in(tmp_path_factory.getbasetemp(), "dcn")
    check_trial(world, name, some_rows(world, size))


def test_trial_does_not_write_into_what_is_shared(world: World) -> None:
    """In the object store these arrays are read-only."""
    rows = some_rows(world, 40)
    working = working_set(world, rows)
    for array in (*working.weights.values(), *working.ranks.values(), *working.dense.values()):
        array.flags.writeable = False
    before = {k: v.copy() for k, v in working.weights.items()}
    for array in (*working.mates.values(), *(a for books in working.clusters.values() for a in books.values())):
        array.flags.writeable = False
    for name in ("mixed", "tiers, forgotten", "bits 0, forgotten"):
        plan = CompressionPlan.model_validate(PLANS[name]).model_copy(update={"order": "frequency"})
        score(working, slim_resolved(world, plan))
    assert all(np.array_equal(before[k], v) for k, v in working.weights.items())


@pytest.mark.parametrize("name", ["tiers", "centroids", "bits 0, by fisher, forgotten", "low rank, tiers", "mixed"])
def test_taken_rows_score_as_they_do_in_the_whole(world: World, name: str) -> None:
    rows, plan = some_rows(world, 120), CompressionPlan.model_validate(PLANS[name])
    working, resolved = working_set(world, rows, plan.order), slim_resolved(world, plan)
    for index in (np.arange(10, 40), np.array([5, 3, 3, 99, 0]), np.arange(120)[::-1], np.array([7])):
        part = working.take(index)
        # fp32 products of another number of rows may round otherwise
        np.testing.assert_allclose(score(part, resolved), score(working, resolved)[index], rtol=0, atol=1e-6)
        assert np.array_equal(part.labels, working.labels[index])


def test_taken_rows_have_the_working_set_of_a_sample_of_them(world: World) -> None:
    rows, index = some_rows(world, 120), np.arange(20, 35)
    part, alone = working_set(world, rows).take(index), working_set(world, rows.take(index))
    for name in part.weights:
        assert np.array_equal(part.weights[name], alone.weights[name])
        assert np.array_equal(part.ranks[name], alone.ranks[name])
        assert {tuple(m) for m in part.mates[name]} == {tuple(m) for m in alone.mates[name]}
        assert part.clusters[name].keys() == alone.clusters[name].keys()
        assert all(np.array_equal(part.clusters[name][c], alone.clusters[name][c]) for c in part.clusters[name])
    for name, ragged in part.sample.sparse.items():
        assert np.array_equal(ragged.values, alone.sample.sparse[name].values)
    assert part.bytes < working_set(world, rows).bytes


def test_score_with_another_head_is_that_heads(world: World) -> None:
    """A head that adds one to what the checkpoint's own says."""
    working = working_set(world, some_rows(world, 30))
    resolved = slim_resolved(world, CompressionPlan.model_validate(PLANS["tiers"]))
    state = {**working.dense, "out.bias": working.dense["out.bias"] + 1}
    other = trial_model(replace(working, dense=state), None)[0].head
    np.testing.assert_allclose(score(working, resolved, other), score(working, resolved) + 1, rtol=0, atol=1e-5)


# -- ids that share a class ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> World:
    """21,000 users, each seen once or so: some share their loose key."""
    return large_world_in(tmp_path_factory.getbasetemp())


def classmates(world: World) -> dict[int, list[int]]:
    """Training rows of users by the loose key that they share with another, one by one."""
    id_map = world.dataset.transform.id_maps["user_id"]
    bits = loose_bits(id_map.size + 2)
    found: dict[int, list[int]] = {}
    for row, key in enumerate(id_map.keys_by_row(), 2):
        found.setdefault(int(key) >> (64 - bits), []).append(row)
    return {c: rows for c, rows in found.items() if len(rows) > 1}


def test_working_set_knows_every_mate_of_its_rows(large: World) -> None:
    rows = read_split(large.dataset, "val")
    working, ranks = working_set(large, rows), profiles_by(large, "frequency")["user_id"].ranks()
    touched = set(rows.encoded.sparse["user_id"].values.tolist())
    expected = {
        (int(ranks[one]), int(ranks[other]))
        for together in classmates(large).values()
        for one in together
        for other in together
        if one != other and one in touched
    }
    mates = working.mates["user_id"]
    assert {(int(working.ranks["user_id"][place]), int(rank)) for place, rank in mates} == expected
    assert len(expected) > 20
    assert working.mates["city"].shape == (0, 2)


@pytest.mark.parametrize("name", ["bits 0, forgotten", "bits 0, mean, forgotten", "bits 0", "centroids", "forgotten"])
def test_trial_whose_forgotten_ids_are_taken_for_others_scores_as_the_artifact(large: World, name: str) -> None:
    rows = read_split(large.dataset, "val")
    plan = CompressionPlan.model_validate(PLANS[name])
    layout, ranks = slim_resolved(large, plan)["user_id"].layout, profiles_by(large, plan.order)["user_id"].ranks()
    touched = set(rows.encoded.sparse["user_id"].values.tolist())
    taken = [
        row
        for together in classmates(large).values()
        for row in together
        if row in touched and ranks[row] >= layout.zone and any(layout.kept <= ranks[r] < layout.zone for r in together)
    ]
    assert (len(taken) > 3) == (name in ("bits 0, forgotten", "bits 0, mean, forgotten"))
    check_trial(large, name, rows)
    mistaken = np.flatnonzero(np.isin(rows.encoded.sparse["user_id"].values, taken))
    for index in mistaken[:3]:
        check_trial(large, name, rows.take(np.array([index])))
