"""What a replica counts: requests by version and status, candidates, and how long each stage took.

One event loop records, plain Python numbers are added up, nothing is locked. A report is JSON that holds sums only, so
reports of several replicas merge by addition (`merge`), and quantiles are taken from the sum.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

from serve.trace import Trace

STAGES = ("parse", "wait", "rank", "total")
FIRST_S, BUCKETS = 50e-6, 41  # 50 us to 52 s; each edge is sqrt(2) of the one before: a quantile is known within 20%
EDGES_S = tuple(FIRST_S * math.sqrt(2) ** i for i in range(BUCKETS))
VERSIONS = 8  # that are counted apart at a time; the one that came first goes
NO_VERSION = "none"  # of what was refused before a version saw it
CLIENT_LEFT = 499  # as nginx counts requests whose client hung up


class Histogram:
    """Counts of seconds by bucket; bucket i ends at EDGES_S[i], the last one never."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (BUCKETS + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(EDGES_S, seconds)] += 1
        self.sum += seconds


class VersionMeter:
    """Figures of one version."""

    __slots__ = ("answers", "candidates", "parse", "rank", "total", "wait")

    def __init__(self) -> None:
        self.answers: dict[int, int] = {}
        self.candidates = 0
        self.parse, self.wait, self.rank, self.total = Histogram(), Histogram(), Histogram(), Histogram()

    def report(self) -> dict[str, Any]:
        """Sums so far."""
        stages = ((stage, getattr(self, stage)) for stage in STAGES)
        return {
            "answers": {str(status): count for status, count in self.answers.items()},
            "candidates": self.candidates,
            "stages": {stage: {"counts": list(h.counts), "sum": h.sum} for stage, h in stages},
        }


class Meter:
    """Figures of one replica."""

    def __init__(self) -> None:
        self.versions: dict[str, VersionMeter] = {}
        self.keys: dict[str, list[int]] = {}  # by name of a key: requests, candidates, refused at its limit

    def record(self, trace: Trace) -> None:
        """Count a request that is over: about 2 us (tests/serve/test_meter.py prints it).

        Stages count as far as a request came; the total counts for answers and for what the server failed at, so
        that quick refusals do not make it look fast.
        """
        version = trace.version or NO_VERSION
        of = self.versions.get(version) or self._open(version)
        status = trace.status
        of.answers[status] = of.answers.get(status, 0) + 1
        if trace.parsed:
            of.parse.add(trace.parsed - trace.read)
            if trace.begun:
                of.wait.add(trace.begun - trace.parsed)
                if trace.ended:
                    of.rank.add(trace.ended - trace.begun)
        if status == 200:
            of.candidates += trace.candidates
        if status == 200 or status >= 500:
            of.total.add(trace.answered - trace.read)
        if trace.key is not None:
            self._record_key(trace)

    def report(self) -> dict[str, Any]:
        """All sums so far: plain JSON."""
        versions = {version: of.report() for version, of in self.versions.items()}
        keys = {k: dict(zip(("requests", "candidates", "limited"), v, strict=True)) for k, v in self.keys.items()}
        return {"versions": versions, "keys": keys}

    def _open(self, version: str) -> VersionMeter:
        if len(self.versions) >= VERSIONS:
            del self.versions[next(iter(self.versions))]
        return self.versions.setdefault(version, VersionMeter())

    def _record_key(self, trace: Trace) -> None:
        assert trace.key is not None
        counts = self.keys.setdefault(trace.key, [0, 0, 0])
        counts[0] += 1
        counts[1] += trace.candidates if trace.status == 200 else 0
        counts[2] += trace.limited


SUMS = ("versions", "keys", "scores", "busy_s")  # parts of a report (serve/service.py) that add up over replicas


def merge(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of replicas' reports: numbers and lists of numbers are added, what only one of them has is kept."""
    merged: dict[str, Any] = {}
    for report in reports:
        merged = _added(merged, {part: report[part] for part in SUMS if part in report})
    return merged


def _added(a: Any, b: Any) -> Any:
    if isinstance(b, Mapping):
        return {k: _added(a[k], b[k]) if k in a and k in b else (b if k in b else a)[k] for k in [*a, *(b.keys() - a)]}
    if isinstance(b, list):
        return [x + y for x, y in zip(a, b, strict=True)]
    return a + b


def quantile(histogram: Mapping[str, Any], q: float) -> float | None:
    """Seconds below which a share `q` of a stage's requests took, {"counts", "sum"} of a report; None without any.

    Taken within a bucket as if its requests were spread evenly over its logarithm; more than the last edge reads as it.
    """
    counts = histogram["counts"]
    total = sum(counts)
    if not total:
        return None
    wanted, below = q * total, 0
    for bucket, count in enumerate(counts):
        if count and below + count >= wanted:
            if bucket == BUCKETS:
                return EDGES_S[-1]
            return EDGES_S[bucket] * math.sqrt(2) ** ((wanted - below) / count - 1)
        below += count
    return EDGES_S[-1]


def answers_of(version: Mapping[str, Any], least: int = 200, below: int = 300) -> int:
    """How many answers of a version's report have a status from `least` on and below `below`."""
    return sum(count for status, count in version["answers"].items() if least <= int(status) < below)
