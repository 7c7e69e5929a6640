"""compress/search/ray_tune.py without Ray: what is split, resumed, chosen and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compress_builders import World

from compress.artifact import Artifact
from compress.config import CompressionPlan, SearchConfig, TablePlan
from compress.errors import ArtifactError
from compress.search.objective import compare
from compress.search.ray_tune import Shared, check_artifact, choose, read_trials, run_plan, split_rows
from compress.search.working_set import extract, score
from trainer.data.reader import Rows, read_split
from trainer.errors import DataError

SEARCH = SearchConfig(sample_rows=100, gate_rows=150)


def shared_of(world: World, rows: Rows) -> Shared:
    """What the driver puts in the object store."""
    working = extract(world.checkpoint, world.dataset.transform, world.profiles, rows)
    slim = {n: p.slim() for n, p in world.profiles.items()}
    return Shared(working, score(working, None), slim, 0)


def point(bits: int, upper: float, keep: float = 1.0) -> dict[str, Any]:
    """A point of a front: a plan and the bound that the search found."""
    plan = CompressionPlan(default=TablePlan(bits=bits, keep=keep))  # type: ignore[arg-type]
    return {"plan": plan.model_dump(mode="json"), "delta_ne_upper": upper, "table_bytes": bits}


def test_split_rows_are_disjoint_and_of_the_asked_sizes(world: World) -> None:
    rows = read_split(world.dataset, "val")
    for_search, for_gate = split_rows(world.dataset, SEARCH)
    assert (len(for_search), len(for_gate)) == (100, 150)

    def marks(part: Rows) -> list[tuple]:
        return [
            tuple(r) for r in np.column_stack([part.encoded.dense, part.encoded.sparse["income"].values, part.groups])
        ]

    assert len(set(marks(rows))) == len(rows)  # every row can be told from the others
    assert not set(marks(for_search)) & set(marks(for_gate))


@pytest.mark.parametrize(("sample", "gate", "sizes"), [(10_000, 10_000, (300, 300)), (100, 10_000, (100, 500))])
def test_split_rows_leave_half_to_the_gate(world: World, sample: int, gate: int, sizes: tuple[int, int]) -> None:
    parts = split_rows(world.dataset, SearchConfig(sample_rows=sample, gate_rows=gate))
    assert tuple(len(p) for p in parts) == sizes


def test_split_rows_need_enough_of_them(two_tasks: World) -> None:
    with pytest.raises(DataError, match="180 validation rows"):
        split_rows(two_tasks.dataset, SEARCH)


def test_run_plan_tells_bytes_and_quality(world: World) -> None:
    shared = shared_of(world, read_split(world.dataset, "val"))
    plan = CompressionPlan(default=TablePlan(bits=4, coverage=0.8))
    result, logits = run_plan(shared, plan)
    manifest = world.artifact(plan).manifest
    assert result["table_bytes"] == manifest["sizes"]["table_bytes"]
    quality = compare(shared.working.labels, logits, shared.reference, 0)
    assert result["delta_ne"] == quality.delta_ne != 0
    assert result["delta_ne_upper"] == quality.delta_ne_upper


def test_run_plan_of_fp32_loses_nothing(world: World) -> None:
    result, _ = run_plan(
        shared_of(world, read_split(world.dataset, "test")), CompressionPlan(default=TablePlan(bits=32))
    )
    assert result["delta_ne"] == result["delta_auc"] == 0.0


def test_read_trials_leaves_out_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    assert read_trials(path) == {}
    first, second = point(8, 0.1), point(4, 0.2)
    path.write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n" + json.dumps(point(2, 0.3))[:40])
    trials = read_trials(path)
    assert trials == {json.dumps(p["plan"]): p for p in (first, second)}


def test_choose_takes_the_smallest_point_that_holds_on_both(world: World) -> None:
    gate = shared_of(world, read_split(world.dataset, "test"))
    front = [point(4, 0.5, keep=0.1), point(16, 0.0005), point(32, 0.0)]
    chosen, verdict = choose(front, gate, 0.01)
    assert chosen == 1
    assert verdict["passed"]
    assert verdict["tried"] == [1]
    assert verdict["rows"] == 300
    assert verdict["delta_ne_upper"] <= 0.01


def test_choose_goes_on_when_the_gate_refuses(world: World) -> None:
    """The search liked a plan that the gate's rows do not."""
    gate = shared_of(world, read_split(world.dataset, "test"))
    chosen, verdict = choose([point(4, 0.0, keep=0.05), point(32, 0.0)], gate, 1e-4)
    assert chosen == 1
    assert verdict["tried"] == [0, 1]
    assert verdict["passed"]


def test_choose_says_when_nothing_holds(world: World) -> None:
    gate = shared_of(world, read_split(world.dataset, "test"))
    chosen, verdict = choose([point(4, 0.9, keep=0.01), point(4, 0.5, keep=0.05)], gate, 1e-4)
    assert chosen == 1
    assert not verdict["passed"]
    assert verdict["tried"] == []
    assert verdict["rows_to_resolve"] >= 0
    assert verdict["delta_ne_upper"] > 1e-4


def test_check_artifact_compares_with_the_trial(world: World, artifact: Artifact, plan: CompressionPlan) -> None:
    rows = read_split(world.dataset, "test")
    _, logits = run_plan(shared_of(world, rows), plan)
    check_artifact(artifact.folder, world.dataset, rows, logits)
    logits[3] += 1e-3
    with pytest.raises(ArtifactError, match="differ from the trial's by 0.001"):
        check_artifact(artifact.folder, world.dataset, rows, logits)
