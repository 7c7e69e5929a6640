"""compress/search/latency.py: what work a lookup is, what it costs, and what time does to a budget's plan."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compress_builders import World, quiet
from pydantic import ValidationError

from compress import pipeline
from compress.artifact import load_artifact
from compress.compressor import resolve, table_bytes
from compress.dense import sides_of
from compress.errors import PlanError
from compress.lookup import StoredTable, Tier
from compress.methods.dense import DensePlan, simplify
from compress.onnx_head import head_of
from compress.pipeline import compress_checkpoint
from compress.search import budget
from compress.search.allocate import Options, allocate
from compress.search.budget import CODEBOOKS, Budgeted, plan_for_budget
from compress.search.latency import (
    CACHE_BYTES,
    TERMS,
    HeadTimes,
    Latency,
    MachineCosts,
    Request,
    Workload,
    calibrate_machine,
    drawn_shapes,
    fit_costs,
    lookup_ms,
    measure_shapes,
    request_of,
    work_of,
)
from compress.search.profile import TableProfile, profile_tables
from compress.search.sensitivity import Predicted, predict, sensitivities
from trainer.data.reader import spread_rows

COSTS = MachineCosts(
    machine="made up", ns={t: float(1 + i) for i, t in enumerate(TERMS)}, relative_error=0.0, lookups=1
)
BUDGET = 5_000


def table(name: str, bits: tuple[int, ...] = (8,), *, dim: int = 16, width: int = 16, rows: int = 100) -> StoredTable:
    return StoredTable(name, dim, width, tuple(Tier(rows, b) for b in bits), (name,))


# -- work --------------------------------------------------------------------------------------------------------------


def test_work_of_plain_tables_is_counted() -> None:
    work = work_of([table("a"), table("b", (4,), dim=8, width=8)], Workload({"a": 1.0, "b": 3.0}), 10)
    expected = {"call": 1, "piece": 2, "bag": 20, "id": 40, "value_8": 160, "value_4": 240, "pooled": 240}
    assert {term: amount for term, amount in work.items() if amount} == expected


def test_work_of_tiers_is_every_id_for_each_of_them() -> None:
    work = work_of([table("a", (8, 4, 2)), table("b")], Workload({"a": 1.0, "b": 1.0}), 10)
    assert (work["split"], work["piece"], work["id"], work["flat_id"], work["ragged_id"]) == (1, 4, 40, 40, 0)
    assert work["added"] == 10 * 2 * 16
    bags = work_of([table("a", (8, 4, 2))], Workload({"a": 2.0}, weighted=True), 10)
    assert (bags["flat_id"], bags["ragged_id"], bags["weighted_id"], bags["weighted_bag"]) == (0, 60, 60, 10)


def test_work_of_rows_goes_to_the_tiers_that_answer() -> None:
    shares = {"a": (0.75, 0.25)}
    work = work_of([table("a", (8, 2))], Workload({"a": 1.0}), 100, shares)
    assert (work["value_8"], work["value_2"]) == (75 * 16, 25 * 16)


def test_work_of_narrow_tables_is_a_product() -> None:
    work = work_of([table("a", width=8), table("b")], Workload({"a": 1.0, "b": 1.0}), 10)
    assert (work["decoder"], work["decoder_flop"], work["widened"]) == (1, 2 * 10 * 8 * 16, 320)


def test_work_beyond_the_cache_grows_with_the_tables() -> None:
    amounts = [
        work_of([table("a", rows=rows)], Workload({"a": 1.0}), 10)["line_beyond"]
        for rows in (100, CACHE_BYTES // 20, CACHE_BYTES // 10, CACHE_BYTES)
    ]
    assert amounts[:2] == [0, 0]
    assert 0 < amounts[2] < amounts[3] < 10 * 2


@pytest.mark.parametrize("more", ["candidates", "tiers", "bits", "ids"])
def test_lookup_costs_more_with_more_work(more: str) -> None:
    plain = lookup_ms([table("a")], Workload({"a": 1.0}), COSTS)
    tables, workload, candidates = [table("a")], Workload({"a": 1.0}), 500
    if more == "candidates":
        candidates = 501
    elif more == "ids":
        workload = Workload({"a": 1.01})
    else:
        tables = [table("a", (8, 4) if more == "tiers" else (16,))]
    assert lookup_ms(tables, workload, COSTS, candidates) > plain


def test_request_pays_its_own_side_once() -> None:
    tables = [table("user"), table("item")]
    request = Request(Workload({"user": 1.0}), Workload({"item": 1.0}), 100)
    once = lookup_ms(tables, Workload({"user": 1.0}), COSTS, 1)
    assert request.lookup_ms(tables, COSTS) == once + lookup_ms(tables, Workload({"item": 1.0}), COSTS, 100)
    latency = Latency(request, COSTS, 2.0, 0.0)
    assert latency.ms(tables) == 2.0 + request.lookup_ms(tables, COSTS)


def test_request_of_a_world_has_both_sides_and_mean_bag_lengths(world: World) -> None:
    transform = world.dataset.transform
    sample = spread_rows(world.dataset, "val", 200).encoded
    request = request_of(transform, sample, 50)
    items = {f.name for f in transform.schema.features if f.side == "item"}
    assert request.once is not None
    assert set(request.each.lengths) == items & set(transform.sparse)
    assert set(request.once.lengths) | set(request.each.lengths) == set(transform.sparse)
    assert request.each.lengths["item_id"] == 1
    genres = sample.sparse["genres"]
    assert request.each.lengths["genres"] == pytest.approx(len(genres.values) / len(genres))
    assert (request.once.weighted, request.each.weighted) == (False, True)
    whole = request_of(transform, sample, 50, shared=False)
    assert whole.once is None
    assert set(whole.each.lengths) == set(transform.sparse)


# -- calibration -------------------------------------------------------------------------------------------------------


def test_fit_finds_the_costs_that_made_the_times() -> None:
    work = [shape.work for shape in drawn_shapes(200, seed=3)]
    found = fit_costs(work, [COSTS.ms(each) for each in work])
    assert found.relative_error < 1e-3
    held = [shape.work for shape in drawn_shapes(20, seed=4)]
    assert [found.ms(each) for each in held] == pytest.approx([COSTS.ms(each) for each in held], rel=0.02)


def test_fit_gives_nothing_below_zero() -> None:
    work = [shape.work for shape in drawn_shapes(60, seed=3)]
    found = fit_costs(work, [1.0 / (1 + each["id"]) for each in work])  # more ids, less time: not of this world
    assert all(cost >= 0 for cost in found.ns.values())


def test_costs_survive_json_and_refuse_what_they_do_not_know() -> None:
    assert MachineCosts.model_validate_json(COSTS.model_dump_json()) == COSTS
    for change in ({"ns": COSTS.ns | {"warp": 1.0}}, {"ns": {"call": 1.0}}, {"ns": COSTS.ns | {"id": -1.0}}):
        with pytest.raises(ValidationError, match="ns"):
            MachineCosts.model_validate(COSTS.model_dump() | change)


def test_drawn_shapes_are_the_same_for_a_seed_and_differ_between_seeds() -> None:
    assert drawn_shapes(5, 1) == drawn_shapes(5, 1) != drawn_shapes(5, 2)


def test_measured_shapes_take_time() -> None:
    assert all(ms > 0 for ms in measure_shapes(drawn_shapes(3, 0, most_tables=2), 0.01))


@pytest.mark.integration
def test_calibration_knows_that_tiers_cost() -> None:
    """Real lookups of this machine: what is plain to see must come out, however busy it is."""
    costs = calibrate_machine(1.0)
    assert costs.lookups > 12
    assert all(costs.ns[term] > 0 for term in ("call", "split", "ragged_id"))
    plain, tiers = ([table(f"t{i}", bits) for i in range(20)] for bits in ((8,), (8, 4, 2)))
    workload = Workload({t.name: 1.0 for t in plain})
    assert lookup_ms(tiers, workload, costs) > 1.5 * lookup_ms(plain, workload, costs)


def test_head_is_measured_once_for_each_plan(world: World) -> None:
    transform = world.dataset.transform
    head = head_of(world.run, transform, world.checkpoint.dense_state())
    request = request_of(transform, spread_rows(world.dataset, "val", 50).encoded, 8)
    asked: list[DensePlan] = []

    def make(plan: DensePlan) -> torch.nn.Module:
        asked.append(plan)
        return simplify(head)

    times = HeadTimes(sides_of(transform), request)
    plans = [DensePlan(backend="torch"), DensePlan(backend="torch", max_loss=0.1)]
    first = [times.ms(plan, functools.partial(make, plan)) for plan in plans]
    assert [times.ms(plan, functools.partial(make, plan)) for plan in plans] == first
    assert asked == plans
    assert min(first) > 0
    whole = HeadTimes(sides_of(transform), replace(request, once=None))
    assert whole.ms(plans[0], functools.partial(make, plans[0])) > 0


# -- prices ------------------------------------------------------------------------------------------------------------


def priced(price: float, opening: float = 0.0) -> Options:
    """Two buckets: 8 bits and 4 suit them best by bytes; option 0 is a cut."""
    loss = np.array([[9.0, 1.0, 0.0], [3.0, 0.5, 0.0]])
    once = np.array([0.0, price, price])
    return Options("t", np.array([[0, 4, 8]] * 2), loss, None, once, np.array([opening, 0.0, 0.0]))


@pytest.mark.parametrize(("price", "expected"), [(0.0, [2, 1]), (0.2, [2, 1]), (0.6, [1, 1]), (4.0, [1, 1])])
def test_allocation_merges_tiers_that_do_not_pay(price: float, expected: list[int]) -> None:
    """Of 12 bytes: 8 and 4 bits lose .5, two tiers; 4 and 4 lose 1.5, one tier; 8 and a cut lose 3."""
    found = allocate([priced(price * 2.0)], 12)
    assert found.choices[0].tolist() == expected
    assert found.price[0] == pytest.approx(price * 2.0 * len(set(expected)))
    assert found.cost == found.loss[0] + found.price[0]


def test_allocation_takes_a_tier_it_can_afford_only_where_it_gains() -> None:
    assert allocate([priced(0.4)], 100).choices[0].tolist() == [2, 2]
    assert allocate([priced(20.0)], 100).choices[0].tolist() == [0, 0]
    assert allocate([priced(20.0, opening=20.0)], 100).choices[0].tolist() == [2, 2]


@pytest.mark.parametrize("prices", [[0.0, -1.0, 0.0], [0.0, math.nan, 0.0], [0.0]])
def test_allocation_refuses_prices_that_are_none(prices: list[float]) -> None:
    with pytest.raises(PlanError, match="table t: prices"):
        allocate([replace(priced(0.0), price_B=np.array(prices))], 100)


@functools.cache
def known(world: World) -> tuple[dict[str, TableProfile], dict[str, Predicted]]:
    fisher = sensitivities(world.checkpoint, world.dataset, quiet)
    profiles = profile_tables(world.checkpoint, world.dataset, quiet, "fisher", fisher, CODEBOOKS)
    return profiles, predict(world.checkpoint, profiles, fisher, world.dataset.rows("train"), quiet)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rounds of fitting: what is compared is the same, only further from the last byte."""
    for rounds, few in (("ROUNDS", 2), ("MS_ROUNDS", 3)):
        monkeypatch.setattr(budget, rounds, few)


def latency_of(world: World, nats_per_ms: float, max_ms: float | None = None) -> Latency:
    request = request_of(world.dataset.transform, spread_rows(world.dataset, "val", 100).encoded)
    return Latency(request, COSTS, 1.0, nats_per_ms, max_ms)


@functools.cache
def planned(world: World, nats_per_ms: float | None, max_ms: float | None = None) -> Budgeted:
    latency = None if nats_per_ms is None else latency_of(world, nats_per_ms, max_ms)
    return plan_for_budget(*known(world), BUDGET, latency=latency)


def tiers_of(world: World, found: Budgeted) -> Mapping[str, int]:
    return {n: len(r.stored.tiers) for n, r in resolve(found.plan, known(world)[0]).items()}


@pytest.mark.usefixtures("quick")
def test_time_that_costs_nothing_changes_no_plan(world: World) -> None:
    free, plain = planned(world, 0.0), planned(world, None)
    assert free.plan == plain.plan
    assert free.ms is not None
    assert plain.ms is None


@pytest.mark.usefixtures("quick")
def test_dearer_time_gives_fewer_tiers_and_less_time_at_more_loss(world: World) -> None:
    found = [planned(world, rate) for rate in (0.0, 0.003, 10.0)]
    counts = [sum(tiers_of(world, each).values()) for each in found]
    times = [each.ms for each in found if each.ms is not None]
    losses = [each.loss for each in found]
    assert counts[0] > counts[1] > counts[2]
    assert set(tiers_of(world, found[2]).values()) == {1}
    assert times == sorted(times, reverse=True)
    assert losses == sorted(losses)
    assert all(table_bytes(resolve(each.plan, known(world)[0])) == each.bytes <= BUDGET for each in found)


@pytest.mark.usefixtures("quick")
def test_limit_of_time_holds_and_costs_no_more_than_it_must(world: World) -> None:
    slow, fast = (planned(world, rate).ms for rate in (0.0, 10.0))
    assert slow is not None
    assert fast is not None
    limit = (slow + fast) / 2
    held = planned(world, 0.0, limit)
    assert held.ms is not None
    assert held.ms <= limit
    assert planned(world, 0.0).loss <= held.loss < planned(world, 10.0).loss


@pytest.mark.usefixtures("quick")
def test_limit_that_no_plan_keeps_is_refused_with_the_floor(world: World) -> None:
    fast = planned(world, 10.0).ms
    assert fast is not None
    with pytest.raises(PlanError, match=rf"max-ms 0.5: .*500 candidates .*{fast:.3g} ms, 1 of them in the dense part"):
        planned(world, 10.0, 0.5)
    assert planned(world, 10.0, fast).ms == fast


def test_limit_of_time_without_a_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"max-ms 3: .*--budget"):
        compress_checkpoint(tmp_path, tmp_path, None, tmp_path / "out", "test", quiet, None, 3.0)


@pytest.mark.usefixtures("quick")
def test_compress_says_what_time_was_predicted(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "calibrate_machine", lambda: COSTS)
    told = compress_checkpoint(
        world.checkpoint.folder, world.dataset.folder, None, tmp_path / "out", "test", quiet, str(BUDGET), 1000.0
    )
    latency = told["latency"]
    assert (latency["max_ms"], latency["candidates"]) == (1000.0, 500)
    assert latency["predicted_ms"] > latency["head_ms"] > 0
    assert load_artifact(tmp_path / "out").manifest["metrics"]["latency"] == latency


def test_one_more_tier_costs_a_users_table_less_than_an_items(world: World) -> None:
    costs = latency_of(world, 0.0).tier_ms([p.info for p in known(world)[0].values()])
    assert costs["user_id"] < costs["genres"]
    assert all(ms > 0 for ms in costs.values())
