"""compress/search/budget.py: plans for a byte budget, against the bytes of the artifacts that they make.

Legend: E bucket edges, B options.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import yaml
from compress_builders import World, quiet, stored
from safetensors.torch import load_file

from compress.artifact import load_artifact
from compress.compressor import compress, resolve, table_bytes
from compress.config import CompressionPlan, TablePlan, load_plan
from compress.errors import PlanError
from compress.ids import id_map_bytes
from compress.search.budget import (
    CODEBOOKS,
    Budgeted,
    Way,
    bucket_options,
    parse_budget,
    plan_for_budget,
    tiers_of,
    ways_of,
)
from compress.search.profile import TableProfile, profile_tables
from compress.search.sensitivity import Predicted, predict, sensitivities
from trainer.data.transform import RESERVED_ROWS, read_arrow

BUDGETS = [1_700, 2_000, 2_500, 3_500, 5_000, 7_000, 9_000, 12_000, 20_000, 28_000, 40_000]


@functools.cache
def known(world: World) -> tuple[dict[str, TableProfile], dict[str, Predicted]]:
    """Profiles ranked by what the loss would lose, with codebooks, and predicted losses."""
    fisher = sensitivities(world.checkpoint, world.dataset, quiet)
    profiles = profile_tables(world.checkpoint, world.dataset, quiet, "fisher", fisher, CODEBOOKS)
    return profiles, predict(world.checkpoint, profiles, fisher, world.dataset.rows("train"), quiet)


@functools.cache
def planned(world: World, budget: int, per_table: bool = False) -> Budgeted:
    return plan_for_budget(*known(world), budget, per_table=per_table)


def floor_of(world: World) -> int:
    """The least budget that a plan is made for, by bisection."""
    low, high = 1, 5_000
    while high - low > 1:
        middle = (low + high) // 2
        try:
            planned(world, middle)
            high = middle
        except PlanError:
            low = middle
    return high


def bytes_written(folder: Path) -> int:
    """All that an artifact holds of tables: rows, decoders, packed ids."""
    decoders = folder / "decoders.safetensors"
    widen = sum(4 * d.numel() for d in load_file(decoders).values()) if decoders.exists() else 0
    ids = sum(len(packed.as_py()) for packed in read_arrow(folder / "ids.arrow")["packed"])
    return (folder / "tables.bin").stat().st_size + widen + ids


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2%", 2_000),
        ("0.5 %", 500),
        (" 100% ", 100_000),
        ("12000000", 12_000_000),
        ("12B", 12),
        ("3kB", 3_000),
        ("3KB", 3_000),
        ("1.5MB", 1_500_000),
        ("300 MB", 300_000_000),
        ("2GB", 2_000_000_000),
        ("1TB", 1_000_000_000_000),
    ],
)
def test_budget_is_a_share_or_bytes(text: str, expected: int) -> None:
    assert parse_budget(text, 100_000) == expected


@pytest.mark.parametrize("text", ["", "%", "0%", "0", "-5%", "two", "2%%", "1e6", "5 MiB", "1,000", "nan", "2% of it"])
def test_budget_that_is_neither_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="budget .*share of the fp32 tables"):
        parse_budget(text, 100_000)


@pytest.mark.parametrize("budget", BUDGETS)
def test_budget_holds_all_bytes_of_the_artifact(world: World, budget: int, tmp_path: Path) -> None:
    profiles, _ = known(world)
    found = planned(world, budget)
    manifest = compress(world.checkpoint, world.dataset, found.plan, tmp_path / "a", profiles, quiet)
    assert bytes_written(tmp_path / "a") == manifest["sizes"]["table_bytes"] == found.bytes <= budget
    assert load_artifact(tmp_path / "a").sizes["table_bytes"] == found.bytes


@pytest.mark.parametrize("per_table", [False, True])
def test_budget_that_holds_everything_keeps_everything(world: World, per_table: bool) -> None:
    """By rank, rows that training never looked up may be cut: they cost nothing."""
    found = planned(world, 40_000, per_table)
    assert {tier.bits for t in found.plan.tables.values() for tier in t.all_tiers} == {32}
    assert all(t.whole and not t.tiers for t in found.plan.tables.values()) or not per_table
    assert sum(found.predicted.values()) == pytest.approx(0, abs=1e-9)


def test_more_bytes_are_never_predicted_worse(world: World) -> None:
    losses = [sum(planned(world, budget).predicted.values()) for budget in BUDGETS]
    assert all(later <= first + 1e-12 for first, later in itertools.pairwise(losses))
    assert losses[0] > 100 * losses[-3] > 0


def test_budget_is_spent(world: World) -> None:
    """Padding to FBGEMM's lines and whole buckets leave little."""
    for budget in BUDGETS[2:-2]:
        assert planned(world, budget).bytes > 0.8 * budget


def test_budget_by_rank_is_better_than_by_table(world: World) -> None:
    """Everything that a knapsack may choose is a plan of tiers too."""
    for budget in (8_000, 12_000, 20_000):
        tiers, tables = (sum(planned(world, budget, each).predicted.values()) for each in (False, True))
        assert tiers < tables


def test_budget_below_the_floor_is_refused_with_the_floor(world: World) -> None:
    floor = floor_of(world)
    with pytest.raises(
        PlanError, match=r"budget 400 bytes: the floor is [0-9,]+: [0-9,]+ of reserved.*give more bytes"
    ):
        planned(world, 400)
    with pytest.raises(PlanError, match="give more bytes|give [0-9,]+ bytes"):
        planned(world, floor - 1)
    assert planned(world, floor).bytes <= floor < 1_700


def test_budget_by_table_below_the_floor_is_refused(world: World) -> None:
    with pytest.raises(PlanError, match="budget 900 bytes: the floor is"):
        planned(world, 900, True)


# -- by table --------------------------------------------------------------------------------------------------------


def naive_knapsack(world: World, budget: int) -> float:
    """The least predicted loss of one number of bits a table within a budget, by trying all."""
    profiles, predicted = known(world)
    choices = []
    for name, profile in profiles.items():
        rows, dim = profile.info.num_embeddings, profile.info.embedding_dim
        ids = id_map_bytes(rows, [rows - RESERVED_ROWS], [], profile.key_bits)
        sizes = [-(-stored("t", rows, dim, b, ("t",)).bytes // 128) * 128 + ids for b in predicted[name].bits]
        choices.append(list(zip(sizes, predicted[name].loss.sum(0), strict=True)))
    fitting = (
        sum(loss for _, loss in each) for each in itertools.product(*choices) if sum(s for s, _ in each) <= budget
    )
    return min(fitting)


@pytest.mark.parametrize("budget", [6_000, 8_000, 11_000, 17_000, 25_000])
def test_budget_by_table_is_the_best_of_all(world: World, budget: int, tmp_path: Path) -> None:
    found = planned(world, budget, True)
    assert sum(found.predicted.values()) == pytest.approx(naive_knapsack(world, budget), rel=1e-9)
    assert not any(t.tiers or not t.whole for t in found.plan.tables.values())
    compress(world.checkpoint, world.dataset, found.plan, tmp_path / "a", known(world)[0], quiet)
    assert bytes_written(tmp_path / "a") == found.bytes <= budget


# -- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("per_table", [False, True])
def test_plan_of_a_budget_is_a_plan_that_can_be_read_again(
    world: World, budget: int, per_table: bool, tmp_path: Path
) -> None:
    if per_table and budget < 6_000:
        with pytest.raises(PlanError, match="the floor is"):
            planned(world, budget, per_table)
        return
    found = planned(world, budget, per_table)
    assert set(found.plan.tables) == set(found.predicted) == set(world.dataset.transform.tables)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(found.plan.model_dump(mode="json")), encoding="utf-8")
    again = load_plan(tmp_path / "plan.yaml")
    assert again == found.plan
    assert table_bytes(resolve(again, known(world)[0])) == found.bytes


def test_plan_of_a_budget_names_its_checkpoint_and_the_clip_that_costs_less(world: World) -> None:
    profiles, predicted = known(world)
    found = plan_for_budget(profiles, predicted, 9_000, checkpoint="abc").plan
    assert (found.order, found.checkpoint) == ("fisher", "abc")
    checked = 0
    for name, table in found.tables.items():
        first = 0
        for tier in table.tiers:
            last = int(np.searchsorted(profiles[name].edges, tier.rows or profiles[name].edges[-1]))
            if tier.bits and last > first and tier.clip is not None:
                option = predicted[name].bits.index(tier.bits)
                costs = {clip: loss[first:last, option].sum() for clip, loss in predicted[name].coded.items()}
                assert costs[tier.clip] == min(costs.values())
                checked += 1
            first = last
    assert checked > 2


def test_plans_of_budgets_use_all_that_there_is(world: World) -> None:
    """What makes the tests above worth something: tiers, centroids, forgotten ids, whole tables."""
    plans = [table for budget in BUDGETS for table in planned(world, budget).plan.tables.values()]
    assert any(len(t.tiers) > 2 for t in plans)
    assert any(t.centroids > 1 for t in plans)
    assert {t.unknown for t in plans} == {"own", "shared"}
    assert any(not t.tiers for t in plans)


@pytest.mark.parametrize("table", ["user_id", "item_id", "city"])
def test_predicted_of_a_plan_is_the_sum_of_its_buckets(world: World, table: str) -> None:
    """Read off the plan's own tiers, one bucket at a time."""
    profiles, predicted = known(world)
    for budget in BUDGETS:
        found = planned(world, budget)
        plan, profile, losses = found.plan.tables[table], profiles[table], predicted[table]
        part, total, at = resolve(found.plan, profiles)[table], 0.0, 0
        for bits, end in zip(part.bits, part.layout.cuts, strict=True):
            last = int(np.searchsorted(profile.edges, end))
            total += losses.loss[at:last, losses.bits.index(bits)].sum() if last > at else 0.0
            at = last
        zone = int(np.searchsorted(profile.edges, part.layout.zone))
        if plan.centroids > 1:
            total += losses.nearest[plan.centroids][at:zone].sum()
        elif zone > at:
            total += losses.cut[at] - losses.cut[zone]
        total += losses.shared[zone]
        assert found.predicted[table] == pytest.approx(total, rel=1e-6, abs=1e-12)


# -- options ---------------------------------------------------------------------------------------------------------


def test_ways_start_with_the_smallest_and_name_each_codebook(world: World) -> None:
    users, incomes = known(world)[1]["user_id"], known(world)[1]["income"]
    assert ways_of(users) == [Way(f, c) for f in (True, False) for c in (1, 4, 16)]
    assert ways_of(incomes) == [Way(True, 1), Way(False, 1)]


@pytest.mark.parametrize("table", ["user_id", "city"])
@pytest.mark.parametrize("forget", [True, False])
@pytest.mark.parametrize("count", [1, 4, 16])
def test_options_count_the_bytes_that_a_table_is_stored_with(
    world: World, table: str, forget: bool, count: int
) -> None:
    """Near enough to spend the budget: within one line of padding a tier, and a byte or so a bucket."""
    profiles, predicted = known(world)
    profile, way = profiles[table], Way(forget, count)
    options = bucket_options(profile, predicted[table], way)
    buckets = len(profile.edges) - 1
    for ends in ((10, 20), (0, 30), (20, 20), (15, buckets)):
        choice = np.zeros(buckets, dtype=np.int64)
        choice[: ends[1]] = 1
        choice[: ends[0]] = 2
        if not np.isfinite(options.loss_EB[np.arange(buckets), choice]).all():
            assert count == 1 or not forget  # no centroids to read, or all others read one
            continue
        plan = CompressionPlan(order="fisher", tables={table: tiers_of(profile, predicted[table], choice, way)})
        actual = table_bytes({table: resolve(plan, profiles)[table]})
        taken = np.unique(choice)
        told = options.bytes_EB[np.arange(buckets), choice].sum()
        assert options.fixed_B is not None
        told += options.fixed_B[taken].sum()
        assert actual - 128 - buckets <= int(told) <= actual + 128 * 4 + buckets, (ends, told, actual)


def test_tiers_of_options_are_runs_of_like_ones(world: World) -> None:
    profile, predicted = known(world)[0]["user_id"], known(world)[1]["user_id"]
    edges, buckets = profile.edges, len(profile.edges) - 1
    choice = np.zeros(buckets, dtype=np.int64)
    choice[:30], choice[:12], choice[:5] = 1, 2, 4
    plan = tiers_of(profile, predicted, choice, Way(True, 16))
    assert [(t.bits, t.rows) for t in plan.tiers] == [(8, edges[5]), (2, edges[12]), (0, edges[30])]
    assert (plan.unknown, plan.centroids) == ("shared", 16)
    plan = tiers_of(profile, predicted, np.where(choice == 1, 0, choice), Way(False, 16))
    assert [(t.bits, t.rows) for t in plan.tiers] == [(8, edges[5]), (2, edges[12])]
    assert (plan.unknown, plan.centroids) == ("own", 1)
    assert tiers_of(profile, predicted, np.full(buckets, 3), Way(True, 1)) == TablePlan(bits=4)
    assert tiers_of(profile, predicted, np.zeros(buckets), Way(True, 1)).all_tiers[0].rows == RESERVED_ROWS
