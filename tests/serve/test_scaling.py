"""How many replicas a load wants: values in, a number out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from serve.scaling import BUSY, CANDIDATES, SETTLE_S, SHED, WAITING, BusyPolicy, Load, Seen, replicas_for, see


def points(*pairs: tuple[float, float]) -> list[SimpleNamespace]:
    return [SimpleNamespace(timestamp=t, value=v) for t, v in pairs]


@pytest.mark.parametrize(
    ("busy", "running", "pressed", "wanted"),
    [
        (0.0, 1, False, 1),  # never none
        (0.7, 1, False, 1),  # at the target
        (0.71, 1, False, 2),
        (2.0, 2, False, 3),
        (0.0, 1, True, 2),  # refusing, though not busy: the event loop is the narrow place
        (2.1, 2, True, 3),
        (0.69, 2, False, 2),  # would fit on one, and be at the target there: none goes
        (0.55, 2, False, 1),
        (0.6, 4, False, 2),
    ],
)
def test_replicas_for_follows_the_sum_of_busy_shares(busy: float, running: int, pressed: bool, wanted: int) -> None:
    assert replicas_for(Seen(running, running, busy, pressed), 0.7) == wanted


def test_replicas_for_asks_for_no_more_while_one_is_coming() -> None:
    assert replicas_for(Seen(1, 2, 1.0, True), 0.7) == 2
    assert replicas_for(Seen(2, 2, 2.0, True), 0.7) == 3


def test_see_averages_each_replica_and_adds_them_up() -> None:
    metrics = {BUSY: {"a": points((1, 0.8), (2, 1.0)), "b": points((2, 0.1)), "gone": points((2, 1.0))}}
    seen = see(metrics, ["a", "b", "new"], 3, 0.0, 50.0)
    assert (seen.running, seen.target, seen.pressed) == (3, 3, False)
    assert seen.busy == pytest.approx(1.0)


def test_see_is_pressed_by_one_refusal_but_not_by_one_peak_of_waiting() -> None:
    assert see({SHED: {"a": points((1, 0), (2, 3))}}, ["a"], 1, 0.0, 50).pressed
    assert not see({WAITING: {"a": points((1, 90), (2, 10))}}, ["a"], 1, 0.0, 50).pressed
    assert see({WAITING: {"a": points((1, 90), (2, 60))}}, ["a"], 1, 0.0, 50).pressed


def test_see_forgets_refusals_from_before() -> None:
    assert not see({SHED: {"a": points((1, 9), (2, 0))}}, ["a"], 1, 1.5, 50).pressed


def context(now: float, replicas: list[str], target: int, metrics: dict[str, Any]) -> SimpleNamespace:
    """What Ray Serve's AutoscalingContext tells of these."""
    return SimpleNamespace(current_time=now, running_replicas=replicas, target_num_replicas=target, raw_metrics=metrics)


def test_policy_adds_a_replica_at_once_when_requests_are_refused() -> None:
    policy = BusyPolicy(0.7, 30.0, 50.0)
    assert policy(context(0, ["a"], 1, {BUSY: {"a": points((0, 0.2))}})) == (1, {})
    late = SETTLE_S + 1
    refusing = {BUSY: {"a": points((late, 1.0))}, SHED: {"a": points((late, 5.0))}}
    assert policy(context(late, ["a"], 1, refusing)) == (2, {})


def test_policy_waits_the_delay_when_replicas_are_only_busy() -> None:
    policy = BusyPolicy(0.7, 2.0, 50.0)
    busy = {BUSY: {"a": points((0, 0.9))}}
    idle = {BUSY: {"a": points((0, 0.1))}}
    assert policy(context(10.0, ["a"], 1, busy))[0] == 1
    assert policy(context(11.9, ["a"], 1, busy))[0] == 1
    assert policy(context(12.0, ["a"], 1, busy))[0] == 2
    assert policy(context(12.1, ["a"], 1, idle))[0] == 1
    assert policy(context(12.2, ["a"], 1, busy))[0] == 1  # begins anew


def test_policy_does_not_answer_old_refusals_with_a_third_replica() -> None:
    policy = BusyPolicy(0.7, 0.0, 50.0)
    policy(context(0.0, ["a"], 1, {}))
    refusing = {SHED: {"a": points((5.0, 9.0))}, BUSY: {"a": points((5.0, 1.0))}}
    assert policy(context(5.0, ["a"], 1, refusing))[0] == 2
    assert policy(context(6.0, ["a", "b"], 2, refusing))[0] == 2
    still = {SHED: {"b": points((6.0 + SETTLE_S + 0.1, 1.0))}, BUSY: {}}
    assert policy(context(7.2, ["a", "b"], 2, still))[0] == 3


def test_policy_keeps_the_target_while_none_runs() -> None:
    assert BusyPolicy(0.7, 0.0, 50.0)(context(0.0, [], 2, {}))[0] == 2


def test_load_tells_rates_since_it_was_last_asked() -> None:
    counts = SimpleNamespace(busy_s=10.0, answered=1000, shed=3, wait_s=0.025)
    load = Load(counts, 100.0)
    counts.busy_s, counts.answered, counts.shed = 10.1, 1500, 4
    told = load.since_last(100.5)
    assert told == pytest.approx({BUSY: 0.2, CANDIDATES: 1000.0, SHED: 2.0, WAITING: 25.0})
    assert load.since_last(100.6) == pytest.approx({BUSY: 0.0, CANDIDATES: 0.0, SHED: 0.0, WAITING: 25.0})


def test_load_survives_being_asked_twice_at_once() -> None:
    counts = SimpleNamespace(busy_s=0.0, answered=0, shed=0, wait_s=0.0)
    load = Load(counts, 1.0)
    counts.busy_s = 1.0
    assert load.since_last(1.0)[BUSY] == 1.0
