"""What a search works on, prepared without Ray: side by side becomes one after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from compress_builders import World, build_world, large_world_in, quiet

from compress.config import CalibrationPlan, Choice, SearchConfig, Space
from compress.methods.dense import DensePlan
from compress.search import halving, preparation
from compress.search.latency import TERMS, MachineCosts
from compress.search.preparation import Preparation, prepare

COSTS = MachineCosts(machine="made up", ns=dict.fromkeys(TERMS, 20.0), relative_error=0.0, lookups=1)
INT8, BF16 = DensePlan(dtype="int8", max_loss=1.0), DensePlan(dtype="bf16", max_loss=1.0)
SPACE = Space(dense=Choice(choice=(DensePlan(), INT8, BF16)))
EIGHT = Choice(choice=((8, 16),))
CALIBRATE = CalibrationPlan(steps=20, batch_size=128, lr=1e-2, target="labels", evaluations=4, held_rows=400)
SEARCH = SearchConfig(
    space=SPACE, sample_rows=1200, selection_rows=800, gate_rows=2000, max_delta_ne=0.01, calibrate=CALIBRATE
)


def serial(work: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any]) -> list[Any]:
    """One after the other."""
    return [work(shared, item) for item in items]


def prepared(world: World, search: SearchConfig) -> Preparation:
    """A search prepared on made-up costs of this machine, with rungs of fewer rows than are worth it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "calibrate_machine", lambda: COSTS)
        patch.setattr(halving, "MIN_RUNG_ROWS", 50)
        return prepare(world.checkpoint, world.dataset, search, serial, quiet)


@functools.cache
def ready_in(base: Path) -> Preparation:
    """Of the large world: 1200 rows of the sample touch a twentieth of the users."""
    return prepared(large_world_in(base), SEARCH)


@functools.cache
def two_tasks_ready_in(base: Path) -> Preparation:
    """Of a world with two tasks and too few validation rows for what is asked."""
    tasks = ("click", "buy")
    world = build_world(base / "two-tasks-480", rows=2400, seed=7, tasks=tasks, arch="dlrm", catalogue=False)
    return prepared(world, SEARCH.model_copy(update={"space": Space(trust=Choice(choice=(0.0,)), bits=EIGHT)}))
