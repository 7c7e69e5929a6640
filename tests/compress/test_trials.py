"""compress/search/trials.py: a trial says of a plan what its artifact then is, in scores, bytes and quality."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compress_builders import World, quiet
from tune_builders import EIGHT, INT8, SEARCH, SPACE, prepared

from compress.artifact import load_artifact
from compress.compressor import compress
from compress.config import Choice, Space
from compress.errors import PlanError
from compress.model import translate_rows
from compress.search.objective import by_task, delta_ne, top_overlap
from compress.search.preparation import Preparation
from compress.search.space import Params, first_of, knobs, label, start_points
from compress.search.trials import Running, Shared
from compress.search.tune import SAME_SCORES
from trainer.data.reader import Rows, spread_rows

Outcome = Callable[[str], tuple[Running, list[dict[str, Any]]]]
USUAL: Params = {name: first_of(knob) for name, knob in knobs(SPACE).items()}
SETTINGS: dict[str, Params] = {
    "most bytes": {"budget": 0.3},
    "two bits, few bytes": {"budget": 0.01},
    "few bytes, one centroid": {"budget": 0.02, "centroids": "1"},
    "eight bits": {"budget": 0.05, "bits": "8,16", "trust": 1.0},
    "dear tiers": {"budget": 0.1, "tier_price": 0.01, "bits": "4,8,16"},
    "int8 head": {"budget": 0.1, "dense": label(INT8)},
    "bf16 head, few bytes": {"budget": 0.01, "dense": label(SPACE.dense.choice[2])},
}


def run_through(shared: Shared, params: Params) -> tuple[Running, list[dict[str, Any]]]:
    """A trial and what it said at each rung."""
    running = Running(shared, {**USUAL, **params})
    said = [running.step() for _ in shared.rungs]
    return running, said


@pytest.fixture(scope="module")
def outcome(ready: Preparation) -> Outcome:
    """`run_through` of one of SETTINGS, once."""
    return functools.cache(lambda name: run_through(ready.shared, SETTINGS[name]))


def sample_rows(ready: Preparation) -> Rows:
    """The rows of the search's sample, found again from the split."""
    search = ready.search
    asked = (search.sample_rows, search.selection_rows, search.gate_rows)
    rows = spread_rows(ready.dataset, "val", sum(asked))
    order = np.random.default_rng(search.seed).permutation(len(rows))
    return rows.take(order[: search.sample_rows])


@pytest.mark.parametrize("name", SETTINGS)
def test_trial_scores_and_bytes_are_those_of_its_artifact(
    ready: Preparation, outcome: Outcome, name: str, tmp_path: Path
) -> None:
    """Over all rungs; bit for bit where the head is fp32."""
    running, said = outcome(name)
    logits = np.concatenate(running.logits)
    compress(ready.checkpoint, ready.dataset, running.plan, tmp_path / "a", ready.profiles, quiet, head=running.head)
    artifact = load_artifact(tmp_path / "a")
    rows = sample_rows(ready)
    encoded = translate_rows(artifact.model, ready.dataset, rows.encoded)
    # as many rows at a time: fp32 products of others may round otherwise
    parts = np.split(np.arange(len(rows)), ready.rungs[:-1])
    expected = np.concatenate([artifact.model.score_encoded(encoded.take(part)) for part in parts])
    assert len(logits) == len(expected) == said[-1]["rows"] == 1200
    if running.head is None:
        assert np.array_equal(logits, expected)
    else:
        np.testing.assert_allclose(logits, expected, rtol=0, atol=SAME_SCORES)
    written = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert said[-1]["table_bytes"] == artifact.sizes["table_bytes"]
    assert said[-1]["artifact_bytes"] == pytest.approx(written, rel=0.02)


def test_artifact_bytes_count_the_catalogue_and_every_task(
    world: World, two_tasks_ready: Preparation, tmp_path: Path
) -> None:
    """Of worlds so small that files beside the tables are most of an artifact."""
    one_head = SEARCH.model_copy(update={"space": Space(trust=Choice(choice=(0.0,)), bits=EIGHT)})
    for index, ready in enumerate((prepared(world, one_head), two_tasks_ready)):
        for params in start_points(ready.shared.space, 2):
            running, out = Running(ready.shared, params), tmp_path / f"{index}-{params['dense']}"
            compress(ready.checkpoint, ready.dataset, running.plan, out, ready.profiles, quiet, head=running.head)
            assert (out / "items.arrow").exists() == (index == 0)
            written = sum(path.stat().st_size for path in out.iterdir())
            assert running.sizes["artifact_bytes"] == pytest.approx(written, rel=0.02)


def test_trial_reads_a_tenth_of_the_rows_at_most(ready: Preparation, outcome: Outcome) -> None:
    """What makes the test above worth something; and its settings lose something, and differ."""
    rows = sum(p.info.num_embeddings for p in ready.profiles.values())
    for rung in ready.shared.rungs:
        assert sum(len(w) for w in rung.working.weights.values()) < 0.1 * rows
    found = [outcome(name)[0] for name in SETTINGS]
    assert len({running.plan.model_dump_json() for running in found}) == len(SETTINGS)
    assert all(np.abs(running.logits[0] - ready.shared.rungs[0].reference).max() > 1e-3 for running in found)


def test_trial_is_judged_on_all_rows_so_far(ready: Preparation, outcome: Outcome) -> None:
    running, said = outcome("two bits, few bytes")
    assert [s["rows"] for s in said] == ready.rungs == [120, 360, 1200]
    assert [s["rung"] for s in said] == [0, 1, 2]
    assert [s["done"] for s in said] == [False, False, True]
    for at, one in enumerate(said):
        parts = ready.shared.rungs[: at + 1]
        labels, reference = (np.concatenate([getattr(p, n) for p in parts]) for n in ("labels", "reference"))
        logits = np.concatenate(running.logits[: at + 1])
        assert (one["delta_ne"], one["delta_ne_error"]) == delta_ne(labels, logits, reference)
        if not one["done"]:  # the bound that as many rows as the whole sample's would have
            spread = one["delta_ne_error"] * np.sqrt(one["rows"] / 1200)
            assert one["delta_ne_upper"] == pytest.approx(one["delta_ne"] + 1.6449 * spread)
    assert "overlap" not in said[0]
    best = by_task(labels, logits, reference, ready.shared.seed)[0]
    assert said[2]["delta_ne_upper"] == best.delta_ne_upper
    assert said[2]["delta_ne"] == pytest.approx(best.delta_ne)
    assert said[2]["delta_auc_lower"] == best.delta_auc_lower
    assert said[2]["overlap"] == top_overlap(logits, reference) < 1
    assert "tasks" not in said[2]
    assert running.seconds == said[2]["seconds"] > said[0]["seconds"] > 0


def test_trial_of_two_tasks_names_each_and_takes_the_worst(two_tasks_ready: Preparation) -> None:
    said = run_through(two_tasks_ready.shared, start_points(two_tasks_ready.shared.space, 2)[1])[1][-1]
    assert list(said["tasks"]) == ["click", "buy"]
    assert said["delta_ne_upper"] == max(t["delta_ne_upper"] for t in said["tasks"].values())


def test_trial_predicts_more_milliseconds_for_more_tiers(ready: Preparation) -> None:
    """By its own plan: lookups as planned for, and the head as measured."""
    latency, shared = ready.shared.planner.latency, ready.shared
    running = Running(shared, {**USUAL, "budget": 0.05, "dense": label(INT8)})
    stored = [part.stored for part in running.resolved.values()]
    expected = latency.request.lookup_ms(stored, latency.costs) + shared.variants[label(INT8)].ms
    assert running.sizes["ms"] == pytest.approx(expected)
    assert expected > latency.request.lookup_ms([replace(s, tiers=s.tiers[:1]) for s in stored], latency.costs)


def test_trial_of_params_outside_the_space_is_refused(ready: Preparation) -> None:
    with pytest.raises(PlanError, match="budget 0.9: not in the search space"):
        Running(ready.shared, {**USUAL, "budget": 0.9})


def test_trial_whose_scores_are_not_finite_is_refused(ready: Preparation) -> None:
    rung = ready.shared.rungs[0]
    broken = {**rung.working.dense, "out.bias": np.full(1, np.nan, dtype=np.float32)}
    sample = replace(rung, working=replace(rung.working, dense=broken))
    running = Running(replace(ready.shared, rungs=(sample,)), {**USUAL, "budget": 0.3})
    with pytest.raises(PlanError, match="scores are not finite"):
        running.step()
