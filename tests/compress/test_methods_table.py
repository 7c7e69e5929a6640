"""compress/search/methods_table.py and compress/peers.py: every row of the table says what its method really costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from compress_builders import World, quiet, random_rows

from cluster.tables import methods_lines, methods_markdown
from compress.compressor import resolve, table_bytes
from compress.config import CalibrationPlan, CompressionPlan
from compress.errors import PlanError
from compress.methods.codec import dequantize_rows, quantize_rows, row_bytes
from compress.peers import PEERS, Peer, greedy_rows, torchrec_ranker, whole_id_maps_bytes
from compress.search import methods_table as under_test
from compress.search.methods_table import Method, methods_table, most, slices_of, tail_count
from compress.search.working_set import WorkingSet, extract, score
from trainer.data.reader import read_split


@pytest.fixture(scope="module")
def working(world: World) -> WorkingSet:
    """The validation rows of the world."""
    rows = read_split(world.dataset, "val")
    return extract(world.checkpoint, world.dataset.transform, world.profiles, rows)


@pytest.fixture(scope="module")
def methods(world: World) -> dict[str, Method]:
    """The whole table, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(under_test, "BUDGETS", ("60%", "0.01%"))
        patch.setattr(under_test, "CalibrationPlan", lambda: CalibrationPlan(steps=10, batch_size=128))
        found = methods_table(world.checkpoint, world.dataset, quiet, "val")
    assert len({m.name for m in found}) == len(found)
    return {m.name: m for m in found}


def test_methods_table_has_every_method_that_can_be_had(methods: dict[str, Method]) -> None:
    assert {"fp32", "FP16", "INT8 minmax", "INT2 search", "half of the rank", "tiers by frequency"} <= set(methods)
    assert {f"5% of rows by {s}" for s in ("frequency", "norm", "frequency_norm", "fisher")} <= set(methods)
    assert {"tiers within 60%", "the same, calibrated (60%)", "control: fp32, calibrated"} <= set(methods)
    assert "tiers within 0.01%" not in methods  # below the floor
    assert {"torchrec INT8", "torchrec INT4", "torch greedy INT4"} <= set(methods)
    assert "torchrec INT2" not in methods  # a table of dim 12 has no INT2 rows


def test_fp32_loses_nothing_and_a_method_loses_what_it_loses(methods: dict[str, Method], world: World) -> None:
    fp32 = methods["fp32"]
    assert fp32.quality.delta_ne == fp32.quality.delta_auc == 0.0
    assert fp32.row_bytes == sum(t.fp32_bytes for t in world.dataset.transform.tables.values())
    assert methods["FP16"].row_bytes < 0.7 * fp32.row_bytes
    assert abs(methods["FP16"].quality.delta_ne) < 1e-4 < abs(methods["5% of rows by norm"].quality.delta_ne)


def test_bytes_are_those_of_the_resolved_plan(methods: dict[str, Method], world: World) -> None:
    found = methods["5% of rows by frequency"]
    plan = CompressionPlan.model_validate({"default": {"bits": 32, "keep": 0.05, "unknown": "shared"}})
    resolved = resolve(plan, world.profiles)
    assert found.table_bytes == table_bytes(resolved)
    assert found.id_map_bytes == sum(r.id_map_bytes for r in resolved.values()) > 0
    assert methods["tiers within 60%"].table_bytes <= 0.6 * methods["fp32"].row_bytes


def test_peers_need_the_id_map_of_whoever_cuts_nothing(methods: dict[str, Method], world: World) -> None:
    whole = whole_id_maps_bytes(world.profiles)
    assert whole == methods["torchrec INT8"].id_map_bytes == methods["INT8 search"].id_map_bytes


def test_tables_are_printed_for_people(methods: dict[str, Method], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    described = [m.describe() for m in methods.values()]
    result = {"methods": described, "table_bytes_fp32": methods["fp32"].row_bytes, "rows": 600, "split": "val"}
    lines = methods_lines(result)
    assert any("torchrec INT8" in line and "%" in line for line in lines)
    table = methods_markdown(result).splitlines()
    assert len(table) == 2 + len(methods)
    assert len({line.count("|") for line in table}) == 1


# -- peers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_torchrec_bytes_are_what_its_own_module_holds(working: WorkingSet, bits: int) -> None:
    tables = {
        name: replace(table, num_embeddings=len(working.weights[name]))
        for name, table in working.transform.tables.items()
    }
    packed = torchrec_ranker(working, bits).embeddings.embedding_bags  # type: ignore[union-attr, operator]
    for name, table in tables.items():
        weight = packed[f"t_{name}"].weight  # type: ignore[index]
        stored = getattr(weight, "elem", weight)
        assert stored.numel() == Peer("torchrec", bits).table_bytes({name: table})


def test_torchrec_scores_as_its_rows_would_by_ours(working: WorkingSet) -> None:
    """torchrec's INT8 differs from our min-max in how it rounds, not by more than a code step moves a score."""
    reference = score(working, None)
    theirs = Peer("torchrec", 8).logits(working)
    assert 0 < np.abs(theirs - reference).max() < 0.05
    assert np.abs(Peer("torchrec", 4).logits(working) - reference).mean() > 3 * np.abs(theirs - reference).mean()


@pytest.mark.parametrize("bits", [4, 2])
def test_greedy_rows_are_in_our_layout(bits: int) -> None:
    rows = random_rows(200, 16)
    coded = greedy_rows(rows, bits)
    assert coded.shape == (200, row_bytes(16, bits))
    error = (dequantize_rows(coded, 16, bits) - rows).norm()
    minmax = (dequantize_rows(quantize_rows(rows, bits), 16, bits) - rows).norm()
    search = (dequantize_rows(quantize_rows(rows, bits, "search"), 16, bits) - rows).norm()
    assert search <= error <= 1.05 * minmax


def test_greedy_refuses_other_bits() -> None:
    with pytest.raises(PlanError, match="has 4 and 2"):
        greedy_rows(torch.zeros((1, 16)), 8)


def test_a_peer_refuses_dims_it_cannot_pack(working: WorkingSet) -> None:
    for peer in (p for p in PEERS if p.bits == 2):
        with pytest.raises(PlanError, match="dim 12"):
            peer.logits(working)


# -- slices -----------------------------------------------------------------------------------------------------------


def test_tail_count_leaves_a_tenth_of_the_lookups() -> None:
    counts = np.array([50, 0, 30, 10, 5, 3, 1, 1])
    assert tail_count(counts) == 10  # 50 + 30 + 10 are nine tenths
    assert tail_count(np.array([100])) == 100


def test_most_takes_the_largest_and_none_of_nothing() -> None:
    assert most(np.array([0, 3, 0, 1, 9, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0])).tolist() == [1, 4]
    assert most(np.zeros(50)).tolist() == []


def test_slices_are_rows_with_rare_and_unknown_ids(
    working: WorkingSet, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "FEWEST", 1)
    found = slices_of(working, world.profiles)
    unknown = world.dataset.transform.tables["user_id"].features[0]
    users = working.sample.sparse[unknown].values
    assert np.array_equal(found["unknown users"], np.flatnonzero(working.ranks["user_id"][users] == 0))
    assert len(found["tail ids"]) == len(working.labels) // 10


def test_slices_with_few_rows_are_left_out(working: WorkingSet, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "FEWEST", 10_000)
    assert slices_of(working, world.profiles) == {}
