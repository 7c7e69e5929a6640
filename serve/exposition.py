"""Reports of all replicas -> Prometheus text. Every name that is exposed stands in METRICS; docs/serving.md lists them.

Counters carry the replica they are of, so that one that goes away takes no sum down with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.drift import mean_ratio, psi
from serve.meter import EDGES_S, merge

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Reports = Mapping[str, Mapping[str, Any]]
Sample = tuple[list[str], float]
UPPER_EDGES = [*(f"{edge:.6g}" for edge in EDGES_S), "+Inf"]


def prometheus_text(reports: Reports) -> bytes:
    """The text of GET /metrics, of reports (serve.service.Service.report) by name of their replica."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Reports(reports))
    return generate_latest(registry)


class _Reports(Collector):
    """What prometheus_client asks for metrics."""

    def __init__(self, reports: Reports) -> None:
        self.reports = reports

    def collect(self) -> Iterator[Metric]:
        """All metrics, once."""
        yield from exposed(self.reports)


def exposed(reports: Reports) -> Iterator[Metric]:
    """All metrics of some reports."""
    for described in METRICS:
        metric = described.kind(described.name, described.text, labels=described.labels)
        for values, value in described.samples(reports):
            metric.add_metric(values, value)
        yield metric
    yield stage_seconds(reports)


def stage_seconds(reports: Reports) -> HistogramMetricFamily:
    """Seconds of each stage."""
    text = "Seconds of a request's stages: parse, wait (in the queue), rank, total (last byte read to answer begun)"
    metric = HistogramMetricFamily("slimrank_stage_seconds", text, labels=["replica", "version", "stage"])
    for replica, version, of in _versions(reports):
        for stage, histogram in of["stages"].items():
            buckets = list(zip(UPPER_EDGES, accumulate(histogram["counts"]), strict=True))
            metric.add_metric([replica, version, stage], buckets, histogram["sum"])
    return metric


# -- samples of each metric: label values, value ---------------------------------------------------------------------


def _versions(reports: Reports) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for replica, report in reports.items():
        for version, of in report["versions"].items():
            yield replica, version, of


def _requests(reports: Reports) -> Iterator[Sample]:
    for replica, version, of in _versions(reports):
        for status, count in of["answers"].items():
            yield [replica, version, status], count


def _candidates(reports: Reports) -> Iterator[Sample]:
    return (([replica, version], of["candidates"]) for replica, version, of in _versions(reports))


def _of_keys(what: str) -> Callable[[Reports], Iterator[Sample]]:
    def samples(reports: Reports) -> Iterator[Sample]:
        for replica, report in reports.items():
            for key, counts in report["keys"].items():
                yield [replica, key], counts[what]

    return samples


def _of_replica(what: str) -> Callable[[Reports], Iterator[Sample]]:
    return lambda reports: (([replica], report[what]) for replica, report in reports.items())


def _versions_held(reports: Reports) -> Iterator[Sample]:
    for replica, report in reports.items():
        for version in report["loaded"]:
            yield [replica, version], float(version == report["live"])


def _drifts(measure: Callable[[Mapping[str, Any], Mapping[str, Any]], float | None]) -> Callable[..., Iterable[Sample]]:
    """Of all replicas' scores together; `measure` takes what was expected of a task, and its sums."""

    def samples(reports: Reports) -> Iterator[Sample]:
        expected = {v: of for report in reports.values() for v, of in report["expected"].items()}
        for version, tasks in merge(reports.values()).get("scores", {}).items():
            for task, sums in tasks.items():
                value = measure(expected[version][task], sums)
                if value is not None:
                    yield [version, task], value

    return samples


@dataclass(frozen=True)
class Described:
    """A metric, and how its samples are read out of reports."""

    kind: type[CounterMetricFamily] | type[GaugeMetricFamily]
    name: str
    text: str
    labels: tuple[str, ...]
    samples: Callable[[Reports], Iterable[Sample]]


COUNTER, GAUGE = CounterMetricFamily, GaugeMetricFamily
VERSION, KEY, SCORES = ("replica", "version"), ("replica", "key"), ("version", "task")
PSI = _drifts(lambda expected, sums: psi(expected["shares"], sums["counts"]))
RATIO = _drifts(lambda expected, sums: mean_ratio(expected["mean"], sums["counts"], sums["sum"]))
COUNTED = _drifts(lambda _expected, sums: sum(sums["counts"]))
METRICS = (
    Described(COUNTER, "slimrank_requests", "Requests by HTTP status", (*VERSION, "status"), _requests),
    Described(COUNTER, "slimrank_candidates", "Candidates ranked", VERSION, _candidates),
    Described(COUNTER, "slimrank_key_requests", "Requests of an API key", KEY, _of_keys("requests")),
    Described(COUNTER, "slimrank_key_candidates", "Candidates of an API key", KEY, _of_keys("candidates")),
    Described(COUNTER, "slimrank_key_limited", "Requests refused at a key's limit", KEY, _of_keys("limited")),
    Described(COUNTER, "slimrank_busy_seconds", "Seconds of scoring", ("replica",), _of_replica("busy_s")),
    Described(GAUGE, "slimrank_waiting_seconds", "Work in the queue", ("replica",), _of_replica("waiting_s")),
    Described(GAUGE, "slimrank_version_live", "1 of the version that answers, 0 of one ready", VERSION, _versions_held),
    Described(GAUGE, "slimrank_score_psi", "PSI of live scores against validation scores", SCORES, PSI),
    Described(GAUGE, "slimrank_score_mean_ratio", "Mean live score / mean validation score", SCORES, RATIO),
    Described(GAUGE, "slimrank_scores_counted", "Scores that drift rests on, faded", SCORES, COUNTED),
)
