"""compress/search/finals.py: a few plans tuned, converted, judged on other rows and measured alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tune_builders import BF16, CALIBRATE, INT8, SPACE

from compress.catalogue import item_transform, request_transform
from compress.compressor import resolve
from compress.layers import Bf16Linear, Int8Linear
from compress.methods.calibrate import fine_tune, with_head
from compress.search.decide import OBJECTIVES
from compress.search.finals import (
    NEAR,
    Classroom,
    Finalist,
    calibrated,
    finalist_of,
    judged,
    measured_ms,
    side,
    tuned_control,
    worth_calibrating,
)
from compress.search.preparation import Preparation
from compress.search.space import label, start_points
from compress.search.trials import Running, quality
from compress.search.working_set import score
from trainer.data.reader import spread_rows

LABELS = {label(plan): plan for plan in SPACE.dense.choice}


@pytest.fixture(scope="module")
def room(ready: Preparation) -> Classroom:
    """Training rows, and held rows of the validation split."""
    train, held = (ready.sample(spread_rows(ready.dataset, s, n)) for s, n in (("train", 3000), ("val", 400)))
    return Classroom(ready.shared, train, held.working, ready.lessons, CALIBRATE, ready.dataset.negative_rate)


@pytest.fixture(scope="module")
def lines(ready: Preparation) -> dict[str, dict[str, Any]]:
    """A finished trial for each plan of the dense part, as the search's file has it."""
    found = {}
    for number, name in enumerate(LABELS):
        params = {**start_points(ready.shared.space, 1)[0], "budget": 0.02, "dense": name}
        running = Running(ready.shared, params)
        said = [running.step() for _ in ready.shared.rungs][-1]
        plan = running.plan.model_dump(mode="json", exclude_defaults=True)
        found[name] = {"number": number, "params": params, "origin": "start", "stopped": False, **said, "plan": plan}
    return found


@pytest.fixture(scope="module")
def tuned(room: Classroom, ready: Preparation, lines: dict[str, dict[str, Any]]) -> dict[str, Finalist]:
    return {name: calibrated(room, finalist_of(ready.shared, line)) for name, line in lines.items()}


def test_finalist_is_the_trial_again(ready: Preparation, lines: dict[str, dict[str, Any]]) -> None:
    for name, line in lines.items():
        found = finalist_of(ready.shared, line)
        assert found.plan == Running(ready.shared, line["params"]).plan
        assert found.head is ready.shared.variants[name].head
        assert found.tuned is None
        rung = ready.shared.rungs[-1]
        logits = score(rung.working, resolve(found.plan, ready.profiles), found.head)
        running = Running(ready.shared, line["params"])
        assert np.array_equal(logits, score(rung.working, running.resolved, running.head))


def test_worth_calibrating_are_the_smallest_within_reach() -> None:
    front = [
        {"delta_ne": d, "artifact_bytes": b}
        for d, b in ((0.0041, 1), (0.004, 5), (-0.1, 3), (0.001, 4), (0.002, 2), (9.0, 0))
    ]
    assert NEAR == 4.0
    assert [t["artifact_bytes"] for t in worth_calibrating(front, 0.001, 3)] == [2, 3, 4]
    assert [t["artifact_bytes"] for t in worth_calibrating(front, 0.001, 9)] == [2, 3, 4, 5]
    assert worth_calibrating(front[:1], 0.001, 9) == []


@pytest.mark.parametrize("name", LABELS)
def test_calibrated_head_is_tuned_through_its_tables_and_converted_as_its_plan_asks(
    room: Classroom, ready: Preparation, lines: dict[str, dict[str, Any]], tuned: dict[str, Finalist], name: str
) -> None:
    found, plan = tuned[name], LABELS[name]
    assert found.plan == finalist_of(ready.shared, lines[name]).plan.model_copy(update={"calibrate": CALIBRATE})
    resolved = resolve(found.plan, ready.shared.planner.profiles)
    expected = fine_tune(
        room.train.working, room.held, resolved, CALIBRATE, ready.dataset.negative_rate, room.train.reference
    )
    assert found.tuned is not None
    assert expected.step > 0  # it was improved, so that what follows is worth something
    assert all(torch.equal(found.tuned[k], v) for k, v in expected.dense.items())
    assert found.head is not None
    kinds = {type(m) for m in found.head.modules()}
    assert ((Int8Linear in kinds), (Bf16Linear in kinds)) == (plan == INT8, plan == BF16)
    rung = ready.shared.rungs[-1]
    plain = score(with_head(rung.working, expected.dense), resolved)
    scored = score(rung.working, resolved, found.head)
    assert np.abs(scored - plain).max() < (1e-5 if plan == LABELS["fp32"] else 0.1)
    assert np.abs(plain - score(rung.working, resolved)).max() > 1e-4


def test_calibrated_line_is_a_trials(
    ready: Preparation, lines: dict[str, dict[str, Any]], tuned: dict[str, Finalist]
) -> None:
    found, line = tuned["fp32"], lines["fp32"]
    assert found.trial["origin"] == "calibrated"
    assert found.trial["params"] == {**line["params"], "calibrate": "20 steps"}
    assert found.trial["table_bytes"] == line["table_bytes"]
    assert found.trial["artifact_bytes"] == pytest.approx(line["artifact_bytes"], abs=600)  # the plan says how
    assert set(OBJECTIVES) <= set(found.trial)
    resolved = resolve(found.plan, ready.profiles)
    rungs = ready.shared.rungs
    logits = np.concatenate([score(r.working, resolved, found.head) for r in rungs])
    labels, reference = (np.concatenate([getattr(r, n) for r in rungs]) for n in ("labels", "reference"))
    expected = quality(labels, logits, reference, ["click"], ready.shared.seed)
    assert {k: found.trial[k] for k in expected} == expected


def test_control_is_the_fp32_model_tuned_alike(room: Classroom, ready: Preparation) -> None:
    expected = fine_tune(
        room.train.working, room.held, None, CALIBRATE, ready.dataset.negative_rate, room.train.reference
    )
    found = tuned_control(room)
    assert found.step == expected.step
    assert all(torch.equal(found.dense[k], v) for k, v in expected.dense.items())


def test_judged_on_other_rows(ready: Preparation, lines: dict[str, dict[str, Any]]) -> None:
    finalist = finalist_of(ready.shared, lines["fp32"])
    logits = score(ready.selection.working, resolve(finalist.plan, ready.profiles))
    labels, reference = ready.selection.labels, ready.selection.reference
    found = judged((ready.shared, ready.selection), finalist)
    assert found == quality(labels, logits, reference, ["click"], ready.shared.seed + 1)


@pytest.mark.parametrize("name", LABELS)
def test_finalists_are_measured(ready: Preparation, lines: dict[str, dict[str, Any]], name: str) -> None:
    finalist = finalist_of(ready.shared, lines[name])
    found = measured_ms(ready.selection, finalist, resolve(finalist.plan, ready.shared.planner.profiles))
    assert 0 < found < 60_000


def test_sides_of_rows_hold_their_own_features(ready: Preparation) -> None:
    working = ready.selection.working
    parts = [part(working.transform) for part in (request_transform, item_transform)]
    found = [side(working.transform, part, working.sample) for part in parts]
    assert sorted([*found[0].sparse, *found[1].sparse]) == sorted(working.sample.sparse)
    for part, own in zip(parts, found, strict=True):
        for at, name in enumerate(part.dense_names):
            column = working.transform.dense_names.index(name)
            assert np.array_equal(own.dense[:, at], working.sample.dense[:, column])
