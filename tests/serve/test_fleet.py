"""serve/fleet.py: which version answers, decided from what replicas report."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from serve.agreement import Agreement
from serve.config import SwapConfig
from serve.fleet import (
    KEPT,
    Fleet,
    FleetError,
    Order,
    Place,
    Report,
    Result,
    adopt,
    begin,
    judge,
    order_of,
    propose,
    refuse,
    roll_back,
    take,
    watch,
)
from serve.health import Health, bucket_of

SWAP = SwapConfig(min_overlap=0.5, max_calibration=1.25, probation_s=60, max_error_share=0.01, max_slowdown=2)
TIMEOUT_S = 120.0


def first() -> Fleet:
    return begin("v1", "/artifacts/v1", 0.0)


def deployed(*versions: str) -> Fleet:
    fleet = first()
    for at, version in enumerate(versions, 1):
        fleet = take(propose(fleet, Place(version=version, path=f"/artifacts/{version}"), (), float(at)), float(at))
    return fleet


def agreement(
    overlap: float = 1.0, ratio: float | None = 1.0, requests: int = 10, source: Any = "requests"
) -> Agreement:
    return Agreement(source=source, requests=requests, unreadable=0, overlap=overlap, calibration={"click": ratio})


def report(name: str, live: str = "v1", **more: Any) -> Report:
    return Report(replica=name, live=live, **more)


def reports_of(fleet: Fleet, *found: Agreement | str | None) -> dict[str, Report]:
    """A replica each: what it found of the candidate, an error of its, or None while it loads."""
    assert fleet.candidate is not None
    attempt = fleet.candidate.attempt
    results = [
        None if f is None else Result(attempt=attempt, **({"error": f} if isinstance(f, str) else {"agreement": f}))
        for f in found
    ]
    return {f"r{i}": report(f"r{i}", result=r) for i, r in enumerate(results)}


def judged(fleet: Fleet, *found: Agreement | str | None, now: float = 10.0) -> Fleet:
    return judge(fleet, reports_of(fleet, *found), SWAP, TIMEOUT_S, now)


def proposed(*override: str) -> Fleet:
    return propose(first(), Place(version="v2", path="/artifacts/v2"), override, 1.0)


# -- a new version ---------------------------------------------------------------------------------------------------


def test_candidate_waits_for_every_replica() -> None:
    fleet = proposed()
    assert judged(fleet, agreement(), None) is fleet
    assert judged(fleet) is fleet  # none is there yet
    taken = judged(fleet, agreement(), agreement())
    assert (taken.live, taken.previous, taken.candidate, taken.probation_since) == ("v2", "v1", None, 10.0)
    assert [taken.versions[v].state for v in ("v1", "v2")] == ["previous", "live"]


def test_candidate_that_one_replica_cannot_load_is_refused() -> None:
    fleet = judged(proposed(), agreement(), "tables.bin: altered", None)
    assert fleet.live == "v1"
    assert fleet.candidate is None
    assert fleet.versions["v2"].state == "refused"
    assert "tables.bin: altered" in str(fleet.versions["v2"].reason)
    assert "r1" in str(fleet.versions["v2"].reason)


def test_candidate_that_takes_too_long_is_refused() -> None:
    fleet = proposed()
    assert judged(fleet, agreement(), None, now=1.0 + TIMEOUT_S) is fleet
    late = judged(fleet, agreement(), None, now=1.1 + TIMEOUT_S)
    assert late.versions["v2"].reason == "1 of 2 replicas had it loaded after 120 s"
    assert judged(fleet, now=1.1 + TIMEOUT_S).versions["v2"].state == "refused"


@pytest.mark.parametrize(
    ("found", "check", "said"),
    [
        (agreement(overlap=0.499), "overlap", ["0.499", "10 recent requests", "swap.min_overlap"]),
        (agreement(ratio=1.26), "calibration", ["click", "1.260", "swap.max_calibration"]),
        (agreement(ratio=0.79), "calibration", ["click", "0.790", "swap.max_calibration"]),
        (agreement(ratio=None), "calibration", ["no comparable scores of task click"]),
    ],
)
def test_disagreement_is_refused_with_figures_unless_overridden_by_its_name(
    found: Agreement, check: str, said: list[str]
) -> None:
    fleet = judged(proposed(), found)
    assert fleet.live == "v1"
    assert all(words in str(fleet.versions["v2"].reason) for words in said)
    other = "overlap" if check == "calibration" else "calibration"
    assert judged(proposed(other), found).live == "v1"
    taken = judged(proposed(check), found)
    assert taken.live == "v2"
    assert taken.versions["v2"].overridden == (check,)
    assert taken.versions["v2"].agreement == found


@pytest.mark.parametrize("found", [agreement(overlap=0.5), agreement(ratio=1.25), agreement(ratio=0.8)])
def test_limits_themselves_are_allowed(found: Agreement) -> None:
    taken = judged(proposed(), found)
    assert taken.live == "v2"
    assert taken.versions["v2"].overridden == ()


def test_replicas_count_by_their_requests() -> None:
    few, many = agreement(overlap=0.0, requests=1), agreement(overlap=0.9, requests=9)
    found = judged(proposed(), few, many).versions["v2"].agreement
    assert found is not None
    assert (found.overlap, found.requests) == (pytest.approx(0.81), 10)


def test_golden_rows_do_not_count_where_there_are_requests() -> None:
    golden = agreement(overlap=1.0, requests=64, source="golden rows")
    assert judged(proposed(), golden, agreement(overlap=0.1, requests=1)).live == "v1"
    assert judged(proposed(), golden, golden).live == "v2"


def test_a_result_of_an_earlier_attempt_is_not_judged() -> None:
    fleet = proposed()
    old = reports_of(fleet, agreement(overlap=0.0))
    again = propose(refuse(fleet, "once"), Place(version="v2", path="/artifacts/v2"), (), 3.0)
    assert judge(again, old, SWAP, TIMEOUT_S, 4.0) is again
    assert judged(again, agreement()).live == "v2"


@pytest.mark.parametrize(
    ("fleet", "version", "override", "message"),
    [
        (first(), "v1", (), "v1 is live already"),
        (proposed(), "v3", (), "v2 is being deployed"),
        (first(), "v2", ("speed",), "'speed': no such check: overlap and calibration"),
    ],
)
def test_proposal_that_cannot_be(fleet: Fleet, version: str, override: tuple[str, ...], message: str) -> None:
    with pytest.raises(FleetError, match=message):
        propose(fleet, Place(version=version, path="/artifacts/x"), override, 2.0)


def test_only_live_and_previous_stay_loaded() -> None:
    fleet = deployed("v2", "v3")
    order = order_of(fleet)
    assert (order.live.version, order.live.path) == ("v3", "/artifacts/v3")
    assert order.previous is not None
    assert order.previous.version == "v2"
    assert fleet.versions["v1"].state == "retired"


def test_previous_version_can_be_deployed_again_and_refused() -> None:
    fleet = propose(deployed("v2"), Place(version="v1", path="/elsewhere/v1"), (), 5.0)
    refused = refuse(fleet, "differs")
    assert refused.versions["v1"].path == "/artifacts/v1"
    assert (refused.live, refused.previous, refused.versions["v1"].state) == ("v2", "v1", "previous")
    taken = take(fleet, 6.0)
    assert (taken.live, taken.previous, taken.versions["v1"].state) == ("v1", "v2", "live")
    assert order_of(fleet).previous != order_of(fleet).candidate
    assert order_of(taken).live.path == "/elsewhere/v1"


def test_memory_of_versions_is_bounded_and_keeps_those_in_use() -> None:
    fleet = deployed("v2")
    for at in range(3 * KEPT):
        fleet = refuse(propose(fleet, Place(version=f"bad{at}", path="/x"), (), 10.0 + at), "no")
    assert len(fleet.versions) <= KEPT + 3
    assert {"v1", "v2"} <= set(fleet.versions)


def test_generation_grows_with_every_order() -> None:
    fleet = first()
    steps = [fleet]
    steps.append(propose(steps[-1], Place(version="v2", path="/v2"), (), 1.0))
    steps.append(take(steps[-1], 2.0))
    steps.append(watch(steps[-1], {}, SWAP, 100.0))
    steps.append(roll_back(steps[-1], 101.0))
    assert all(a.generation < b.generation for a, b in itertools.pairwise(steps))
    assert len({order_of(s).model_dump_json() for s in steps}) == len(steps)


# -- back ------------------------------------------------------------------------------------------------------------


def test_rollback_goes_back_and_forth() -> None:
    fleet = deployed("v2")
    back = roll_back(fleet, 5.0)
    assert (back.live, back.previous, back.probation_since) == ("v1", "v2", None)
    assert [back.versions[v].state for v in ("v1", "v2")] == ["live", "previous"]
    assert roll_back(back, 6.0).live == "v2"


def test_rollback_without_a_previous_version_says_so() -> None:
    with pytest.raises(FleetError, match="no version before v1"):
        roll_back(first(), 5.0)


def test_rollback_gives_a_candidate_up() -> None:
    fleet = propose(deployed("v2"), Place(version="v3", path="/v3"), (), 4.0)
    back = roll_back(fleet, 5.0)
    assert (back.live, back.candidate, back.versions["v3"].state) == ("v1", None, "refused")


def health(requests: int, errors: int = 0, us: float = 10.0) -> Health:
    return Health(requests=requests, errors=errors, speed={bucket_of(us * 1e-6): requests})


def watched(live: Health, before: Health, now: float = 10.0) -> Fleet:
    fleet = deployed("v2")
    halves = {"a": report("a", "v2", health={"v2": live, "v1": before}), "b": report("b", "v2")}
    return watch(fleet, halves, SWAP, now)


def test_errors_on_probation_take_a_version_back() -> None:
    fleet = watched(health(100, errors=5), health(1000))
    assert (fleet.live, fleet.previous, fleet.probation_since) == ("v1", None, None)
    assert fleet.versions["v2"].state == "refused"
    assert "5 of 100 requests" in str(fleet.versions["v2"].reason)


@pytest.mark.parametrize(
    ("live", "before"),
    [
        (health(4, errors=4), health(1000)),  # too few to say
        (health(1000, errors=10), health(1000)),  # within the share
        (health(99, us=100), health(1000)),  # too few to time
        (health(1000, us=100), health(99)),
        (health(1000, us=18), health(1000, us=10)),  # not twice as slow
    ],
)
def test_small_complaints_do_not(live: Health, before: Health) -> None:
    assert watched(live, before).live == "v2"


def test_slowness_on_probation_takes_a_version_back() -> None:
    fleet = watched(health(200, us=40), health(200, us=10))
    assert fleet.live == "v1"
    assert "4.0 times" in str(fleet.versions["v2"].reason)


def test_a_few_slow_requests_are_not_slowness() -> None:
    mixed = Health(requests=200, speed={bucket_of(10e-6): 195, bucket_of(1.0): 5})
    assert watched(mixed, health(200)).live == "v2"


def test_counts_of_replicas_add_up() -> None:
    fleet = deployed("v2")
    parts = {n: report(n, "v2", health={"v2": health(100, errors=3)}) for n in "ab"}
    assert watch(fleet, parts, SWAP, 10.0).live == "v1"
    del parts["b"]
    assert watch(fleet, parts, SWAP, 10.0).live == "v2"


def test_probation_ends() -> None:
    during, after = watched(health(10), health(10), 60.9), watched(health(10), health(10), 61.0)
    assert during.probation_since is not None
    assert after.probation_since is None
    assert order_of(during).probation
    assert not order_of(after).probation
    assert watch(after, {"a": report("a", "v2", health={"v2": health(100, errors=90)})}, SWAP, 70.0) is after


# -- memory ----------------------------------------------------------------------------------------------------------


def test_state_survives_json() -> None:
    fleet = judged(proposed("overlap"), agreement(overlap=0.2))
    assert Fleet.model_validate_json(fleet.model_dump_json()) == fleet
    assert Order.model_validate_json(order_of(fleet).model_dump_json()) == order_of(fleet)


def test_fleet_without_memory_learns_from_a_replica() -> None:
    lost = first()
    order = order_of(deployed("v2", "v3"))
    found = adopt(lost, order, 9.0)
    assert (found.live, found.previous) == ("v3", "v2")
    assert found.generation > order.generation
    assert [found.versions[v].state for v in ("v1", "v2", "v3")] == ["retired", "previous", "live"]
    assert found.probation_since == 9.0
    assert found.versions["v3"].path == "/artifacts/v3"


def test_fleet_with_memory_does_not_take_an_older_order() -> None:
    fleet = deployed("v2")
    assert adopt(fleet, order_of(first()), 9.0) is fleet
    assert adopt(fleet, order_of(fleet), 9.0) is fleet
