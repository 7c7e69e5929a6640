"""compress/search/working_set.py: a trial on some rows scores as the whole compressed model does."""

from __future__ import annotations

import numpy as np
import pytest
from compress_builders import World

from compress.compressor import ResolvedTable, resolve
from compress.config import CompressionPlan, TablePlan
from compress.model import translate_rows
from compress.search.working_set import WorkingSet, extract, score, trial_model
from trainer.data.reader import Rows, read_split

PLANS = {
    "int8": {"default": {"bits": 8}},
    "fp32": {"default": {"bits": 32}},
    "fp16 pruned": {"default": {"bits": 16, "keep": 0.4}},
    "int4 pruned": {"default": {"bits": 4, "coverage": 0.8}},
    "all pruned": {"default": {"bits": 8, "keep": 1e-9}},
    "mixed": {
        "default": {"bits": 8},
        "tables": {
            "user_id": {"bits": 2, "keep": 0.3},
            "item_id": {"bits": 4, "coverage": 0.5},
            "city": {"bits": 32, "coverage": 0.5},
        },
    },
}


def some_rows(world: World, size: int) -> Rows:
    """A few validation rows, spread over the split."""
    rows = read_split(world.dataset, "val")
    return rows.take(np.linspace(0, len(rows) - 1, size).astype(np.int64))


def working_set(world: World, rows: Rows) -> WorkingSet:
    return extract(world.checkpoint, world.dataset.transform, world.profiles, rows)


def centroids(world: World, resolved: dict[str, ResolvedTable]) -> dict[str, np.ndarray]:
    return {n: world.profiles[n].centroid(r.cut) for n, r in resolved.items() if r.pruned}


def trial_logits(world: World, rows: Rows, plan: CompressionPlan) -> np.ndarray:
    """What a trial gives these rows."""
    slim = {n: p.slim() for n, p in world.profiles.items()}
    resolved = resolve(plan, slim)
    working = working_set(world, rows)
    return score(trial_model(working, resolved, centroids(world, resolved)), working)


def test_working_set_holds_the_touched_rows_only(world: World) -> None:
    rows = some_rows(world, 12)
    working = working_set(world, rows)
    weight = world.checkpoint.read("tables/user_id/weight").numpy()
    touched = np.unique(rows.encoded.sparse["user_id"].values)
    assert np.array_equal(working.weights["user_id"], weight[touched])
    assert np.array_equal(working.ranks["user_id"], world.profiles["user_id"].ranks()[touched])
    assert len(touched) < 0.1 * len(weight)
    shared = np.union1d(rows.encoded.sparse["item_id"].values, rows.encoded.sparse["recent"].values)
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
    assert np.array_equal(score(trial_model(working, None, {}), working), world.fp32.score_encoded(rows.encoded))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("size", [12, 300])
def test_trial_scores_are_exactly_the_artifacts(world: World, name: str, size: int) -> None:
    plan = CompressionPlan.model_validate(PLANS[name])
    rows = some_rows(world, size)
    model = world.artifact(plan).model
    expected = model.score_encoded(translate_rows(model, world.dataset, rows.encoded))
    assert np.array_equal(trial_logits(world, rows, plan), expected)


def test_trial_tests_touch_pruned_rows_and_move_scores(world: World) -> None:
    """What makes the tests above worth something: rows are pruned in the sample, and scores change."""
    plan = CompressionPlan.model_validate(PLANS["mixed"])
    rows = some_rows(world, 12)
    working = working_set(world, rows)
    resolved = resolve(plan, world.profiles)
    for table in ("user_id", "item_id"):
        dropped = working.ranks[table] >= resolved[table].cut
        assert 0 < dropped.sum() < len(dropped)
    fp32 = world.fp32.score_encoded(rows.encoded)
    assert np.abs(trial_logits(world, rows, plan) - fp32).max() > 0.05


def test_trial_of_two_tasks_scores_as_its_artifact(two_tasks: World) -> None:
    plan = CompressionPlan(default=TablePlan(bits=4, coverage=0.7))
    rows = some_rows(two_tasks, 60)
    model = two_tasks.artifact(plan).model
    expected = model.score_encoded(translate_rows(model, two_tasks.dataset, rows.encoded))
    assert expected.shape == (60, 2)
    assert np.array_equal(trial_logits(two_tasks, rows, plan), expected)


def test_trial_does_not_write_into_what_is_shared(world: World) -> None:
    """In the object store these arrays are read-only."""
    rows = some_rows(world, 40)
    working = working_set(world, rows)
    for array in (*working.weights.values(), *working.ranks.values(), *working.dense.values()):
        array.flags.writeable = False
    before = {k: v.copy() for k, v in working.weights.items()}
    resolved = resolve(CompressionPlan.model_validate(PLANS["mixed"]), world.profiles)
    score(trial_model(working, resolved, centroids(world, resolved)), working)
    assert all(np.array_equal(before[k], v) for k, v in working.weights.items())
