"""compress/search/budget.py: what a first estimate of the bytes leaves over is given out."""

from __future__ import annotations

import pytest
from compress_builders import World, quiet

from compress.compressor import resolve, table_bytes
from compress.search import budget as under_test
from compress.search.budget import CODEBOOKS, plan_for_budget
from compress.search.profile import TableProfile, profile_tables
from compress.search.sensitivity import Predicted, predict, sensitivities

SIZES = (3000, 4000, 6000, 9000)
Costs = tuple[dict[str, TableProfile], dict[str, Predicted]]


@pytest.fixture(scope="module")
def costs(world: World) -> Costs:
    """Profiles and predicted losses of the world's tables."""
    fisher = sensitivities(world.checkpoint, world.dataset, quiet)
    profiles = profile_tables(world.checkpoint, world.dataset, quiet, "fisher", fisher, CODEBOOKS)
    return profiles, predict(world.checkpoint, profiles, fisher, world.dataset.rows("train"), quiet)


def test_more_rounds_spend_more_of_the_budget(costs: Costs, monkeypatch: pytest.MonkeyPatch) -> None:
    profiles, predicted = costs
    found = [plan_for_budget(profiles, predicted, size) for size in SIZES]
    for one, size in zip(found, SIZES, strict=True):
        assert one.bytes == table_bytes(resolve(one.plan, profiles)) <= size
    monkeypatch.setattr(under_test, "CLOSE", 1.0)  # whatever fits is close enough
    first = [plan_for_budget(profiles, predicted, size) for size in SIZES]
    assert all(one.loss <= other.loss for one, other in zip(found, first, strict=True))
    assert sum(one.bytes for one in found) > sum(one.bytes for one in first)


def test_a_smaller_budget_costs_more(costs: Costs) -> None:
    profiles, predicted = costs
    losses = [plan_for_budget(profiles, predicted, size).loss for size in SIZES]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]
