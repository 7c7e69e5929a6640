"""compress/search/planner.py: what each knob of a setting changes in the plan, and that its bytes hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tune_builders import INT8

from compress.compressor import resolve, table_bytes
from compress.config import CompressionPlan
from compress.errors import PlanError
from compress.methods.dense import DensePlan
from compress.search.budget import Budgeted, plan_for_budget
from compress.search.planner import Planner, restricted, scaled
from compress.search.preparation import Preparation
from compress.search.sensitivity import Predicted

USUAL: dict[str, Any] = {
    "budget": 0.05,
    "bits": (2, 4, 8, 16),
    "centroids": 256,
    "trust": 0.0,
    "tier_price": 1e-5,
    "dense": DensePlan(),
}


@pytest.fixture(scope="module")
def planner(ready: Preparation) -> Planner:
    return ready.shared.planner


def plan(planner: Planner, **changed: Any) -> Budgeted:
    return planner.plan({**USUAL, **changed})


def bits_of(planner: Planner, found: Budgeted, table: str) -> set[int]:
    """The bits of a table's rows, as it would be stored."""
    return set(resolve(found.plan, planner.profiles)[table].bits)


def tiers(planner: Planner, found: Budgeted) -> int:
    return sum(len(part.stored.tiers) for part in resolve(found.plan, planner.profiles).values())


@pytest.mark.parametrize(("budget", "price"), [(0.0031, 1e-5), (0.01, 1e-2), (0.1, 1e-5), (0.3, 1e-5), (0.6, 1e-2)])
def test_plan_takes_no_more_bytes_than_its_share(planner: Planner, budget: float, price: float) -> None:
    found = plan(planner, budget=budget, tier_price=price)
    assert found.bytes == table_bytes(resolve(found.plan, planner.profiles)) <= int(budget * planner.fp32_bytes)
    assert found.plan.checkpoint == planner.checkpoint
    assert CompressionPlan.model_validate(found.plan.model_dump(mode="json")) == found.plan


def test_more_bytes_are_predicted_to_lose_less(planner: Planner) -> None:
    losses = [plan(planner, budget=b).loss for b in (0.005, 0.02, 0.1)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 2 * losses[-1] > 0


@pytest.mark.parametrize("bits", [(2, 4, 8, 16), (4, 8), (8, 16), (2,), (8,)])
def test_rows_are_coded_at_the_bits_of_the_setting_only(planner: Planner, bits: tuple[int, ...]) -> None:
    found = plan(planner, budget=0.1, bits=bits)
    for table in planner.profiles:
        packs = set(planner.predicted[table].bits) & set(bits)
        more = [b for b in planner.predicted[table].bits if b > min(bits)]
        # the reserved rows, where nothing else is kept, are always of eight bits
        kept = resolve(found.plan, planner.profiles)[table].layout.kept
        assert bits_of(planner, found, table) <= (packs or {more[0]}) or kept == 2


def test_restricted_takes_the_next_bits_up_where_a_dim_packs_at_none(planner: Planner) -> None:
    loss = np.arange(12.0).reshape(3, 4)
    own = Predicted((4, 8, 16, 32), {"search": loss, "minmax": loss + 1}, {4: loss[:, 0], 256: loss[:, 1]}, *loss[:2])
    two = restricted(own, (2,), 16)
    assert two.bits == (4,)
    assert two.coded["minmax"].tolist() == (loss[:, :1] + 1).tolist()
    assert list(two.nearest) == [4]
    assert restricted(own, (8, 16), 256).bits == (8, 16)
    assert restricted(own, (16, 2), 256).coded["search"].tolist() == loss[:, 2:3].tolist()
    assert list(restricted(own, (8,), 1).nearest) == []
    only = restricted(replace(own, bits=(32,), coded={"search": loss[:, 3:]}), (2, 4, 8, 16), 1)
    assert only.bits == (32,)
    assert restricted(own, (2, 4, 8, 16), 256).bits == (4, 8, 16)


def test_scaled_scales_all_losses(planner: Planner) -> None:
    own = planner.predicted["user_id"]
    found = scaled(own, 3.0)
    np.testing.assert_allclose(found.loss, 3 * own.loss)
    np.testing.assert_allclose(found.cut, 3 * own.cut)
    np.testing.assert_allclose(found.shared, 3 * own.shared)
    assert all(np.allclose(found.nearest[c], 3 * own.nearest[c]) for c in own.nearest)


@pytest.mark.parametrize("most", [256, 16, 1])
def test_tails_read_no_more_centroids_than_allowed(planner: Planner, most: int) -> None:
    counts = [t.centroids for b in (0.02, 0.05) for t in plan(planner, budget=b, centroids=most).plan.tables.values()]
    assert max(counts) <= most
    assert (max(counts) > 1) == (most > 1)


def test_trust_of_nothing_is_the_closed_form_and_of_all_the_corrected(planner: Planner) -> None:
    wary = replace(planner, corrections={**planner.corrections, "user_id": 16.0, "item_id": 0.25})
    assert plan(wary, trust=0.0).plan == plan(planner, trust=0.0).plan == plan(planner, trust=1.0).plan
    by_hand = {n: scaled(p, wary.corrections[n]) for n, p in planner.predicted.items()}
    expected = plan_for_budget(
        planner.profiles,
        {n: restricted(p, USUAL["bits"], 256) for n, p in by_hand.items()},
        int(USUAL["budget"] * planner.fp32_bytes),
        checkpoint=planner.checkpoint,
        latency=replace(planner.latency, nats_per_ms=1e-5 * planner.latency.nats_per_ms),
    )
    trusting = plan(wary, trust=1.0)
    assert trusting.plan == expected.plan
    assert trusting.plan != plan(wary, trust=0.0).plan
    half = replace(wary, corrections={**wary.corrections, "user_id": 4.0, "item_id": 0.5})
    assert plan(wary, trust=0.5).plan == plan(half, trust=1.0).plan


def test_dearer_tiers_are_fewer(planner: Planner) -> None:
    """At the dearest no table has a second one; between, never more."""
    dear = replace(planner, latency=replace(planner.latency, nats_per_ms=1e4))
    counts = [tiers(planner, plan(each, budget=0.1)) for each in (planner, dear)]
    assert counts[1] < counts[0]
    assert counts[1] <= 2 * len(planner.profiles)
    prices = [tiers(planner, plan(planner, budget=0.1, tier_price=p)) for p in (0.0, 1e-3, 1e2)]
    assert prices == sorted(prices, reverse=True)


def test_dense_part_of_a_setting_is_in_the_plan(planner: Planner) -> None:
    assert plan(planner, dense=INT8).plan.dense == INT8
    assert plan(planner, dense=INT8).plan.tables == plan(planner).plan.tables


def test_budget_below_the_floor_is_refused_with_it(planner: Planner) -> None:
    with pytest.raises(PlanError, match=r"^budget 13 bytes: the floor is [0-9,]+.*give more bytes"):
        plan(planner, budget=1e-5)


def test_planner_of_every_budget_finds_a_plan(planner: Planner) -> None:
    """No budget above the floor is too tight for the alignment: the estimate may be off, the fit mends it."""
    for budget in np.geomspace(0.05, 0.9, 7):
        assert plan(planner, budget=float(budget)).bytes <= budget * planner.fp32_bytes
