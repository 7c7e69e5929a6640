"""The text of /metrics, and the dashboard that reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.exposition import METRICS, prometheus_text
from serve.meter import EDGES_S, STAGES, Meter, merge
from serve.trace import Trace

DASHBOARD = Path(__file__).parents[2] / "cluster" / "manifests" / "grafana.json"
WORDS = {"histogram_quantile", "sum", "by", "rate", "label_values"}


def report(requests: int, version: str = "v1", live: str = "v1") -> dict:
    """What a replica reports after so many answers; its scores are all in the upper of two bins."""
    meter = Meter()
    for _ in range(requests):
        meter.record(Trace(1.0, 1.001, 1.002, 1.004, 1.005, 500, 200, version, key="shop"))
    meter.record(Trace(1.0, answered=1.1, status=429, key="shop", limited=True))
    return meter.report() | {
        "scores": {version: {"click": {"counts": [0.0, 600.0], "sum": 360.0}}},
        "expected": {version: {"click": {"shares": [0.5, 0.5], "mean": 0.3}}},
        "live": live,
        "loaded": sorted({version, live}),
        "waiting_s": 0.25,
        "busy_s": 12.5,
    }


def samples(reports: dict) -> dict[tuple, float]:
    """Value by (name, labels) of what a Prometheus server would read."""
    families = text_string_to_metric_families(prometheus_text(reports).decode())
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


def of(found: dict[tuple, float], name: str, **labels: str) -> float:
    return found[(name, *sorted(labels.items()))]


def test_each_replica_has_its_own_counters() -> None:
    found = samples({"r0": report(3), "r1": report(5)})
    assert of(found, "slimrank_requests_total", replica="r0", version="v1", status="200") == 3
    assert of(found, "slimrank_requests_total", replica="r1", version="v1", status="200") == 5
    assert of(found, "slimrank_requests_total", replica="r1", version="none", status="429") == 1
    assert of(found, "slimrank_candidates_total", replica="r1", version="v1") == 2500
    assert of(found, "slimrank_key_requests_total", replica="r0", key="shop") == 4
    assert of(found, "slimrank_key_limited_total", replica="r0", key="shop") == 1
    assert of(found, "slimrank_busy_seconds_total", replica="r0") == 12.5
    assert of(found, "slimrank_waiting_seconds", replica="r0") == 0.25


def test_histograms_are_cumulative_and_end_in_all() -> None:
    found = samples({"r0": report(3)})
    labels = {"replica": "r0", "version": "v1", "stage": "total"}
    by_edge = [of(found, "slimrank_stage_seconds_bucket", le=f"{edge:.6g}", **labels) for edge in EDGES_S]
    assert by_edge == sorted(by_edge)
    assert by_edge[0] == 0
    assert of(found, "slimrank_stage_seconds_bucket", le="+Inf", **labels) == 3
    assert of(found, "slimrank_stage_seconds_count", **labels) == 3
    assert of(found, "slimrank_stage_seconds_sum", **labels) == pytest.approx(0.015)
    assert {dict(key[1:])["stage"] for key in found if key[0] == "slimrank_stage_seconds_sum"} == set(STAGES)


def test_versions_that_are_live_and_held_ready() -> None:
    found = samples({"r0": report(1, live="v0"), "r1": report(1)})
    assert of(found, "slimrank_version_live", replica="r0", version="v0") == 1
    assert of(found, "slimrank_version_live", replica="r0", version="v1") == 0
    assert of(found, "slimrank_version_live", replica="r1", version="v1") == 1


def test_drift_is_that_of_all_replicas_together() -> None:
    """Neither replica has counted enough scores by itself."""
    alone = samples({"r0": report(1)})
    assert ("slimrank_score_psi", ("task", "click"), ("version", "v1")) not in alone
    assert of(alone, "slimrank_scores_counted", task="click", version="v1") == 600
    both = samples({"r0": report(1), "r1": report(1)})
    assert of(both, "slimrank_score_psi", task="click", version="v1") > 1
    assert of(both, "slimrank_score_mean_ratio", task="click", version="v1") == pytest.approx(2.0)


def test_no_replica_and_a_quiet_replica_are_valid_text() -> None:
    assert samples({}) == {}
    quiet = Meter().report() | {"scores": {}, "expected": {}, "live": "v1", "loaded": ["v1"]}
    found = samples({"r0": quiet | {"waiting_s": 0.0, "busy_s": 0.0}})
    assert of(found, "slimrank_version_live", replica="r0", version="v1") == 1


def test_reports_that_came_as_json_read_the_same() -> None:
    reports = {"r0": report(2), "r1": report(4)}
    assert prometheus_text(json.loads(json.dumps(reports))) == prometheus_text(reports)
    assert merge(reports.values())["versions"]["v1"]["candidates"] == 3000


# -- the dashboard ---------------------------------------------------------------------------------------------------


def expressions() -> list[str]:
    """Every expression of the dashboard, that of its variable too."""
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return found + [v["definition"] for v in board["templating"]["list"] if v["type"] == "query"]


def test_every_metric_and_label_of_the_dashboard_is_exposed() -> None:
    text = prometheus_text({"r0": report(2), "r1": report(2)}).decode()
    exposed = {s.name: set(s.labels) for family in text_string_to_metric_families(text) for s in family.samples}
    assert len(expressions()) > 15
    for expression in expressions():
        names = re.findall(r"slimrank_\w+", expression)
        assert names, expression
        assert set(names) <= set(exposed), expression
        labels = re.findall(r"(\w+)=~?\"", expression)
        labels += [w.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for w in group.split(",")]
        allowed = set.intersection(*(exposed[name] for name in names))
        assert set(labels) <= allowed, expression
        rest = re.sub(r"\"[^\"]*\"|\{[^}]*\}|slimrank_\w+|by \([^)]*\)|\[[^]]*\]|[\d.]+", " ", expression)
        assert set(re.findall(r"[a-z_]+", rest)) <= WORDS | {"version"}, expression
        assert expression.count("(") == expression.count(")")


def test_every_exposed_metric_is_on_the_dashboard_and_in_the_docs() -> None:
    shown = " ".join(expressions())
    docs = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    for name in [*(m.name for m in METRICS), "slimrank_stage_seconds"]:
        assert name in shown
        assert name in docs


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert (board["uid"], board["id"], board["schemaVersion"]) == ("slimrank", None, 38)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        assert panel["type"] in {"row", "timeseries", "stat"}
        assert panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        targets = panel.get("targets", [])
        assert [t["refId"] for t in targets] == list("ABCDEFGH"[: len(targets)])
        assert panel["type"] == "row" or all(t["datasource"]["uid"] == "${datasource}" for t in targets)
