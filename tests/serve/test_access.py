"""The middleware on the real routes and a real ranker, over ASGI: who is let in, what is counted and what is logged."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from ray._common.formatters import JSONFormatter  # what Ray Serve writes JSON with; starts nothing
from starlette.requests import ClientDisconnect

from serve.api import make_api
from serve.config import ServeConfig
from serve.exposition import prometheus_text
from serve.keys import new_key, revoke_key
from serve.logs import LOG
from serve.meter import NO_VERSION
from serve.ranker import Ranker
from serve.service import Service
from serve.shelf import Served, Shelf
from trainer.errors import SlimrankError

BODY = {"user": {"user_id": 1001}, "candidates": ["i1", "i2", "i3"], "k": 2}


class Lines(logging.Handler):
    """Keeps what is logged, as Ray Serve's JSON encoding writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JSONFormatter())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.lines.append(self.format(record))


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What is logged meanwhile."""
    handler = Lines()
    LOG.addHandler(handler)
    yield handler
    LOG.removeHandler(handler)


@pytest.fixture
def service(ranker: Ranker) -> Iterator[Service]:
    """A service without keys."""
    yield from serving(ranker)


def serving(ranker: Ranker, **config: object) -> Iterator[Service]:
    """A service, stopped afterwards."""
    one = Service(Shelf(Served(ranker.artifact.version, "", ranker)), ServeConfig.model_validate(config))
    yield one
    one.engine.stop()


def ask(service: Service, *calls: dict) -> list[httpx.Response]:
    """Answers of the routes, one after another in one event loop."""

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(make_api(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.request(**{"method": "POST", "url": "/v1/rank", "json": BODY} | c) for c in calls]

    return asyncio.run(run())


def counted(service: Service, stage: str) -> int:
    return sum(sum(of["stages"][stage]["counts"]) for of in service.report()["versions"].values())


def test_requests_are_counted_by_version_status_and_stage(service: Service) -> None:
    calls = ({}, {}, {"json": {"user": {}}}, {"content": b"{", "json": None}, {"method": "GET", "url": "/healthz"})
    statuses = [r.status_code for r in ask(service, *calls)]
    assert statuses == [200, 200, 422, 400, 200]
    report, version = service.report(), service.shelf.live.version
    assert json.loads(json.dumps(report)) == report
    assert report["versions"][version]["answers"] == {"200": 2}
    assert report["versions"][version]["candidates"] == 6
    assert report["versions"][NO_VERSION]["answers"] == {"422": 1, "400": 1}
    assert [counted(service, stage) for stage in ("parse", "wait", "rank", "total")] == [2, 2, 2, 2]
    stages = report["versions"][version]["stages"]
    assert 0 < stages["parse"]["sum"] + stages["wait"]["sum"] + stages["rank"]["sum"] < stages["total"]["sum"]
    assert (report["live"], report["loaded"]) == (version, [version])
    assert report["busy_s"] > 0
    assert sum(report["scores"][version]["click"]["counts"]) == pytest.approx(6)


def test_a_failure_is_counted_against_the_version_that_failed(
    service: Service, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_requests: object) -> None:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(service.shelf.live.ranker, "answer_many", broken)
    try:
        (answer,) = ask(service, {"headers": {"x-request-id": "abc"}})
    finally:
        monkeypatch.undo()
    assert answer.status_code == 500
    assert service.report()["versions"][service.shelf.live.version]["answers"] == {"500": 1}
    (line,) = [json.loads(line) for line in lines.lines]
    assert (line["levelname"], line["status"], line["request_id"]) == ("ERROR", 500, "abc")
    assert line["version"] == service.shelf.live.version
    assert "ZeroDivisionError: broken" in line["exc_text"]


def test_a_request_that_its_client_left_is_counted_as_that(service: Service) -> None:
    async def run() -> None:
        async def receive() -> dict:
            return {"type": "http.disconnect"}

        async def send(_message: dict) -> None:
            return None

        scope = {"type": "http", "method": "POST", "path": "/v1/rank", "headers": [], "query_string": b""}
        with pytest.raises(ClientDisconnect):
            await make_api(service)(scope, receive, send)

    asyncio.run(run())
    assert service.report()["versions"][NO_VERSION]["answers"] == {"499": 1}


def test_the_access_log_has_a_line_for_each_request_and_no_secret(ranker: Ranker, lines: Lines, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = new_key(path, "shop")
    for service in serving(ranker, keys=path, access_log=True):
        ask(service, {"headers": {"x-api-key": secret, "x-request-id": "r-1"}}, {"headers": {"x-api-key": "wrong-key"}})
    first, second = (json.loads(line) for line in lines.lines)
    assert {k: first[k] for k in ("request_id", "version", "status", "candidates", "key", "path")} == {
        "request_id": "r-1",
        "version": ranker.artifact.version,
        "status": 200,
        "candidates": 3,
        "key": "shop",
        "path": "/v1/rank",
    }
    assert 0 < first["ms"] < 60_000
    assert (second["status"], second["key"], second["version"]) == (401, None, None)
    everything = "".join(lines.lines)
    assert not [s for s in (secret, "wrong-key", "1001", "i2") if s in everything]


def test_without_the_access_log_good_requests_leave_no_line(service: Service, lines: Lines) -> None:
    ask(service, {}, {"json": {}})
    assert lines.lines == []


def test_a_version_change_is_logged(ranker: Ranker, lines: Lines) -> None:
    shelf = Shelf(Served("v1", "", ranker))
    shelf.add(Served("v2", "", ranker))
    shelf.flip("v2")
    (line,) = [json.loads(line) for line in lines.lines]
    assert (line["message"], line["version"], line["previous"]) == ("version", "v2", "v1")


def test_keys_are_asked_for_but_where_health_and_docs_are(ranker: Ranker, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret, old = new_key(path, "shop"), new_key(path, "old")
    revoke_key(path, "old")
    for service in serving(ranker, keys=path):
        answers = ask(
            service,
            {},
            {"headers": {"authorization": "Bearer nonsense"}},
            {"headers": {"authorization": f"Bearer {secret}"}},
            {"headers": {"x-api-key": secret}},
            {"headers": {"x-api-key": old}},
            {"method": "GET", "url": "/healthz"},
            {"method": "GET", "url": "/docs"},
            {"method": "GET", "url": "/openapi.json"},
            {"method": "GET", "url": "/v1/nothing"},
            {"method": "GET", "url": "//v1/rank"},
        )
        assert [a.status_code for a in answers] == [401, 401, 200, 200, 403, 200, 200, 200, 401, 401]
        assert "Authorization: Bearer" in answers[0].json()["error"]
        assert answers[0].json()["field"] == "key"
        assert answers[0].headers["www-authenticate"] == "Bearer"
        report = service.report()
    assert report["keys"] == {"shop": {"requests": 2, "candidates": 6, "limited": 0}}
    assert report["versions"][NO_VERSION]["answers"] == {"401": 4 - 1, "403": 1}  # one was outside of /v1/


def test_limits_of_a_key_end_in_429_with_when_to_try_again(ranker: Ranker, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    by_requests, by_candidates = new_key(path, "r", requests_per_s=0.001), new_key(path, "c", candidates_per_s=0.01)
    for service in serving(ranker, keys=path):
        calls = [{"headers": {"x-api-key": key}} for key in (by_requests, by_candidates) for _ in range(2)]
        answers = ask(service, *calls)
        assert [a.status_code for a in answers] == [200, 429, 200, 429]
        assert int(answers[1].headers["retry-after"]) >= 999
        assert int(answers[3].headers["retry-after"]) >= 200  # three candidates are owed, and a token is needed
        assert "0.01 candidates a second" in answers[3].json()["error"]
        keys = service.report()["keys"]
    assert keys == {
        "r": {"requests": 2, "candidates": 3, "limited": 1},
        "c": {"requests": 2, "candidates": 3, "limited": 1},
    }


def test_each_of_several_replicas_grants_its_share(
    ranker: Ranker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.json"
    secret = new_key(path, "shop", requests_per_s=8)
    for replicas, granted in ((1, 8), (4, 2)):
        for service in serving(ranker, keys=path):
            service.replicas = replicas
            monkeypatch.setattr(time, "monotonic", lambda: 1000.0)  # no token comes back meanwhile
            try:
                answers = ask(service, *[{"headers": {"x-api-key": secret}, "json": {}}] * 10)
            finally:
                monkeypatch.undo()
            assert [a.status_code for a in answers] == [422] * granted + [429] * (10 - granted)


def test_a_file_of_keys_that_is_none_is_told_before_the_first_request(ranker: Ranker, tmp_path: Path) -> None:
    for service in serving(ranker, keys=tmp_path / "none.json"):
        with pytest.raises(SlimrankError, match="slimrank key new"):
            make_api(service)


def test_metrics_of_a_served_request_are_exposed(service: Service) -> None:
    ask(service, {})
    text, version = prometheus_text({"r0": service.report()}).decode(), service.shelf.live.version
    assert f'slimrank_requests_total{{replica="r0",status="200",version="{version}"}} 1.0' in text
    assert f'slimrank_stage_seconds_count{{replica="r0",stage="total",version="{version}"}} 1.0' in text


def test_the_middleware_costs_microseconds(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, not asserted: against the same route without it."""
    from fastapi import FastAPI

    from serve.access import Access
    from serve.api import refusal

    async def cost(app: object) -> float:
        async def receive() -> dict:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(_message: dict) -> None:
            return None

        scope = {"type": "http", "method": "GET", "path": "/v1/x", "headers": [], "query_string": b""}
        begun = time.process_time()
        for _ in range(2000):
            await app(dict(scope), receive, send)  # type: ignore[operator]
        return (time.process_time() - begun) / 2000 * 1e6

    plain = FastAPI(openapi_url=None)
    wrapped = Access(plain, service, None, refusal)
    asyncio.run(cost(plain))
    without, within = asyncio.run(cost(plain)), asyncio.run(cost(wrapped))
    with capsys.disabled():
        print(f" [middleware: {within - without:.1f} us of {within:.0f}]", end="")
    assert service.report()["versions"][NO_VERSION]["answers"] == {"404": 2000}
