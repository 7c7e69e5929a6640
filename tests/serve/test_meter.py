"""What a replica counts, and how counts of replicas become figures."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from serve.meter import BUCKETS, EDGES_S, NO_VERSION, VERSIONS, Histogram, Meter, answers_of, merge, quantile
from serve.trace import Trace


def trace(total_s: float = 0.004, version: str | None = "v1", status: int = 200, key: str | None = None) -> Trace:
    return Trace(
        read=100.0,
        parsed=100.0001,
        begun=100.0002,
        ended=100.0 + total_s * 0.9,
        answered=100.0 + total_s,
        candidates=500,
        status=status,
        version=version,
        key=key,
    )


def report(histogram: Histogram) -> dict:
    return {"counts": histogram.counts, "sum": histogram.sum}


@pytest.mark.parametrize("q", [0.5, 0.95, 0.99])
def test_quantile_is_within_a_bucket_of_the_exact_one(q: float) -> None:
    seconds = np.random.default_rng(0).lognormal(np.log(0.005), 0.8, 20_000)
    histogram = Histogram()
    for s in seconds:
        histogram.add(float(s))
    found = quantile(report(histogram), q)
    assert found is not None
    assert found == pytest.approx(float(np.quantile(seconds, q)), rel=0.05)
    assert histogram.sum == pytest.approx(seconds.sum())


def test_quantile_of_nothing_is_none_and_of_what_is_too_slow_the_last_edge() -> None:
    empty, slow = Histogram(), Histogram()
    slow.add(3600.0)
    assert quantile(report(empty), 0.5) is None
    assert quantile(report(slow), 0.5) == EDGES_S[-1]
    assert slow.counts[BUCKETS] == 1


def test_an_edge_belongs_to_its_own_bucket() -> None:
    histogram = Histogram()
    histogram.add(EDGES_S[7])
    assert histogram.counts[7] == 1


def test_stages_count_as_far_as_a_request_came() -> None:
    meter = Meter()
    meter.record(trace())
    shed = Trace(read=100.0, parsed=100.0001, answered=100.0002, status=429, candidates=500)
    meter.record(shed)
    unread = Trace(read=100.0, answered=100.0001, status=422)
    meter.record(unread)
    versions = meter.report()["versions"]
    counted = {stage: sum(h["counts"]) for stage, h in versions["v1"]["stages"].items()}
    assert counted == {"parse": 1, "wait": 1, "rank": 1, "total": 1}
    assert versions["v1"]["stages"]["total"]["sum"] == pytest.approx(0.004)
    assert versions["v1"]["candidates"] == 500
    refused = versions[NO_VERSION]
    assert {stage: sum(h["counts"]) for stage, h in refused["stages"].items()} == {
        "parse": 1,
        "wait": 0,
        "rank": 0,
        "total": 0,  # a quick refusal is no fast answer
    }
    assert refused["candidates"] == 0
    assert refused["answers"] == {"429": 1, "422": 1}


def test_reports_merge_by_addition_through_json() -> None:
    a, b, both = Meter(), Meter(), Meter()
    for version, status, meter in (("v1", 200, a), ("v1", 500, b), ("v2", 200, b), ("v1", 200, b)):
        for each in (meter, both):
            each.record(trace(version=version, status=status, key="shop"))
    merged = merge(json.loads(json.dumps({**m.report(), "busy_s": 1.5, "live": "v1"})) for m in (a, b))
    expected = both.report()
    assert merged["busy_s"] == 3.0
    assert "live" not in merged
    assert merged["keys"] == expected["keys"] == {"shop": {"requests": 4, "candidates": 1500, "limited": 0}}
    for version, of in expected["versions"].items():
        found = merged["versions"][version]
        assert (found["answers"], found["candidates"]) == (of["answers"], of["candidates"])
        for stage, histogram in of["stages"].items():
            assert found["stages"][stage]["counts"] == histogram["counts"]
            assert found["stages"][stage]["sum"] == pytest.approx(histogram["sum"])
    assert answers_of(merged["versions"]["v1"]) == 2
    assert answers_of(merged["versions"]["v1"], 500, 600) == 1


def test_merging_nothing_is_empty_and_leaves_reports_as_they_were() -> None:
    meter = Meter()
    meter.record(trace())
    before = meter.report()
    kept = json.loads(json.dumps(before))
    merge([before, before])
    assert before == kept
    assert merge([]) == {}


def test_versions_that_are_counted_are_few() -> None:
    meter = Meter()
    for i in range(VERSIONS + 3):
        meter.record(trace(version=f"v{i}"))
    assert list(meter.report()["versions"]) == [f"v{i}" for i in range(3, VERSIONS + 3)]


def test_recording_a_request_costs_microseconds(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, not asserted: the machine may be busy. What is asserted is that nothing was lost."""
    meter, one = Meter(), trace()
    begun = time.process_time()
    for _ in range(20_000):
        meter.record(one)
    each_us = (time.process_time() - begun) / 20_000 * 1e6
    with capsys.disabled():
        print(f" [record: {each_us:.2f} us]", end="")
    assert meter.versions["v1"].answers == {200: 20_000}
