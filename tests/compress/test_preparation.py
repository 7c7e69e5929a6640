"""compress/search/preparation.py: samples that do not meet, heads as they would be written, budgets within reach."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compress_builders import quiet
from tune_builders import BF16, INT8, SEARCH, SPACE

from compress.compressor import resolve
from compress.config import Choice, Range, Space
from compress.dense import make_runtime, sides_of
from compress.errors import PlanError
from compress.layers import Bf16Linear, Int8Linear
from compress.methods.dense import DensePlan
from compress.search.budget import floor_bytes_of
from compress.search.decide import split_rows
from compress.search.latency import HeadTimes
from compress.search.planner import LEAST, MOST, correction
from compress.search.preparation import (
    ABOVE_FLOOR,
    Preparation,
    check_time,
    convert_heads,
    inputs_of,
    measured_corrections,
    measured_loss,
    own_head,
    within_reach,
)
from compress.search.space import label, setting, start_points
from compress.search.trials import Variant
from compress.search.working_set import score
from trainer.data.reader import spread_rows
from trainer.metrics import row_losses


def test_samples_are_disjoint_rows_of_the_split(ready: Preparation) -> None:
    """Found again by the split's own seed: the labels and the fp32 scores of each part, in order."""
    asked = (SEARCH.sample_rows, SEARCH.selection_rows, SEARCH.gate_rows)
    parts = split_rows(spread_rows(ready.dataset, "val", sum(asked)), asked, SEARCH.seed)
    assert [len(p) for p in parts] == list(asked)
    assert np.array_equal(np.concatenate([r.labels for r in ready.shared.rungs]), parts[0].labels)
    assert np.array_equal(ready.selection.labels, parts[1].labels)
    assert np.array_equal(ready.gate_rows.labels, parts[2].labels)
    for sample, rows in ((ready.selection, parts[1]), (ready.sample(ready.gate_rows), parts[2])):
        assert np.array_equal(sample.reference, score(sample.working, None))
        assert sample.reference.shape == (len(rows), 1)


def test_rungs_together_are_the_sample(ready: Preparation) -> None:
    assert ready.rungs == [120, 360, 1200]
    for rung in ready.shared.rungs:
        np.testing.assert_array_equal(score(rung.working, None), rung.reference)


def test_profiles_of_trials_are_slim_and_plan_alike(ready: Preparation) -> None:
    planner = ready.shared.planner
    assert all(len(p.order) == 0 for p in planner.profiles.values())
    params = start_points(ready.shared.space, 2)[1]
    plan = planner.plan(setting(ready.shared.space, params)).plan
    whole, slim = resolve(plan, ready.profiles), resolve(plan, planner.profiles)
    assert {n: p.stored for n, p in whole.items()} == {n: p.stored for n, p in slim.items()}


# -- heads -------------------------------------------------------------------------------------------------------------


def test_heads_are_converted_once_with_the_bytes_of_their_files(ready: Preparation, tmp_path: Path) -> None:
    variants = ready.shared.variants
    assert list(variants) == ["fp32", label(INT8), label(BF16)]
    assert variants["fp32"].head is None
    kinds = {label(INT8): Int8Linear, label(BF16): Bf16Linear}
    for name, plan in ((label(INT8), INT8), (label(BF16), BF16)):
        head = variants[name].head
        assert head is not None
        assert any(isinstance(m, kinds[name]) for m in head.modules())
        make_runtime(head, sides_of(ready.dataset.transform), plan).save(tmp_path / plan.dtype)
        assert variants[name].bytes == sum(p.stat().st_size for p in (tmp_path / plan.dtype).iterdir())
    assert all(v.ms > 0 for v in variants.values())


def test_own_head_on_its_inputs_is_the_fp32_model(ready: Preparation) -> None:
    working = ready.selection.working
    with torch.inference_mode():
        logits = torch.cat([own_head(working)(*batch) for batch in inputs_of(working)]).numpy()
    np.testing.assert_allclose(logits, ready.selection.reference, rtol=0, atol=1e-5)


def test_lessons_gate_what_they_convert(ready: Preparation) -> None:
    """A plan whose gate lets nothing pass leaves the head as it was."""
    strict = DensePlan(dtype="int8", max_loss=0.0, backend="torch")
    head = ready.lessons.convert(own_head(ready.lessons.train), strict)
    free = ready.shared.variants[label(INT8)].head
    assert free is not None
    count = [sum(isinstance(m, Int8Linear) for m in h.modules()) for h in (head, free)]
    assert count[0] < count[1]


def test_heads_of_a_space_without_fp32_are_those_asked_for(ready: Preparation) -> None:
    space = SPACE.model_copy(update={"dense": Choice(choice=(BF16,))})
    times = HeadTimes(sides_of(ready.dataset.transform), ready.shared.planner.latency.request)
    assert list(convert_heads(ready.lessons, space, times, quiet)) == [label(BF16)]


# -- budgets within reach ----------------------------------------------------------------------------------------------


def floor_share(ready: Preparation) -> float:
    planner = ready.shared.planner
    return ABOVE_FLOOR * floor_bytes_of(planner.profiles, planner.predicted) / planner.fp32_bytes


def test_budgets_below_the_floor_are_lifted_to_it_and_can_be_planned(ready: Preparation) -> None:
    planner, floor = ready.shared.planner, floor_share(ready)
    found = within_reach(Space(budget=Range(low=1e-6, high=0.5, log=True)), planner, None).budget
    assert (found.low, found.high, found.log) == (pytest.approx(floor), 0.5, True)
    usual = start_points(ready.shared.space, 1)[0]
    for factor in (1.0, 1.01, 1.1, 1.5):
        chosen = {**setting(ready.shared.space, usual), "budget": factor * found.low}
        assert planner.plan(chosen).bytes <= factor * found.low * planner.fp32_bytes


def test_budgets_keep_within_what_is_allowed(ready: Preparation) -> None:
    planner = ready.shared.planner
    space = Space(budget=Range(low=0.01, high=0.5, log=True))
    assert within_reach(space, planner, "20%").budget.high == pytest.approx(0.2, rel=1e-4)
    assert within_reach(space, planner, "90%").budget == space.budget
    half = f"{planner.fp32_bytes // 20}B"
    assert within_reach(space, planner, half).budget.high == pytest.approx(0.05, rel=1e-4)


def test_budgets_of_a_choice_lose_those_out_of_reach(ready: Preparation) -> None:
    space = Space(budget=Choice[float](choice=(1e-5, 0.02, 0.1, 0.4)))
    assert within_reach(space, ready.shared.planner, "20%").budget == Choice[float](choice=(0.02, 0.1))


def test_a_range_that_shrinks_to_a_point_is_that_point(ready: Preparation) -> None:
    floor = floor_share(ready)
    found = within_reach(Space(budget=Range(low=floor / 2, high=floor)), ready.shared.planner, None).budget
    assert found == Choice[float](choice=(floor,))
    params = start_points(Space(budget=found), 3)
    assert [setting(Space(budget=found), p)["budget"] for p in params] == [floor]


@pytest.mark.parametrize(
    ("budget", "allowed"),
    [
        (Range(low=1e-6, high=1e-5), None),
        (Choice[float](choice=(1e-6,)), None),
        (Range(low=0.3, high=0.5), "20%"),
        (Choice[float](choice=(0.3, 1e-6)), "20%"),
        (Range(low=0.001, high=0.5), "0.01%"),
        (Range(low=1e-6, high=0.5, log=True), "0.01%"),  # below the floor
    ],
)
def test_budgets_all_out_of_reach_are_refused(ready: Preparation, budget: object, allowed: str | None) -> None:
    with pytest.raises(PlanError, match=r"^tune.space.budget .*of fp32 at the least.*give budgets between$"):
        within_reach(Space(budget=budget), ready.shared.planner, allowed)


# -- what each table was measured to cost -----------------------------------------------------------------------------


def test_measured_loss_is_that_of_the_table_alone(ready: Preparation) -> None:
    sample, planner = ready.selection, ready.shared.planner
    chosen = {**setting(ready.shared.space, start_points(ready.shared.space, 1)[0]), "budget": 0.01}
    resolved = resolve(planner.plan(chosen).plan, planner.profiles)
    loss, error = measured_loss((sample, resolved), "user_id")
    logits = score(sample.working, {"user_id": resolved["user_id"]})
    change = row_losses(sample.labels[:, 0], logits[:, 0]) - row_losses(sample.labels[:, 0], sample.reference[:, 0])
    assert loss == pytest.approx(change.mean())
    assert error == pytest.approx(change.std() / len(change) ** 0.5)
    assert abs(loss) > 1e-6


def test_measured_loss_sums_tasks(two_tasks_ready: Preparation) -> None:
    sample, planner = two_tasks_ready.selection, two_tasks_ready.shared.planner
    plan = planner.plan(setting(two_tasks_ready.shared.space, start_points(two_tasks_ready.shared.space, 2)[1])).plan
    resolved = resolve(plan, planner.profiles)
    logits = score(sample.working, {"user_id": resolved["user_id"]})
    change = sum(
        row_losses(sample.labels[:, t], logits[:, t]) - row_losses(sample.labels[:, t], sample.reference[:, t])
        for t in range(2)
    )
    loss, error = measured_loss((sample, resolved), "user_id")
    assert (loss, error) == (pytest.approx(change.mean()), pytest.approx(change.std() / len(change) ** 0.5))


def test_corrections_are_measured_over_predicted(ready: Preparation) -> None:
    """With predictions so small that every table's measured loss is more, at the most that a correction may be."""
    planner = ready.shared.planner
    asked: list[str] = []

    def noted(work: object, shared: object, items: list[str]) -> list[tuple[float, float]]:
        asked.extend(items)
        return [(1.0, 0.1), (1e-12, 0.0), *[(0.0, 1.0)] * (len(items) - 2)]

    found = measured_corrections(planner, ready.shared.space, ready.selection, noted, quiet)
    assert sorted(asked) == sorted(planner.profiles)
    assert found[asked[0]] == MOST
    assert found[asked[1]] in (LEAST, 1.0)
    assert all(found[name] == 1.0 for name in asked[2:])


def test_corrections_are_not_measured_where_no_plan_trusts_them(ready: Preparation) -> None:
    space = SPACE.model_copy(update={"trust": Choice[float](choice=(0.0,))})
    found = measured_corrections(ready.shared.planner, space, ready.selection, lambda *_: pytest.fail("asked"), quiet)
    assert found == dict.fromkeys(ready.profiles, 1.0)


@pytest.mark.parametrize(
    ("predicted", "measured", "error", "expected"),
    [
        (1.0, 3.0, 0.5, 3.0),
        (1.0, 0.5, 0.1, 0.5),
        (1.0, 1.0, 0.6, 1.0),  # below two standard errors
        (1.0, -2.0, 0.1, 1.0),
        (1.0, 100.0, 1.0, MOST),
        (1.0, 0.01, 0.001, LEAST),
        (0.0, 5.0, 0.1, 1.0),
    ],
)
def test_correction_is_sure_and_bounded(predicted: float, measured: float, error: float, expected: float) -> None:
    assert correction(predicted, measured, error) == pytest.approx(expected)


def test_samples_are_scored_alike_each_time_and_in_part(ready: Preparation) -> None:
    again = ready.sample(ready.gate_rows)
    assert np.array_equal(again.reference, ready.sample(ready.gate_rows).reference)
    some = ready.selection.take(np.arange(50))
    assert np.array_equal(some.reference, ready.selection.reference[:50])
    np.testing.assert_allclose(score(some.working, None), some.reference, rtol=0, atol=1e-6)


def test_limit_below_the_dense_parts_own_time_is_refused_before_the_trials() -> None:
    variants = {"fp32": Variant(None, 100, 4.0), "int8": Variant(None, 100, 2.0)}
    check_time(variants, None)
    check_time(variants, 2.0)
    with pytest.raises(PlanError, match=r"max-ms 1\.5: the dense part alone takes 2 ms at the least \(int8\)"):
        check_time(variants, 1.5)
